"""grpo/ against plain Python loops, and the properties that no oracle states. Needs no extra."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_batches import EDGE_CASES, Batch, batches, make_batch
from ups_rm.grpo import (
    ADVANTAGES,
    LOSS_AGG_MODES,
    aggregate,
    batch_totals,
    group_advantages,
    kl_penalty,
    masked_mean,
    penalize,
    place_on_last_token,
    policy_loss,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
edge_cases = pytest.mark.parametrize("batch", EDGE_CASES.values(), ids=EDGE_CASES.keys())


def close(ours: Tensor, expected: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype), atol=1e-6, rtol=1e-6)


# ---- rewards


@given(batches())
@patient
def test_the_score_stands_on_the_last_token_and_nowhere_else(batch: Batch) -> None:
    placed = place_on_last_token(batch.safe_score, batch.mask)
    for row, length in enumerate(batch.mask.sum(-1).tolist()):
        expected = [0.0] * batch.mask.shape[1]
        if length:
            expected[length - 1] = float(batch.safe_score[row])
        assert placed[row].tolist() == expected


def test_padding_on_the_left_holes_and_masks_of_bool() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    placed = place_on_last_token(torch.tensor([0.25, 0.5, 0.75]), mask.bool())
    assert placed.tolist() == [[0, 0, 0, 0.25], [0, 0, 0.5, 0], [0, 0, 0, 0]]
    assert place_on_last_token(torch.ones(2), torch.zeros(2, 0)).shape == (2, 0)


def test_a_score_that_is_not_a_number_stays_in_its_row() -> None:
    placed = place_on_last_token(torch.tensor([math.nan, 0.5]), torch.tensor([[1, 0], [1, 1]]))
    assert placed[0].isnan().tolist() == [True, False]
    assert placed[1].tolist() == [0, 0.5]


def test_penalty_counts_response_tokens_only() -> None:
    scores, mask = torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([[1, 1, 0]])
    rewards = penalize(scores, torch.tensor([[0.25, -0.5, math.nan]]), mask, 0.5)
    assert rewards.tolist() == [[-0.125, 0.75, 0.0]]


# ---- advantages


def loop_advantages(batch: Batch, scale_by_std: bool, eps: float) -> list[list[float]]:
    rewards = [sum(row) for row in batch.token_level_rewards.tolist()]
    ids = batch.group_ids.tolist()
    result = []
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in range(len(rewards)) if ids[j] == ids[i]]
        mean = statistics.fmean(group) if len(group) > 1 else 0.0
        std = statistics.stdev(group) if len(group) > 1 else 1.0
        advantage = (reward - mean) / (std + eps) if scale_by_std else reward - mean
        result.append([advantage * m for m in batch.mask[i].tolist()])
    return result


@given(batches(), st.booleans(), st.sampled_from([1e-6, 1e-4]))
@patient
def test_group_advantages_equal_a_loop(batch: Batch, scale_by_std: bool, eps: float) -> None:
    ours = group_advantages(batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std, eps=eps)
    close(ours, loop_advantages(batch, scale_by_std, eps))


@edge_cases
def test_group_advantages_equal_a_loop_at_the_edges(batch: Batch) -> None:
    close(group_advantages(batch.token_level_rewards, batch.mask, batch.group_ids), loop_advantages(batch, True, 1e-6))


def test_a_group_of_one_keeps_its_reward_and_a_group_of_equals_gets_nothing() -> None:
    rewards, mask = torch.tensor([[0.5], [0.25], [0.25]]), torch.ones(3, 1)
    advantages = group_advantages(rewards, mask, torch.tensor([0, 1, 1]))
    assert advantages[0].item() == pytest.approx(0.5 / (1 + 1e-6), abs=1e-7)
    assert advantages[1:].eq(0).all()


@pytest.mark.parametrize("name", ADVANTAGES)
@given(data=st.data())
@patient
def test_the_order_of_the_replies_does_not_matter(name: str, data: st.DataObject) -> None:
    batch = data.draw(batches(min_group=2))
    order = torch.tensor(data.draw(st.permutations(range(len(batch.mask)))))
    plain = ADVANTAGES[name](batch.token_level_rewards, batch.mask, batch.group_ids)
    shuffled = ADVANTAGES[name](batch.token_level_rewards[order], batch.mask[order], batch.group_ids[order])
    if name == "grpo_passk":  # among equal best replies the first is taken: compare what the group gets
        for group in batch.group_ids.unique():
            rows, moved = batch.group_ids == group, batch.group_ids[order] == group
            if bool(batch.mask[rows].bool().all()):
                close(shuffled[moved].sum(), plain[rows].sum())
    else:
        close(shuffled, plain[order])


@given(batches(min_group=2), st.floats(-3, 3), st.floats(0.5, 4))
@patient
def test_only_the_place_within_the_group_counts(batch: Batch, shift: float, scale: float) -> None:
    """Adding to all rewards or stretching them changes nothing (up to eps), as long as a group has any spread."""
    rewards = batch.token_level_rewards.sum(-1, keepdim=True)  # one column
    mask = torch.ones_like(rewards)
    plain = group_advantages(rewards, mask, batch.group_ids, eps=0.0)
    moved = group_advantages(scale * rewards + shift, mask, batch.group_ids, eps=0.0)
    for group in batch.group_ids.unique():
        rows = batch.group_ids == group
        if float(rewards[rows].std()) > 1e-3:
            close(moved[rows], plain[rows])
            assert float(plain[rows].sum()) == pytest.approx(0, abs=1e-9)
            assert float(plain[rows].std()) == pytest.approx(1, abs=1e-9)


def test_advantages_carry_no_gradient() -> None:
    batch = EDGE_CASES["empty response"]
    rewards = batch.token_level_rewards.clone().requires_grad_()
    for name in ADVANTAGES:
        assert not ADVANTAGES[name](rewards, batch.mask, batch.group_ids).requires_grad, name


def test_pass_at_k_needs_two_replies_and_says_which_prompt_has_one() -> None:
    with pytest.raises(ValueError, match="group 4 has 1"):
        ADVANTAGES["grpo_passk"](torch.ones(1, 1), torch.ones(1, 1), torch.tensor([4]))


# ---- KL

LOOPS = {
    "k1": lambda d: d,
    "abs": abs,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: min(math.exp(-d) - 1 + d, 10.0),
}
SYNONYMS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


@given(st.floats(-15, 0), st.floats(-15, 0))
def test_kl_equals_its_formula(logprob: float, ref_logprob: float) -> None:
    ours, ref = torch.tensor([[logprob]], dtype=torch.float64), torch.tensor([[ref_logprob]], dtype=torch.float64)
    for name, formula in LOOPS.items():
        expected = formula(logprob - ref_logprob)
        assert float(kl_penalty(ours, ref, name)) == pytest.approx(expected, abs=1e-6), name
        assert float(kl_penalty(ours, ref, name + "+")) == pytest.approx(expected, abs=1e-6), name
    for name, same in SYNONYMS.items():
        assert torch.equal(kl_penalty(ours, ref, name), kl_penalty(ours, ref, same))


def test_plus_has_the_value_of_its_estimator_and_the_gradient_of_k2() -> None:
    ref = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    for name in LOOPS:
        logprobs = torch.tensor([[-1.5, -0.3, -0.5]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(kl_penalty(logprobs, ref, name + "+").sum(), logprobs)
        close(gradient, (logprobs - ref).detach())


def test_k1_and_k3_estimate_the_true_kl() -> None:
    """Over samples of the policy their mean is the KL of two known distributions (0.2% of 400,000 draws)."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    tokens = torch.multinomial(p, 400_000, replacement=True, generator=generator)
    truth = float((p * (p / q).log()).sum())
    for name in ("k1", "k3"):
        estimate = kl_penalty(p.log()[tokens], q.log()[tokens], name).mean()
        assert float(estimate) == pytest.approx(truth, abs=4e-3), name


