"""Which versions a training was made with: `made_with.json` in the run folder, for whoever wants the same again."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("ups-rm", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy", "pyarrow")
OF_VERL = ("verl", "ray", "vllm", "tensordict")


def write_made_with(folder: Path, *, engine: str, device: str = "") -> Path:
    """Write engine, device, machine and package versions into a run folder, as they are now. Returns the file.

    device: as torch names it; "" where the training runs in processes of its own.
    """
    made = {"engine": engine, "machine": f"{platform.system()} {platform.machine()}"}
    made |= versions(*PACKAGES, *OF_VERL) if engine == "verl" else versions()
    if device:
        made["device"] = _device_name(device)
    file = folder / "made_with.json"
    file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return file


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages (default: those that compute), those that are not there left out."""
    found = {name: version for name in packages or PACKAGES if (version := _version(name))}
    return {"python": platform.python_version(), **found}


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # used from its source tree, or not there
        from ups_rm import __version__

        return __version__ if package == "ups-rm" else ""
