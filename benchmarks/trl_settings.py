"""Which settings suit TRL best: seconds of its step alone, on the base case of `grpo_step`, under each in turn.

The first is what `grpo_step` compares with: one micro batch of 32, sdpa, bf16 autocast where the CPU computes in bf16.
All are sound; bf16 weights, which are not here, are not: updates of 1e-6 round away in them.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.grpo_step import BASE, EAGER, trl_in_turn
from benchmarks.machine import computes_in_bf16
from benchmarks.result import Result, versions

FP32 = "fp32 throughout"
SETTINGS: dict[str, dict[str, Any]] = {
    "as in grpo_step": {},
    "two micro batches of 16": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
    "four micro batches of 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "eager attention": EAGER,
    "gradient checkpointing": {"gradient_checkpointing": True},
    FP32: {"bf16": False},
}
"""Each differs from the first in what its name says."""


def run(pairs: int) -> list[Result]:
    """`pairs` steps under each, at most 3, after one of warm-up."""
    results, used = [], versions("torch", "transformers", "trl")
    for name, settings in SETTINGS.items():
        if name == FP32 and not computes_in_bf16():
            continue  # the first is that already
        costs = trl_in_turn(replace(BASE, peer_settings=settings), min(pairs, 3), lambda: None)
        middle = statistics.median(cost.wall for cost in costs)
        results.append(Result(f"TRL's GRPO step, {name}", middle, None, "s", versions=used))
    return results