def test_an_unknown_estimator_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r'"k4" is not a KL estimator; known: kl, k1'):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


# ---- loss


def loop_token_losses(batch: Batch, low: float, high: float, c: float) -> list[list[float]]:
    def one(old: float, new: float, advantage: float) -> float:
        ratio = math.exp(min(max(new - old, -20.0), 20.0))
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
        return min(loss, -advantage * c) if advantage < 0 else loss

    rows = zip(batch.old_logprobs.tolist(), batch.logprobs.tolist(), batch.advantages.tolist(), strict=True)
    return [[one(*token) for token in zip(*row, strict=True)] for row in rows]


def loop_aggregate(losses: list[list[float]], mask: list[list[int]], mode: str, scale: float) -> float:
    kept = [[loss for loss, m in zip(*row, strict=True) if m] for row in zip(losses, mask, strict=True)]
    filled = [row for row in kept if row]
    if mode == "token-mean":
        return sum(map(sum, filled)) / sum(map(len, filled))
    if mode == "token-sum":
        return float(sum(map(sum, filled)))
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in filled) / len(filled)
    total = sum(map(sum, filled)) / len(filled)
    return total / scale if mode == "seq-mean-token-sum-norm" else total


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@edge_cases
def test_policy_loss_equals_a_loop(batch: Batch, mode: str) -> None:
    ours = policy_loss(
        batch.old_logprobs,
        batch.logprobs,
        batch.advantages,
        batch.mask,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.0,
        loss_agg_mode=mode,
    )
    losses = loop_token_losses(batch, 0.1, 0.3, 2.0)
    close(ours.loss, loop_aggregate(losses, batch.mask.tolist(), mode, batch.mask.shape[1]))


