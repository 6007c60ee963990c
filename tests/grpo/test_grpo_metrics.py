"""Our own metrics, checked by hand; verl's are checked against verl in tests/oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo_batches import make_batch
from ups_rm.grpo import place_on_last_token, rollout_metrics, throughput_metrics, timing_metrics


def metrics_of(safe_score: list[float], group_ids: list[int], **more: Any) -> dict[str, float]:
    scores = torch.tensor(safe_score)
    mask = more.pop("mask", torch.ones(len(scores), 3))
    placed = place_on_last_token(scores, mask)
    return rollout_metrics(
        token_level_scores=placed,
        token_level_rewards=more.pop("rewards", placed),
        advantages=placed,
        response_mask=mask,
        prompt_lengths=torch.tensor([5] * len(scores)),
        group_ids=torch.tensor(group_ids),
        safe_score=scores,
        **more,
    )


def test_groups_without_spread_are_counted() -> None:
    metrics = metrics_of([0.5, 0.5, 0.4, 0.404, 0.1, 0.9, 0.7], [0, 0, 1, 1, 2, 2, 3])
    assert metrics["group/zero_std_share"] == pytest.approx(1 / 3)  # group 3 has one reply: no std, not counted
    assert metrics["group/low_std_share"] == pytest.approx(2 / 3)
    stds = (0.0, math.sqrt(2) * 0.002, math.sqrt(2) * 0.4)
    assert metrics["group/std_mean"] == pytest.approx(sum(stds) / 3, abs=1e-6)


def test_only_groups_of_one_have_no_std_at_all() -> None:
    metrics = metrics_of([0.5, 0.6], [0, 1])
    assert math.isnan(metrics["group/zero_std_share"])
    assert math.isnan(metrics["group/std_mean"])
    assert math.isnan(metrics_of([0.5], [0])["score/std"])


def test_saturation_counts_both_ends() -> None:
    assert metrics_of([0.001, 0.5, 0.995, 0.98], [0, 0, 1, 1])["score/saturated_share"] == 0.5


def test_scores_by_kind_of_prompt() -> None:
    metrics = metrics_of([0.2, 0.4, 0.9, 0.7], [0, 0, 1, 1], benign=torch.tensor([False, False, True, True]))
    assert metrics["score/mean_unsafe_prompts"] == pytest.approx(0.3)
    assert metrics["score/mean_benign_prompts"] == pytest.approx(0.8)
    assert "score/mean_benign_prompts" not in metrics_of([0.2], [0])


def test_kl_per_token_and_per_reply() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.8, math.nan, 9.0], [9.0, 9.0, 9.0]])
    metrics = metrics_of([0.1, 0.2, 0.3], [0, 0, 0], mask=mask, kl=kl)
    assert metrics["kl/mean"] == pytest.approx(1.4 / 4)
    assert metrics["kl/seq_mean"] == pytest.approx((0.6 + 0.8 + 0.0) / 3)
    assert metrics["kl/seq_max"] == pytest.approx(0.8)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx((0.2 + 0.8 + 0.0) / 3)


def test_an_empty_reply_is_scored_but_not_rewarded() -> None:
    metrics = metrics_of([0.9, 0.5], [0, 0], mask=torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert metrics["critic/score/mean"] == 0.5
    assert metrics["reward/mean"] == 0.5
    assert metrics["response/aborted_ratio"] == 0.5
    assert metrics["score/std"] == pytest.approx(0.4 / math.sqrt(2))


def test_limits_say_what_was_clipped() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert metrics_of([0.1, 0.2], [0, 0], mask=mask)["response_length/clip_ratio"] == 0.5
    assert metrics_of([0.1, 0.2], [0, 0], mask=mask, max_response_length=4)["response_length/clip_ratio"] == 0
    assert metrics_of([0.1, 0.2], [0, 0], max_prompt_length=5)["prompt_length/clip_ratio"] == 1
    assert metrics_of([0.1, 0.2], [0, 0], max_prompt_length=6)["prompt_length/clip_ratio"] == 0


def test_every_value_is_a_python_float() -> None:
    batch = make_batch([3, 0, 2, 1], [0, 0, 1, 1], 3)
    metrics = metrics_of(
        [0.1, 0.2, 0.3, 0.4],
        [0, 0, 1, 1],
        mask=batch.mask,
        kl=batch.logprobs,
        truncated=torch.tensor([1, 0, 0, 0]),
        rm_truncated=torch.tensor([0, 0, 0, 1]),
        benign=torch.tensor([1, 1, 0, 0]),
    )
    metrics |= timing_metrics({"gen": 1.0, "step": 2.0}, num_prompt_tokens=10, num_response_tokens=0)
    metrics |= throughput_metrics(total_num_tokens=10, seconds=2.0)
    assert all(type(value) is float for value in metrics.values())
    assert metrics["timing_per_token_ms/gen"] == 0.0
    assert metrics["response/truncated_share"] == 0.25
