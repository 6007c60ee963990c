"""One step in numbers: what it computed (`StepRecord`), how long it took (`Clock`), its metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ups_rm.data.prompts import PromptRow
from ups_rm.evaluation.text import text_metrics
from ups_rm.grpo import model_metrics, rollout_metrics, throughput_metrics, timing_metrics
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
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Seconds per phase of one step, under verl's names; `stop` adds the whole as "step"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started

    def stop(self) -> None:
        self.seconds["step"] = perf_counter() - self._start


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
    benign = torch.tensor([row.kind == "benign" for row in record.prompts]).repeat_interleave(n)
    prompt_lengths = sequences.prompt_mask.sum(1)
    metrics = rollout_metrics(
        token_level_scores=record.token_level_scores,
        token_level_rewards=record.token_level_rewards,
        advantages=record.advantages,
        response_mask=mask,
        prompt_lengths=prompt_lengths,
        group_ids=sequences.group_ids,
        safe_score=torch.tensor([score.safe_score for score in record.scores], device=device),
        logits=torch.tensor([score.logit for score in record.scores], device=device),
        score_range=score_range(recipe.reward_model.transform),
        kl=record.kl,
        truncated=torch.tensor([not ended for ended in rollout.finished], device=device),
        rm_truncated=torch.tensor([score.truncated for score in record.scores], device=device),
        benign=benign.to(device),
        max_prompt_length=recipe.data.max_prompt_length,
        max_response_length=recipe.data.max_response_length,
    )
    logits = torch.tensor([score.logit for score in record.scores])
    metrics |= {"score/logit_mean": float(logits.mean()), "score/logit_std": float(logits.std(correction=0))}
    metrics |= model_metrics([score.model_logits for score in record.scores], sequences.group_ids)
    metrics |= text_metrics(
        rollout.texts,
        [row.kind for row in record.prompts for _ in range(n)],
        [row.messages[-1]["content"] for row in record.prompts for _ in range(n)],
    )
    metrics["rollout/entropy"] = -float(rollout.rollout_logprobs.sum() / mask.sum().clamp(min=1))
    # an end token alone is no reply either
    metrics["response/aborted_ratio"] = sum(not text.strip() for text in rollout.texts) / len(rollout.texts)
    metrics |= {"actor/reward_kl_penalty_coeff": kl_coef}
    if record.old_logprobs is not None:
        gap = (record.old_logprobs - rollout.rollout_logprobs).abs() * mask
        metrics["rollout/logprob_gap_mean"] = float(gap.sum() / mask.sum().clamp(min=1))
        metrics["rollout/logprob_gap_max"] = float(gap.max())
    metrics |= record.update
    replies, whole = int(mask.sum()), int(prompt_lengths.sum())
    metrics |= timing_metrics(record.seconds, num_prompt_tokens=whole, num_response_tokens=replies)
    metrics |= throughput_metrics(total_num_tokens=whole + replies, seconds=record.seconds["step"])
    return metrics | {"training/global_step": float(number), "training/epoch": epoch}
