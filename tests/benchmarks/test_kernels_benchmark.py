"""The products of the kernels' benchmark: both sides run, whatever the CPU has."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels
from ups_rm.layers.native import multiplier


def test_products_are_timed_where_this_cpu_has_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WEIGHTS", 2)
    found = kernels.products(1)
    here = multiplier(torch.zeros(32, 32, dtype=torch.bfloat16)) is not None
    assert len(found) == (len(kernels.SIZES) * len(kernels.ROWS) if here else 0)
    assert all(one.ours > 0 and one.ratio is not None and one.ratio > 0 for one in found)
