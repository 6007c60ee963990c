"""Which device and which number format to compute in."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ups_rm.errors import RunError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}


def compute_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The torch dtype that `name` means on `device` (see `torch_device`).

    "auto" is bfloat16 where the hardware computes in it (CPU with avx512_bf16 or amx_bf16, CUDA from Ampere on), else
    float32. Other names: float32/fp32, bfloat16/bf16, float16/fp16.

    Raises:
        RunError: an unknown name, or float16 on a CPU.
    """
    import torch

    kind = torch.device(device).type
    if name == "auto":
        return torch.bfloat16 if _has_fast_bf16(kind) else torch.float32
    if name not in DTYPES:
        raise RunError(f"dtype {name!r} is not known; choose auto, float32, bfloat16 or float16")
    if DTYPES[name] == "float16" and kind == "cpu":
        raise RunError("dtype float16 is not for CPUs (range too small, slow); choose auto, bfloat16 or float32")
    return getattr(torch, DTYPES[name])


def torch_device(name: str | torch.device) -> torch.device:
    """The device of that name; `auto` is cuda where there is one, else cpu.

    Raises:
        RunError: no such device here.
    """
    import torch

    text = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else str(name)
    try:
        device = torch.device(text)
    except RuntimeError:
        raise RunError(f"device {text!r} is not known; choose auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise RunError(f"device is {text}, but torch sees {count or 'no'} CUDA devices\n  fix: cpu, or auto")
    return device


def rest_idle_threads() -> None:
    """Idle OpenMP threads wait for a moment and then sleep; called before torch is imported, which reads it then.

    Threads that spin for long stall whatever else runs on these cores. Threads that sleep at once are woken
    hundreds of times per reply token while decoding, which costs more than the products between: a GRPO step takes a
    quarter longer. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # some 0.1 ms; GNU's OpenMP, which torch's wheels carry


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what tensors free for the next ones; False where the C library has no `mallopt`.

    By default it hands each large block back to the kernel and takes new pages, filled with zeros, a moment later,
    which costs a good part of a step's CPU time. The price: the process's memory stays at its peak (until
    `give_back_memory`), and what lives for long in the middle of it keeps large tensors from others' places
    (`layers.grid.rounded`).
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # all blocks from the heap: one beside it (by default each over 32 MiB) is new pages every time; -1: never trimmed
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def give_back_memory() -> None:
    """Collect what is garbage and hand what glibc's malloc keeps of freed memory to the kernel, whatever
    `keep_freed_memory` says: what comes next takes its own."""
    gc.collect()  # models and optimizers hold each other
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def _has_fast_bf16(kind: str) -> bool:
    import torch

    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return kind == "cpu" and _cpu_has_bf16()


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    """avx512_bf16 or amx_bf16 among the CPU's flags; False where the system does not list them."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
