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


def peak(side: str, rm: Path) -> float:
    """Peak of one side's process in MB (10^6 bytes), as the kernel counted it."""
    command = [sys.executable, "-m", "benchmarks.memory", side, str(rm)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_of_default_run() -> float:
    """The same of `ups-rm run`, which prints as it goes.

    Raises:
        CalledProcessError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ups_rm", "run"]
        process = subprocess.Popen(command, cwd=folder, env=os.environ | {"OUTPUT_DIR": "run"}, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, command)
    return _megabytes(usage.ru_maxrss)


def _megabytes(max_rss: int) -> float:
    return max_rss * (1024 if sys.platform != "darwin" else 1) / 1e6


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
    print(_megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


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
            peak_of_default_run(),
            None,
            "MB",
            versions=used,
        ),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
