"""What the process asks of malloc, in a process of its own: it holds for a whole one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

READ = """
from ups_rm.device import give_back_memory, keep_freed_memory
{ask}
import torch
def resident():
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
before = resident()
block = [torch.ones(2**24)]  # 64 MiB
held = resident()
{end}
after = resident()
give_back_memory()
print(held - before, after - before, resident() - before)
"""
KIB = 60 * 1024
"""Less than the block, by what else malloc has to spare."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what memory is where")
@pytest.mark.parametrize("asked", [True, False])
def test_freed_memory_stays_for_the_next_tensors_where_it_is_asked_for(asked: bool) -> None:
    held, after, at_last = resident(ask="assert keep_freed_memory()" if asked else "", end="del block")
    assert held >= KIB
    assert (after >= KIB) == asked
    assert at_last < KIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what memory is where")
def test_what_holds_itself_is_given_back_too() -> None:
    _, after, at_last = resident(ask="assert keep_freed_memory()", end="block.append(block); del block")
    assert after >= KIB > at_last


def resident(**parts: str) -> list[int]:
    """KiB above the start: with a block, without it, and once memory was given back."""
    done = subprocess.run(
        [sys.executable, "-c", READ.format(**parts)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
