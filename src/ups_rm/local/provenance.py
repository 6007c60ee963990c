"""Where a checkpoint was made: the source's git commit, and what decides how floats are rounded."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ups_rm.layers.native import kernels


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+` where files differ from it; None for an install."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    how: dict[str, Any] = {"cwd": checkout, "capture_output": True, "text": True, "timeout": 20, "check": True}
    try:
        told = [
            subprocess.run(["git", *arguments], **how).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "src"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] + ("+" if told[1] else "")


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the bits of a result depend on besides recipe and inputs."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{device.type} ({_processor()})",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "number format": str(dtype).removeprefix("torch."),
        "kernels": "C++" if device.type == "cpu" and kernels() is not None else "torch",
        "torch": torch.__version__,
    }


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """`threads: 1, now 2`, for all that differs."""
    return [f"{name}: {then.get(name, '?')}, now {value}" for name, value in now.items() if then.get(name) != value]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
