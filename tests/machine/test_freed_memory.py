"""What the process asks of malloc, in a process of its own: it holds for a whole one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

READ = """
from ups_rm.device import keep_freed_memory
{ask}
import torch
def resident():
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
before = resident()
block = torch.ones(2**24)  # 64 MiB
held = resident()
del block
print(held - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what memory is where")
@pytest.mark.parametrize("asked", [True, False])
def test_freed_memory_stays_for_the_next_tensors_where_it_is_asked_for(asked: bool) -> None:
    script = READ.format(ask="assert keep_freed_memory()" if asked else "")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    held, after = map(int, done.stdout.split())  # KiB
    assert held >= 60 * 1024
    assert (after >= 60 * 1024) == asked