def test_clipping_by_hand() -> None:
    """Ratio 2 and advantage 1: clipped to 1.2. Ratio 0.5 and -1: clipped to 0.8. Ratio 5 and -1: held at 3."""
    ratios, advantages = torch.tensor([[2.0, 0.5, 5.0, 1.0]]), torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss = policy_loss(torch.zeros(1, 4), ratios.log(), advantages, torch.ones(1, 4), loss_agg_mode="token-sum")
    assert float(loss.loss) == pytest.approx(-1.2 + 0.8 + 3.0 - 1.0, abs=1e-6)
    assert float(loss.clipfrac) == pytest.approx(2 / 4)
    assert float(loss.clipfrac_lower) == pytest.approx(1 / 4)
    assert float(loss.ppo_kl) == pytest.approx(-sum(math.log(r) for r in (2, 0.5, 5, 1)) / 4, abs=1e-6)
    assert int(loss.num_tokens) == 4


def test_on_policy_the_gradient_is_plain_policy_gradient() -> None:
    batch = make_batch([3, 2], [0, 0], 3)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss = policy_loss(batch.old_logprobs, logprobs, batch.advantages, batch.mask).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    close(gradient, -batch.advantages * batch.mask / 5)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@given(batch=batches(), data=st.data())
@patient
def test_micro_batches_add_up_to_the_whole(mode: str, batch: Batch, data: st.DataObject) -> None:
    """However the mini batch is cut, and each part trimmed to its own longest reply: same loss, gradient, shares."""
    whole = batch.logprobs.clone().requires_grad_()
    uncut = policy_loss(
        batch.old_logprobs, whole, batch.advantages, batch.mask, loss_agg_mode=mode, **batch_totals(batch.mask)
    )
    parts = batch.logprobs.clone().requires_grad_()
    part_of = torch.tensor([data.draw(st.integers(0, 2)) for _ in batch.mask])
    totals: dict[str, Any] = {**batch_totals(batch.mask), "loss_scale_factor": batch.mask.shape[1]}
    loss, clipped = torch.zeros((), dtype=torch.float64), 0.0
    for part in range(3):
        rows = torch.nonzero(part_of == part).squeeze(-1)
        if len(rows) == 0:
            continue
        width = int(batch.mask[rows].sum(-1).max())
        result = policy_loss(
            batch.old_logprobs[rows, :width],
            parts[rows, :width],
            batch.advantages[rows, :width],
            batch.mask[rows, :width],
            loss_agg_mode=mode,
            **totals,
        )
        loss = loss + result.loss
        clipped += float(result.clipfrac) * float(result.num_tokens) / totals["batch_num_tokens"]
    close(loss.detach(), uncut.loss.detach())
    close(torch.autograd.grad(loss, parts)[0], torch.autograd.grad(uncut.loss, whole)[0])
    assert clipped == pytest.approx(float(uncut.clipfrac), abs=1e-6)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_what_stands_outside_the_mask_counts_for_nothing(mode: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, -7.0]])
    clean = torch.where(mask.bool(), loss, 0.0)
    assert float(aggregate(loss, mask, mode)) == float(aggregate(clean, mask, mode))
    assert float(aggregate(loss, mask.bool(), mode)) == float(aggregate(clean, mask.float(), mode))


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_batch_of_empty_replies_has_no_loss(mode: str) -> None:
    zeros = torch.zeros(2, 3)
    assert float(aggregate(torch.ones(2, 3), zeros, mode, **batch_totals(zeros))) == 0
    assert float(aggregate(torch.ones(2, 3), zeros, mode)) == 0


def test_an_unknown_mode_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r'"mean" is not a loss_agg_mode; known: token-mean, token-sum'):
        aggregate(torch.ones(1, 1), torch.ones(1, 1), "mean")


def test_masked_mean_of_nothing_is_zero() -> None:
    assert float(masked_mean(torch.tensor([math.nan]), torch.tensor([0]))) == 0
