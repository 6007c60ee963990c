"""The C++ kernels against the torch forms beside them: the same GRPO step of the local engine, in turn, in one run.

And products of decoding alone, ours and oneDNN's, where the CPU has ours: each weight comes from memory, as there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from unittest import mock

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

    of_step = [
        Result(f"kernels, {BASE.name}, {title}", middle(True, what), middle(False, what), unit, "ours in torch alone",
               versions=versions("torch", "transformers"), required=1.15)
        for title, what, unit in (("wall", "wall", "s"), ("CPU", "cpu", "CPU s"))
    ]  # fmt: skip
    return of_step + products(pairs)


ROWS = (8, 27, 32)
SIZES = ((1536, 576), (576, 1536))
"""Of SmolLM2-135M's largest weights, (O, I)."""
WEIGHTS = 80
"""140 MB, more than caches hold."""


def products(pairs: int) -> list[Result]:
    """Seconds of `WEIGHTS` products in turn by ours and by oneDNN; medians over the pairs after one of warm-up."""
    import torch

    from ups_rm.layers import projection
    from ups_rm.layers.native import multiplier

    if multiplier(torch.zeros(32, 32, dtype=torch.bfloat16)) is None:
        return []
    results = []
    for outer, inner in SIZES:
        weights = [torch.randn(outer, inner).bfloat16() for _ in range(WEIGHTS)]
        ours = [projection.Projection(weight) for weight in weights]
        with mock.patch.object(projection, "multiplier", return_value=None):
            theirs = [projection.Projection(weight) for weight in weights]
        for rows in ROWS:
            x = torch.randn(rows, inner).bfloat16()
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(pairs + 1):
                for name, laid_out in (("ours", ours), ("theirs", theirs)):
                    begun = perf_counter()
                    for one in laid_out:
                        one(x)
                    times[name].append(perf_counter() - begun)
            mine, other = (statistics.median(found[1:]) for found in times.values())
            title = f"{WEIGHTS} products of {rows} rows with a weight of {outer} x {inner}"
            results.append(Result(title, mine, other, "s", "oneDNN, laid out", versions=versions("torch")))
    return results
