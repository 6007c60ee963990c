"""Kernels in C++ for CPUs, built at first use by torch's own extension builder.

They are no more than a faster form of what `elementwise`, `projection`, `sampling`, `group_cache`, `decode` and
`selected_logprobs` say in torch, and are left out where they can't be built (no compiler, no headers) and with
UPS_RM_NATIVE=0.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_rm.console import console
from ups_rm.models import cache_folder

NAMES = ("attention.cpp", "kernels.cpp", "kernels.h", "layer.cpp", "numbers.h", "products.cpp")
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
BLOCK = 32
"""Positions that the attention kernel takes at once: capacities are multiples of it."""
PANEL = 32
"""Columns that products take at once: a weight's sizes are multiples of it."""


@functools.cache
def kernels() -> Any | None:
    """The built module, or None. Building takes half a minute, once per CPU, torch and source."""
    if os.environ.get("UPS_RM_NATIVE") == "0":
        return None
    library = cache_folder() / "native" / _key() / "ups_rm_kernels.so"
    try:
        if library.exists():
            return _imported(library)
        console.print("building kernels for this CPU (once, half a minute)")
        library.parent.mkdir(parents=True, exist_ok=True)
        with (library.parent / "building").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it; the system frees the lock when it ends
            if library.exists():
                return _imported(library)
            built = _build(library.parent / "build")
            # in one step, and never again: a library that processes have loaded is not written to
            shutil.copy2(built.__file__, library.with_suffix(".new"))
            library.with_suffix(".new").replace(library)
            return built
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()
        console.print(
            f"kernels could not be built, everything goes on without them, slower: {reason[0] if reason else error!r}",
            markup=False,
        )
        return None


def usable(*tensors: Tensor) -> Any | None:
    """The kernels, if they take these tensors: all fp32 or all bf16, on the CPU."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    if any(tensor.device.type != "cpu" or tensor.dtype != dtype for tensor in tensors):
        return None
    return kernels()


def multiplier(weight: Tensor) -> Any | None:
    """The kernels, if their products take a weight (O, I): in bf16, both sizes whole panels, on a CPU that has them."""
    if weight.dtype != torch.bfloat16 or any(size == 0 or size % PANEL for size in weight.shape):
        return None
    found = usable(weight)
    return found if found is not None and found.multiplies() else None


def _imported(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location("ups_rm_kernels", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(folder: Path) -> Any:
    """The module, built in a folder that is emptied first: what a killed build left there, torch would wait for."""
    from torch.utils.cpp_extension import load

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in SOURCES:
        (folder / source.name).write_bytes(source.read_bytes())
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # ninja of the environment
    try:
        units = [str(folder / source.name) for source in SOURCES if source.suffix == ".cpp"]
        return load("ups_rm_kernels", units, extra_cflags=list(FLAGS), build_directory=str(folder))
    finally:
        os.environ["PATH"] = path


def _key() -> str:
    """Changes with all that the binary depends on; -march=native ties it to the CPU."""
    try:
        cpu = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    parts = [*texts, *FLAGS, torch.__version__, sys.version, platform.machine(), cpu]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
