"""What the process asks of malloc, in a process of its own: it holds for a whole one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to say what memory is where")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
READ = """
import resource
from ups_rm.device import keep_freed_memory
{before}
assert keep_freed_memory()
import torch
block = torch.ones(2**24)  # 64 MiB
sizes, inside = {{"Size": 0, "Rss": 0, "AnonHugePages": 0}}, False
for line in open("/proc/self/smaps"):
    name = line.split()[0]
    if not name.endswith(":"):
        inside = "[heap]" in line
    elif inside and name[:-1] in sizes:
        sizes[name[:-1]] += int(line.split()[1])
del block
again = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
print(*sizes.values(), again)
"""


def heap(before: str = "") -> tuple[int, ...]:
    """KiB of addresses, of memory and of huge pages of the heap that holds a tensor of 64 MiB, and of the process's
    memory after the tensor is gone."""
    done = subprocess.run(
        [sys.executable, "-c", READ.format(before=before)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


def test_freed_memory_stays_and_addresses_alone_are_reserved() -> None:
    size, resident, _, after = heap()
    total = int(Path("/proc/meminfo").read_text().split()[1])
    assert size > 0.4 * total, "half of the memory's addresses"
    assert 64 * 1024 <= resident < 512 * 1024, "the tensor, and no more of what is reserved"
    assert after > 64 * 1024, "the freed tensor's memory is kept"


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no huge pages to programs"
)
def test_tensors_lie_in_huge_pages() -> None:
    _, _, huge, _ = heap()
    assert huge > 32 * 1024


def test_where_addresses_are_limited_none_are_reserved() -> None:
    limited = "resource.setrlimit(resource.RLIMIT_DATA, (2**40, 2**40))"
    size, resident, huge, _ = heap(limited)
    assert size < 2**20
    assert resident >= 64 * 1024
    assert huge == 0 or "[always]" in ENABLED.read_text()
