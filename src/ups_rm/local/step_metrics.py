"""One step in numbers: what it computed (`StepRecord`), how long it took (`Clock`), its metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ups_rm.data.prompts import PromptRow
from ups_rm.errors import NumberError
from ups_rm.evaluation.text import text_metrics
from ups_rm.grpo import Combined, model_metrics, rollout_metrics, throughput_metrics, timing_metrics
from ups_rm.local.rollout import Rollout
from ups_rm.recipe import Recipe
from ups_rm.reward.transforms import score_range
from ups_rm.types import Score


@dataclass
class StepRecord:
    """Everything that one step computed, for logs."""

    prompts: list[PromptRow]
    rollout: Rollout
    scores: list[Score]
    token_level_scores: Tensor
    token_level_rewards: Tensor
    advantages: Tensor
    kl: Tensor
    old_logprobs: Tensor | None
    update: dict[str, float]
    seconds: dict[str, float]
    usable: Tensor
    """The reply has a score and others to be compared with. Shape (B,), bool."""
    flat: Tensor
    """The rewards of the reply's group are equal, or its scores where those are masked. Shape (B,), bool."""
    learns: Tensor
    """The reply is in the loss. Shape (B,), bool."""
    resampled: int
    """Groups whose replies were drawn anew, each time counted."""
    combined: Combined | None = None
    """Of the usable replies, where the objective has several components."""
    reward_metrics: dict[str, float] = field(default_factory=dict)
    """Of the objective and the overlong penalty."""
    judged: list[Score] | None = None
    """What the second judge says of every reply, where it reads the step's own."""


class Clock:
    """Seconds per phase of one step, under verl's names; `stop` adds the whole as "step"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        with torch.profiler.record_function(phase):  # the phase's name in a trace
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started

    def stop(self) -> None:
        self.seconds["step"] = perf_counter() - self._start


def check_finite(tensor: str, values: Tensor, mask: Tensor) -> None:
    """Whether every value inside the mask is a number.

    Args:
        tensor: what the values are, for the message. values, mask: Shape (B, R).

    Raises:
        NumberError: one is not; names the replies.
    """
    broken = (~values.isfinite() & mask.bool()).any(dim=1)
    if bool(broken.any()):
        raise NumberError(tensor, broken.nonzero().flatten().tolist())


def step_metrics(record: StepRecord, recipe: Recipe, *, number: int, epoch: float, kl_coef: float) -> dict[str, float]:
    """All metrics of one step but the trackers' own (docs/metrics.md).

    Args:
        number: of the step, from 1.
        epoch: passes over the prompts before it.
        kl_coef: what the reward was charged with; 0 where KL is not in the reward.
    """
    rollout, sequences = record.rollout, record.rollout.sequences
    mask = sequences.response_mask
    device = mask.device
    n = recipe.actor_rollout_ref.rollout.n
    kept = record.usable.nonzero().flatten()  # of replies without a score nothing is averaged but their text
    rows, known = kept.tolist(), bool(record.usable.all())

    def of_kept(values: Tensor) -> Tensor:
        return values if known else values[kept]

    benign = torch.tensor([row.kind == "benign" for row in record.prompts]).repeat_interleave(n)
    prompt_lengths = sequences.prompt_mask.sum(1)
    metrics = rollout_metrics(
        token_level_scores=of_kept(record.token_level_scores),
        token_level_rewards=of_kept(record.token_level_rewards),
        advantages=of_kept(record.advantages),
        response_mask=of_kept(mask),
        prompt_lengths=of_kept(prompt_lengths),
        group_ids=of_kept(sequences.group_ids),
        safe_score=torch.tensor([record.scores[i].safe_score for i in rows], device=device),
        logits=torch.tensor([record.scores[i].logit for i in rows], device=device),
        score_range=score_range(recipe.reward_model.transform),
        kl=of_kept(record.kl),
        truncated=torch.tensor([not rollout.finished[i] for i in rows], device=device),
        rm_truncated=torch.tensor([record.scores[i].truncated for i in rows], device=device),
        benign=of_kept(benign.to(device)),
        max_prompt_length=recipe.data.max_prompt_length,
        max_response_length=recipe.data.max_response_length,
    )
    logits = torch.tensor([record.scores[i].logit for i in rows])
    metrics |= {"score/logit_mean": float(logits.mean()), "score/logit_std": float(logits.std(correction=0))}
    metrics |= model_metrics([record.scores[i].model_logits for i in rows], of_kept(sequences.group_ids))
    metrics |= {
        "group/flat_share": float(record.flat[::n].float().mean()),
        "group/masked_share": float((~record.learns).view(-1, n).all(1).float().mean()),
        "group/resampled": float(record.resampled),
    }
    metrics |= text_metrics(
        rollout.texts,
        [row.kind for row in record.prompts for _ in range(n)],
        [row.messages[-1]["content"] for row in record.prompts for _ in range(n)],
    )
    metrics["rollout/entropy"] = -float(rollout.rollout_logprobs.sum() / mask.sum().clamp(min=1))
    # an end token alone is no reply either
    metrics["response/aborted_ratio"] = sum(not text.strip() for text in rollout.texts) / len(rollout.texts)
    metrics |= {"actor/reward_kl_penalty_coeff": kl_coef}
    if record.old_logprobs is not None and rollout.kept is None:  # else they are those of the rollout
        gap = (record.old_logprobs - rollout.rollout_logprobs).abs() * mask
        metrics["rollout/logprob_gap_mean"] = float(gap.sum() / mask.sum().clamp(min=1))
        metrics["rollout/logprob_gap_max"] = float(gap.max())
    metrics |= record.update | record.reward_metrics
    replies, whole = int(mask.sum()), int(prompt_lengths.sum())
    metrics |= timing_metrics(record.seconds, num_prompt_tokens=whole, num_response_tokens=replies)
    metrics |= throughput_metrics(total_num_tokens=whole + replies, seconds=record.seconds["step"])
    return metrics | {"training/global_step": float(number), "training/epoch": epoch}
