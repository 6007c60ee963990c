"""The C++ kernels against the torch forms beside them: the same GRPO step of the local engine, in turn, in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.grpo_step import BASE, Cost, LengthScorer, our_step, used
from benchmarks.result import Result, versions


def run(pairs: int = 5) -> list[Result]:
    """Medians over the pairs after one step of warm-up each; `peer` is our own step without the kernels."""
    from ups_rm.layers.native import kernels

    if kernels() is None:
        raise SystemExit(f"no kernels: UPS_RM_NATIVE={os.environ.get('UPS_RM_NATIVE', '')}, or no compiler")
    with tempfile.TemporaryDirectory() as name:
        steps: dict[bool, Callable[[], Cost]] = {}
        costs: dict[bool, list[Cost]] = {True: [], False: []}
        for native in (True, False):
            (Path(name) / str(native)).mkdir()
            with used(native):
                steps[native] = our_step(BASE, Path(name) / str(native), LengthScorer())
        for _ in range(pairs + 1):
            for native, step in steps.items():
                with used(native):
                    costs[native].append(step())

    def middle(native: bool, what: str) -> float:
        return statistics.median(getattr(cost, what) for cost in costs[native][1:])

    return [
        Result(f"kernels, {BASE.name}, {title}", middle(True, what), middle(False, what), unit, "ours in torch alone",
               versions=versions("torch", "transformers"), required=1.15)
        for title, what, unit in (("wall", "wall", "s"), ("CPU", "cpu", "CPU s"))
    ]  # fmt: skip
