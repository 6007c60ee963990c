"""Runs of the local engine that are killed again and again, and what they leave: for tests/reliability.

`Lives` starts one process per life. They are forked from a server that has imported everything (multiprocessing's
`forkserver`) and has one thread, so a life costs what its steps cost. A life is killed either from outside, at a random
instant, or by a trap: at its k-th arrival at a named place the process sends SIGKILL to itself.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tiny_training import base_overrides, prefers, recipe_yaml
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import load_recipe
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Conversation, Score

STEPS = 20
PER_EPOCH = 3
"""12 prompts, 4 in a batch."""
ACTOR = "actor_rollout_ref.actor."
SETTINGS = [
    f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2", "trainer.test_freq=5",
    "trainer.val_before_train=true",
    "trainer.max_ckpt_to_keep=2", "trainer.best_ckpt_to_keep=1", f"{ACTOR}optim.lr=5e-3", f"{ACTOR}shuffle=true",
    f"{ACTOR}ppo_mini_batch_size=2", f"{ACTOR}optim.lr_scheduler_type=cosine", f"{ACTOR}optim.lr_warmup_steps=4",
    "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=50", "algorithm.kl_ctrl.kl_coef=0.01",
]  # fmt: skip


class DrawingScorer:
    """`prefers("e")` and noise from all three global random generators: a run is exact only if their states are."""

    def __init__(self) -> None:
        self.inner = prefers("e")

    def score(self, conversations: list[Conversation]) -> list[Score]:
        scores = []
        for score in self.inner.score(conversations):
            noise = random.random() + random.gauss(0, 1) + float(np.random.standard_normal()) + float(torch.randn(()))
            logit = score.logit + 0.1 * noise
            scores.append(Score(logit, 1 / (1 + math.exp(logit)), 1, False))
        return scores


# ---- traps


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, at: int, wanted: Callable[..., bool] = lambda *_: True) -> None:
    """Die instead of the `at`-th wanted call of `owner.name`."""
    original, left = getattr(owner, name), at

    def trapped(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        if wanted(*arguments):
            left -= 1
            if left == 0:
                die()
        return original(*arguments, **more)

    setattr(owner, name, trapped)


def after(owner: Any, name: str, at: int, then: Callable[..., None], wanted: Callable[..., bool]) -> None:
    """Let the `at`-th wanted call happen, do `then` with its arguments, and die."""
    original, left = getattr(owner, name), at

    def trapped(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        done = original(*arguments, **more)
        if wanted(*arguments):
            left -= 1
            if left == 0:
                then(*arguments)
                die()
        return done

    setattr(owner, name, trapped)


def in_checkpoint(path: Any, *_: Any) -> bool:
    return ".global_step_" in str(path)


def halve(_: Any, file: Path) -> None:
    os.truncate(file, Path(file).stat().st_size // 2)


def half_a_line(self: Any, *_: Any) -> None:
    os.truncate(self.file, self.file.stat().st_size - 40)


def always(*_: Any) -> bool:
    return True


def set_trap(place: str, at: int) -> None:
    """See `PLACES`."""
    from ups_rm import durable
    from ups_rm.local import decode
    from ups_rm.local.actor import Actor
    from ups_rm.local.policy import Policy
    from ups_rm.tracking.group_log import GroupLog
    from ups_rm.tracking.jsonl import MetricsFile

    if place == "checkpoint half written":
        after(torch, "save", at, halve, always)
    elif place == "checkpoint not yet renamed":
        before(Path, "replace", at, in_checkpoint)
    elif place == "checkpoint just renamed":
        after(Path, "replace", at, lambda *_: None, in_checkpoint)
    elif place == "old checkpoint half removed":
        before(durable.shutil, "rmtree", at, lambda path, *_: str(path).endswith(".removed") and Path(path).exists())
    elif place == "rollout":
        before(decode, "draw", at)
    elif place == "update":
        after(Actor, "_step", at, lambda *_: None, always)
    elif place == "group log half written":
        before(GroupLog, "write", at)
    elif place == "metrics line half written":
        after(MetricsFile, "log", at, half_a_line, always)
    elif place == "epoch boundary":
        before(Trainer, "step", at, lambda _self, _prompts, number: number > 1 and number % PER_EPOCH == 1)
    elif place == "last step":
        after(Trainer, "step", 1, lambda *_: None, lambda _self, _prompts, number: number == STEPS)
    elif place == "policy half written":
        after(Policy, "save", 1, lambda _self, folder: halve(None, folder / "model.safetensors"), always)


PLACES = {  # place: the k of "at its k-th arrival" is drawn from 1 to this
    "checkpoint half written": 2,
    "checkpoint not yet renamed": 2,
    "checkpoint just renamed": 2,
    "old checkpoint half removed": 2,
    "rollout": 40,
    "update": 8,
    "group log half written": 4,
    "metrics line half written": 4,
    "epoch boundary": 1,
    "last step": 1,
    "policy half written": 1,
}
AT_THE_END = ("last step", "policy half written")


def live(folder: Path, overrides: list[str], place: str | None, at: int) -> None:
    """One life: train to the end, unless the trap closes. What it prints goes to `console.log`."""
    log = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if place is not None:
        set_trap(place, at)
    Trainer(load_recipe(folder / "recipe.yaml", overrides), DrawingScorer()).fit()


@dataclass
class Lives:
    """A run in `<folder>/run`, life by life.

    Attributes:
        kills: where each of the lives that were killed ended.
        seconds: that a life took that ended by itself.
    """

    folder: Path
    policy: Path
    kills: list[str] = field(default_factory=list)
    seconds: float = math.inf

    def __post_init__(self) -> None:
        recipe_yaml(self.folder)
        self.overrides = [*base_overrides(self.folder, self.policy), *SETTINGS]
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["reliability.lives"])

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def once(self, place: str | None = None, at: int = 1, *, after_seconds: float | None = None) -> bool:
        """One life; whether it reached the end. Raises if it ended in another way than by the end or a kill."""
        process = self.processes.Process(target=live, args=(self.folder, self.overrides, place, at))
        started = perf_counter()
        process.start()
        process.join(after_seconds)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            self.seconds = perf_counter() - started
            return True
        if process.exitcode != -signal.SIGKILL:
            raise AssertionError(f"exit code {process.exitcode}:\n{(self.folder / 'console.log').read_text()[-3000:]}")
        self.kills.append(place or "random instant")
        return False


# ---- what a run leaves


def traces(run: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit: metrics but for what is measured in seconds, group logs, weights, the
    last checkpoint's tensors (optimizer, schedule, random states) and state."""
    import json

    rows = [
        {name: repr(v) for name, v in row.items() if not name.startswith(("tim", "perf"))}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    last = run / f"global_step_{STEPS}"
    state = json.loads((last / "state.json").read_text())
    for name in ("recipe", "made_with"):  # paths of the run folder
        state.pop(name)
    return {
        "metrics": rows,
        "groups": {file.name: file.read_bytes() for file in sorted((run / "groups").iterdir())},
        "checkpoints": sorted(path.name for path in run.glob("*global_step_*")),
        "state": state,
        "weights": load_file(run / "policy" / "model.safetensors"),
        "tensors": torch.load(last / "training.pt", weights_only=True),
    }


def assert_equal(ours: Any, straight: Any, where: str = "") -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(straight, dict):
        assert ours.keys() == straight.keys(), where
        for key in straight:
            assert_equal(ours[key], straight[key], f"{where}/{key}")
    elif isinstance(straight, list):
        assert len(ours) == len(straight), where
        for i, (one, other) in enumerate(zip(ours, straight, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(straight, torch.Tensor):
        assert ours.dtype == straight.dtype, where
        assert ours.shape == straight.shape, where
        assert torch.equal(ours.flatten().view(torch.uint8), straight.flatten().view(torch.uint8)), where
    else:
        assert ours == straight, where
