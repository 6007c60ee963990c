"""Highest resident memory of the local engine's GRPO steps and of TRL's, on the same work.

The base case of `grpo_step`: SmolLM2-135M, 8 prompts x 4 replies x 64 tokens, KL to the frozen start, AdamW, with the
reward model in the same process. Each side runs its steps in a process of its own, which is what is measured, libraries
included.

And ours alone over the README's whole command: preparing the sample, training its RM, the default recipe's 40 steps and
the evaluation before and after, in one process, some ten minutes.
"""

from __future__ import annotations

import os
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


def peak(side: str, *rm: Path) -> float:
    """Peak of one side's process in MB (10^6 bytes), as the kernel counted it."""
    command = [sys.executable, "-m", "benchmarks.memory", side, *map(str, rm)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str]) -> None:
    """What `peak` starts: the steps of one side, or the README's command; the peak on the last line."""
    side, *rm = arguments
    with tempfile.TemporaryDirectory() as folder:
        if side == "command":
            environment = os.environ | {"OUTPUT_DIR": "run"}
            command = [sys.executable, "-m", "ups_rm", "run"]
            subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
        else:
            _steps(side, Path(folder), Path(*rm))
    print(_megabytes(side))


def _steps(side: str, folder: Path, rm: Path) -> None:
    from ups_rm.reward.scorer import RewardScorer

    scorer = RewardScorer.load(rm)
    if side == "ours":
        step = our_step(CASE, folder, scorer)
        for _ in range(STEPS):
            step()
    else:
        trl_steps(CASE, folder, scorer, STEPS - 1, lambda: None)


def _megabytes(side: str) -> float:
    """Peak of this process, or of the one that it has started."""
    import resource

    if side != "command" and (status := Path("/proc/self/status")).exists():  # getrusage begins with the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    used = resource.getrusage(resource.RUSAGE_CHILDREN if side == "command" else resource.RUSAGE_SELF).ru_maxrss
    return used * (1024 if sys.platform != "darwin" else 1) / 1e6


def run(pairs: int = 1) -> list[Result]:
    """The larger of `pairs` runs of each side, in turn; and the default run, once."""
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
        ),
        Result(
            f"the README's command, all its stages, highest memory, at most {LIMIT:g}",
            peak("command"),
            None,
            "MB",
            versions=used,
        ),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
