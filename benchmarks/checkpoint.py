"""What a checkpoint costs the training thread of the local engine: written off it, and on it.

SmolLM2-135M at its real size (fp32 masters and two AdamW moments: 1.6 GB a checkpoint), with steps of few tokens: what
is wanted is the cost of the checkpoint, which does not depend on theirs. A round takes one step alone, one checkpoint
with as many steps beside it as its write lasts, and one checkpoint on the training thread. Off the thread, the cost is
all that these steps took longer than steps alone: the copy in memory, and what the write takes from them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from benchmarks.grpo_step import Case, Cost, LengthScorer, our_trainer
from benchmarks.result import Result, versions

SMALL = Case("2 prompts x 2 replies x 8 tokens", prompts=2, n=2, new_tokens=8)


def run(pairs: int = 5, case: Case = SMALL) -> list[Result]:
    """Medians over the rounds, after a step of warm-up; `peer` is the checkpoint written on the training thread."""
    from ups_rm.local.checkpoint import CheckpointWriter, TrainingState

    alone: list[float] = []
    off: list[float] = []
    copies: list[float] = []
    beside: list[int] = []
    on: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        trainer, step = our_trainer(case, Path(name), LengthScorer())

        def writer(kind: str, *, background: bool) -> CheckpointWriter:
            return CheckpointWriter(Path(name) / kind, trainer.actor, trainer.provenance, keep=1, background=background)

        step()
        for number in range(1, pairs + 1):
            alone.append(_seconds(step))
            started, steps = perf_counter(), 0
            with writer("off", background=True) as background:
                written = background.save(TrainingState(step=number))
                copies.append(perf_counter() - started)
                while not written.exists():
                    step()
                    background.raise_failure()
                    steps += 1
            off.append(perf_counter() - started)
            beside.append(steps)
            with writer("on", background=False) as foreground:
                on.append(_seconds(lambda: foreground.save(TrainingState(step=number))))  # noqa: B023 - called here
        size = sum(file.stat().st_size for file in (Path(name) / "on").rglob("training.pt"))
    peer = "written on the training thread"
    one_step, used = statistics.median(alone), versions("torch", "transformers")
    costs = [whole - steps * one_step for whole, steps in zip(off, beside, strict=True)]
    return [
        Result("step without a checkpoint", one_step, None, "s", versions=used),
        Result("checkpoint, training thread blocked", statistics.median(copies), statistics.median(on), "s", peer,
               versions=used),
        Result("checkpoint, with what the steps beside it take longer", statistics.median(costs), statistics.median(on),
               "s", peer, versions=used),
        Result("checkpoint, steps beside its write", statistics.median(beside), None, "steps", versions=used),
        Result("checkpoint, size on the disk", size / 1e6, None, "MB", versions=used),
    ]  # fmt: skip


def _seconds(action: Callable[[], Cost | Path]) -> float:
    started = perf_counter()
    action()
    return perf_counter() - started
