"""What checkpointing costs a GRPO step of the local engine: off the training thread, on it, and not at all.

The base case of `grpo_step` with SmolLM2-135M (fp32 masters and two AdamW moments: 1.6 GB a checkpoint). A round takes
one step of each kind in turn; the cost of a checkpoint is what the training thread spends in `CheckpointWriter.save`
and in waiting for the one before, and what the step beside a write takes longer.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.grpo_step import BASE, Case, LengthScorer, our_trainer
from benchmarks.result import Result, versions


def run(pairs: int = 5, case: Case = BASE) -> list[Result]:
    """Medians over the rounds after one of warm-up; `peer` is what is written on the training thread."""
    from ups_rm.local.checkpoint import CheckpointWriter, TrainingState

    kinds = {"none": None, "async": True, "sync": False}
    blocked: dict[str, list[float]] = {kind: [] for kind in kinds}
    walls: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        trainer, step = our_trainer(case, Path(name), LengthScorer())
        for number in range(1, pairs + 2):
            for kind, background in kinds.items():
                folder = Path(name) / kind
                started = perf_counter()
                if background is None:
                    step()
                    walls[kind].append(perf_counter() - started)
                    continue
                with CheckpointWriter(
                    folder, trainer.actor, trainer.provenance, keep=1, background=background
                ) as writer:
                    writer.save(TrainingState(step=number))
                    blocked[kind].append(writer.seconds)
                    step()  # the write goes on beside it
                    walls[kind].append(perf_counter() - started)
                    written = perf_counter()
                blocked[kind][-1] += perf_counter() - written  # what is left of the write when the next one is due
        size = sum(file.stat().st_size for file in (Path(name) / "sync").rglob("training.pt"))

    def middle(values: dict[str, list[float]], kind: str) -> float:
        return statistics.median(values[kind][1:])

    alone, used = middle(walls, "none"), versions("torch", "transformers")
    return [
        Result("checkpoint, training thread blocked", middle(blocked, "async"), middle(blocked, "sync"), "s",
               "written on the training thread", versions=used),
        Result("checkpoint and its step, wall", middle(walls, "async"), middle(walls, "sync"), "s",
               "written on the training thread", floor=alone, versions=used),
        Result("checkpoint, size on the disk", size / 1e6, None, "MB", versions=used),
    ]  # fmt: skip
