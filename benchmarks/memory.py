"""Highest resident memory of the local engine's GRPO steps and of TRL's, on the same work.

The base case of `grpo_step`: SmolLM2-135M, 8 prompts x 4 replies x 64 tokens, KL to the frozen start, AdamW, with the
reward model in the same process. Each side runs its steps in a process of its own, which is what is measured, libraries
included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.grpo_step import BASE, our_step, reward_model, trl_steps
from benchmarks.result import Result, versions

LIMIT = 5000.0
"""MB that our side may take."""
CASE = replace(BASE, name="with RM scoring", with_rm=True)
STEPS = 3


def peak(side: str, rm: Path) -> float:
    """Peak of one side's process in MB (10^6 bytes), as the kernel counted it."""
    command = [sys.executable, "-m", "benchmarks.memory", side, str(rm)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str]) -> None:
    """What `peak` starts: the steps of one side, its peak on the last line."""
    import resource

    from ups_rm.reward.scorer import RewardScorer

    side, rm = arguments
    scorer = RewardScorer.load(rm)
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            step = our_step(CASE, Path(folder), scorer)
            for _ in range(STEPS):
                step()
        else:
            trl_steps(CASE, Path(folder), scorer, STEPS - 1, lambda: None)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kilobytes * (1024 if sys.platform != "darwin" else 1) / 1e6)


def run(pairs: int = 1) -> list[Result]:
    """The larger of `pairs` runs of each side, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        rm = reward_model(Path(folder))
        runs = [(peak("ours", rm), peak("trl", rm)) for _ in range(pairs)]
    ours, theirs = (max(side) for side in zip(*runs, strict=True))
    used = versions("torch", "transformers", "trl")
    return [
        Result(
            f"GRPO steps, {CASE.name}, highest memory, at most {LIMIT:g}",
            ours,
            theirs,
            "MB",
            "TRL GRPOTrainer",
            versions=used,
            required=1.0,
        )
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
