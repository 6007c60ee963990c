"""Runs of the verl engine on a CPU, what they sampled, and the same through the local engine."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiny_training import base_overrides, recipe_yaml
from ups_rm.data.batches import prompt_batches
from ups_rm.local.checkpoint import TrainingState
from ups_rm.local.rollout import encode_prompts
from ups_rm.local.step_metrics import StepRecord
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.tracking.jsonl import read_metrics
from verl_cpu import command

STEPS = 2
OWN_CODE = "reward_model.model.trust_remote_code=true"
"""What RMs need that misbehave by their own Python file."""
Replies = dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]]
"""By prompt, in the order of sampling: (tokens, log-probabilities as sampled)."""
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class VerlRun:
    """A run: its folder, what each start of its command sampled, and the recipe settings without those of the shims."""

    folder: Path
    dumps: list[Path]
    given: list[str]
    file: Path
    arguments: list[str | Path]

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.file, self.given)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def tokens(self, step: int) -> list[dict[str, Any]]:
        """What verl computed in a step, reply by reply and token by token (verl_cpu.tokens), by prompt and reply."""
        texts = [command.tokens_file(dump).read_text(encoding="utf-8") for dump in self.dumps]
        rows = [json.loads(line) for line in "".join(texts).splitlines()]
        return sorted((row for row in rows if row["weights"] == step - 1), key=lambda r: (r["prompts"], r["responses"]))


def planned(
    folder: Path,
    policy: Path,
    rm: Path,
    *changes: str,
    workers: int = 1,
    starts: int = 1,
    verl_only: tuple[str, ...] = (),
) -> VerlRun:
    """Two steps of 4 prompts x 4 replies of 8 tokens, all it takes after the verb of the command.

    Args:
        changes: further settings of the recipe.
        verl_only: settings that the local engine refuses: the recipe's (`reward_model.`) or verl's own.
        starts: how often the command is going to be given.
    """
    given = [
        *base_overrides(folder, policy),
        f"reward_model.model.path={rm}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=1",
        "trainer.logger=[console]",
        "algorithm.kl_ctrl.kl_coef=0.05",
        *(f"actor_rollout_ref.{part}.log_prob_micro_batch_size_per_gpu=8" for part in ("rollout", "ref")),
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",  # the replies of one of two workers
        # AdamW's first step is lr * g / (|g| + 1e-8): where g itself is rounding, the weights show it times lr. By its
        # order of summation alone, one of 60 batches led 1.6e-5 apart at 1e-4; at 1e-5 none more than 1.6e-6
        "actor_rollout_ref.actor.optim.lr=1e-5",
        *(f"evaluation.{key}" for key in ("max_unsafe_prompts=2", "max_benign_prompts=2", "n=1", "max_new_tokens=4")),
        # so sharp that a step which moves anything is likely to raise an alarm
        *("monitor.window=1", "monitor.kl=1e-6", "monitor.distinct_2=0.999", "monitor.length_factor=1.001"),
        *changes,
    ]
    file, data = recipe_yaml(folder), ["--train-data", folder / "train.parquet", "--val-data", folder / "val.parquet"]
    ours = [text for text in verl_only if text.startswith("reward_model.")]
    theirs = [text for text in verl_only if text not in ours]
    arguments = ["--recipe", file, *data, *given, *ours, *command.settings(workers, *theirs)]
    dumps = [folder / f"dump_{start}.jsonl" for start in range(starts)]
    return VerlRun(folder / "run", dumps, given, file, [*arguments, "--skip-rm-check"])


@dataclass(frozen=True)
class Interrupted:
    """How a start of the command ended that got a Ctrl-C."""

    printed: str
    code: int
    seconds: float
    """From the signal to the end of the command."""
    left: list[str]
    found: list[str]
    """What stood in the run folder after it."""


def replies_with(dump: Path, *, weights: int) -> Replies:
    """What was sampled with the weights of that step; the last line may still be on its way."""
    replies: Replies = defaultdict(list)
    text = dump.read_text() if dump.is_file() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = json.loads(line)
        if row["weights"] == weights:
            replies[tuple(row["prompt"])].append((torch.tensor(row["tokens"]), torch.tensor(row["logprobs"])))
    return replies


def sampled(run: VerlRun, step: int) -> Replies:
    """The replies that a step was made of: those of the last start that came to it, without those of a validation."""
    return next(found for dump in reversed(run.dumps) if (found := replies_with(dump, weights=step - 1)))


@dataclass(frozen=True)
class Replay:
    """What verl sampled, through the local engine: record, metrics and weights of each step, and a validation."""

    records: list[StepRecord]
    metrics: list[dict[str, float]]
    start: Weights
    weights: list[Weights]
    validation: dict[str, float]

    @staticmethod
    def of(run: VerlRun) -> Replay:
        trainer = Trainer(run.recipe)
        batches = prompt_batches(trainer.train_rows, run.recipe.data)
        records, metrics, weights = [], [], [_copy(trainer)]
        n = run.recipe.actor_rollout_ref.rollout.n
        for step in range(1, STEPS + 1):
            prompts, replies = next(batches), sampled(run, step)
            messages = [row.messages for row in prompts]
            ids = encode_prompts(trainer.policy.tokenizer, messages)
            assert set(replies) == {tuple(row) for row in ids}, "verl saw other prompts than the local engine would"
            rows = [reply for row in ids for reply in replies[tuple(row)]]
            assert len(rows) == n * len(prompts)
            rollout = trainer.engine._pack(messages, ids, rows, n)
            trainer._rollout = lambda *_, rollout=rollout, **__: rollout  # type: ignore[method-assign]
            records.append(trainer.step(prompts, step))
            metrics.append(trainer.metrics(records[-1], step))
            trainer.objective.after_step(metrics[-1])
            weights.append(_copy(trainer))
        validation = trainer.validate(TrainingState()) if run.recipe.trainer.test_freq > 0 else {}
        return Replay(records, metrics, weights[0], weights[1:], validation)


def _copy(trainer: Trainer) -> Weights:
    return {name: value.detach().clone() for name, value in trainer.policy.model.state_dict().items()}


def checkpoint_weights(actor: Path) -> Weights:
    """All shards of a checkpoint that a test made itself, joined on their first dimension, without verl's merger."""
    files = sorted(actor.glob("model_world_size_*_rank_*.pt"), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
    shards = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    joined = {}
    for key in shards[0]:
        parts = [getattr(shard[key], "_local_tensor", shard[key]) for shard in shards]
        joined[key] = torch.cat(parts) if hasattr(shards[0][key], "_local_tensor") else parts[0]
    return joined
