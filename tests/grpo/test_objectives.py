"""Components of the reward: how they are combined, where the order matters, and the multiplier at a known optimum."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_batches import Batch, batches
from ups_rm.grpo import (
    Component,
    Lagrange,
    batch_totals,
    combine,
    group_advantages,
    overlong_penalty,
    policy_loss,
)
from ups_rm.grpo.advantages import leave_one_out_advantages
from ups_rm.objective import Objective
from ups_rm.recipe import OverlongBuffer, load_recipe
from ups_rm.types import Score


def components_of(batch: Batch, seed: int, weights: tuple[float, float]) -> dict[str, Component]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [3.0 * torch.randn(len(batch.group_ids), generator=generator, dtype=torch.float64) for _ in weights]
    names = ("safety", "helpfulness")
    return {
        name: Component(reward, torch.full_like(reward, weight))
        for name, reward, weight in zip(names, drawn, weights, strict=True)
    }


def placed(rewards: Tensor, mask: Tensor) -> Tensor:
    """One reward per reply on its first token; a reply without a token keeps none."""
    out = torch.zeros(mask.shape, dtype=rewards.dtype)
    out[:, 0] = rewards
    return out


@given(batches(), st.integers(0, 1000), st.sampled_from([(1.0, 0.0), (0.3, 0.7), (2.0, 1.0)]), st.booleans())
@settings(deadline=None)
def test_after_is_grpo_of_the_weighted_mean(
    batch: Batch, seed: int, weights: tuple[float, float], scale_by_std: bool
) -> None:
    components, charge = components_of(batch, seed, weights), batch.safe_score
    combined = combine(components, charge, batch.mask, batch.group_ids, order="after", scale_by_std=scale_by_std)
    reward = sum(w * c.reward for w, c in zip(weights, components.values(), strict=True)) / sum(weights) - charge
    torch.testing.assert_close(combined.rewards, reward)
    expected = group_advantages(
        placed(reward, batch.mask), torch.ones_like(batch.mask), batch.group_ids, scale_by_std=scale_by_std
    )
    torch.testing.assert_close(combined.advantages, expected * batch.mask, atol=1e-9, rtol=1e-9)


@given(batches(), st.integers(0, 1000), st.sampled_from([(1.0, 0.0), (0.3, 0.7), (2.0, 1.0)]))
@settings(deadline=None)
def test_before_is_the_weighted_mean_of_each_components_own_advantages(
    batch: Batch, seed: int, weights: tuple[float, float]
) -> None:
    components, charge = components_of(batch, seed, weights), batch.safe_score
    combined = combine(components, charge, batch.mask, batch.group_ids, order="before", estimator="rloo")
    everywhere = torch.ones_like(batch.mask)
    own = [
        leave_one_out_advantages(placed(c.reward - charge, batch.mask), everywhere, batch.group_ids)
        for c in components.values()
    ]
    expected = sum(w * a for w, a in zip(weights, own, strict=True)) / sum(weights)
    torch.testing.assert_close(combined.advantages, expected * batch.mask, atol=1e-9, rtol=1e-9)
    for name, advantages in zip(components, own, strict=True):
        torch.testing.assert_close(combined.parts[name], advantages[:, 0], atol=1e-9, rtol=1e-9)


def test_the_order_decides_whether_a_large_scale_drowns_a_small_one() -> None:
    """Safety differs by a tenth, helpfulness by tens and the other way round: normalised afterwards, helpfulness
    decides alone; normalised first, equal weights weigh equally, and the two cancel to nothing."""
    ids, mask, free = torch.zeros(2, dtype=torch.long), torch.ones(2, 1), torch.zeros(2)
    weight = torch.full((2,), 0.5)
    components = {
        "safety": Component(torch.tensor([0.6, 0.5]), weight),
        "helpfulness": Component(torch.tensor([-20.0, 20.0]), weight),
    }
    after = combine(components, free, mask, ids, order="after").advantages[:, 0]
    before = combine(components, free, mask, ids, order="before").advantages[:, 0]
    torch.testing.assert_close(after, torch.tensor([-1.0, 1.0]) / math.sqrt(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(before, torch.zeros(2), atol=1e-4, rtol=0)


def test_a_weight_of_nothing_frees_the_prompts_it_stands_on() -> None:
    """The constraint on unsafe prompts only: on the harmless one the advantage is that of helpfulness alone."""
    ids, mask, free = torch.tensor([0, 0, 1, 1]), torch.ones(4, 3), torch.zeros(4)
    helpful = torch.tensor([1.0, 2.0, 1.0, 2.0])
    components = {
        "safety": Component(torch.tensor([5.0, -5.0, 5.0, -5.0]), torch.tensor([9.0, 9.0, 0.0, 0.0])),
        "helpfulness": Component(helpful, torch.ones(4)),
    }
    for order in ("before", "after"):
        advantages = combine(components, free, mask, ids, order=order).advantages
        torch.testing.assert_close(advantages[2:], group_advantages(placed(helpful, mask), mask, ids)[2:])
        assert advantages[0, 0] > 0 > advantages[1, 0], "where it binds, the safe reply is the better one"


def test_a_component_that_does_not_differ_gives_nothing_and_not_noise() -> None:
    ids, mask, free = torch.zeros(4, dtype=torch.long), torch.ones(4, 1), torch.zeros(4)
    rounding = torch.tensor([0.3, 0.3 + 3e-8, 0.3, 0.3])
    one = torch.ones(4)
    components = {"safety": Component(rounding, one), "helpfulness": Component(torch.arange(4.0), one)}
    combined = combine(components, free, mask, ids, tolerance=1e-6)
    assert combined.parts["safety"].eq(0).all()
    assert not combined.flat.any()
    components["helpfulness"] = Component(torch.ones(4), one)
    assert combine(components, free, mask, ids, tolerance=1e-6).flat.all()
    with pytest.raises(ValueError, match="reply 0 has no component"):
        combine({"safety": Component(one, 0 * one)}, free, mask, ids)
    with pytest.raises(ValueError, match="between"):
        combine(components, free, mask, ids, order="between")


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    st.floats(-5, 5),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_the_multiplier_follows_its_formula(costs: list[float], limit: float, lr: float, warmup: int) -> None:
    lagrange = Lagrange(value=1.0, limit=limit, lr=lr, least=0.1, most=10.0, warmup=warmup)
    log = 0.0
    for i, cost in enumerate(costs):
        lagrange.update(cost)
        if i >= warmup:
            log = min(max(log + lr * (cost - limit), math.log(0.1)), math.log(10.0))
        assert lagrange.value == pytest.approx(math.exp(log))
    lagrange.update(math.nan)
    assert lagrange.value == pytest.approx(math.exp(log)), "a batch without a prompt that it binds on moves nothing"


def test_the_overlong_penalty_begins_at_the_buffer_and_ends_at_the_factor() -> None:
    lengths = torch.tensor([0, 60, 80, 90, 100])
    found = overlong_penalty(lengths, max_length=100, buffer=20, factor=0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, -0.25, -0.5]))


# ---- the constrained optimum of a bandit

HELPFUL = torch.tensor([1.0, 0.0, 0.3])
COST = torch.tensor([2.0, -1.0, -2.0])
KL_COEF = 0.25
LIMIT = 0.0


def best_policy(weight: float) -> Tensor:
    """argmax of E[(h - lambda c) / (1 + lambda)] - KL_COEF KL(p || uniform)."""
    return torch.softmax((HELPFUL - weight * COST) / ((1 + weight) * KL_COEF), dim=0)


def analytic_lambda() -> float:
    """Where the best policy's mean cost is the limit: it falls with lambda, so by bisection."""
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(best_policy(middle) @ COST) > LIMIT else (low, middle)
    return low


def test_a_bandit_converges_to_the_constrained_optimum_and_lambda_to_its_analytic_value() -> None:
    """One prompt, three replies of one token; GRPO with our advantages, loss and dual ascent against the closed form.

    Without the constraint the policy would take the costly arm 0.93 of the time; the optimum takes it 0.48.
    """
    expected = analytic_lambda()
    assert 0.1 < expected < 5.0
    assert [round(float(best_policy(weight)[0]), 2) for weight in (0.0, expected)] == [0.93, 0.48]
    assert float(best_policy(0.0) @ COST) > 1.0, "the constraint must bind for this test to mean anything"
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    lagrange = Lagrange(value=1.0, limit=LIMIT, lr=0.02, least=1e-3, most=1e3)
    n = 256
    ids, mask = torch.zeros(n, dtype=torch.long), torch.ones(n, 1, dtype=torch.long)
    policies, multipliers = [], []
    for step in range(1500):
        logp = torch.log_softmax(logits, 0)
        arms = torch.multinomial(logp.exp().detach(), n, replacement=True, generator=generator)
        logprobs = logp[arms].unsqueeze(1)  # (n, 1)
        charge = KL_COEF * (logprobs.detach().squeeze(1) + math.log(3))  # k1 against the uniform reference
        components = {
            "safety": Component(-COST[arms], torch.full((n,), lagrange.value)),
            "helpfulness": Component(HELPFUL[arms], torch.ones(n)),
        }
        combined = combine(components, charge, mask, ids, order="after", scale_by_std=False)
        loss = policy_loss(logprobs.detach(), logprobs, combined.advantages, mask, **batch_totals(mask)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lagrange.update(float(COST[arms].mean()))
        if step >= 1000:
            policies.append(logp.exp().detach())
            multipliers.append(lagrange.value)
    policy = torch.stack(policies).mean(0)
    torch.testing.assert_close(policy, best_policy(expected), atol=0.02, rtol=0)
    assert float(policy @ COST) == pytest.approx(LIMIT, abs=0.05)
    assert sum(multipliers) / len(multipliers) == pytest.approx(expected, rel=0.05)
    assert max(multipliers) - min(multipliers) < 0.3 * expected, "it has settled"


def test_with_the_recommended_recipe_mean_cost_over_time_is_the_limit() -> None:
    """The same bandit through `Objective`, as `recipes/constrained.yaml` has it: components over their group's std.

    Where the two pull in opposite directions such advantages are steep at lambda = 1, so lambda swings about it and the
    policy with it; what it costs on average is the limit.
    """
    algorithm = load_recipe("constrained").algorithm
    algorithm.constraint.prompts, algorithm.constraint.cost_limit, algorithm.constraint.lambda_lr = "all", LIMIT, 0.02
    algorithm.kl_ctrl.kl_coef = 0.1  # these arms are closer together than logits of replies
    objective = Objective(algorithm, OverlongBuffer(), max_response_length=1)
    assert (algorithm.normalize_components, algorithm.norm_adv_by_std_in_grpo) == ("before", True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    prompts, n = 64, 4
    ids, mask = torch.arange(prompts).repeat_interleave(n), torch.ones(prompts * n, 1, dtype=torch.long)
    benign = torch.zeros(prompts * n, dtype=torch.bool)
    costs, helpful, multipliers = [], [], []
    for step in range(900):
        logp = torch.log_softmax(logits, 0)
        arms = torch.multinomial(logp.exp().detach(), prompts * n, replacement=True, generator=generator)
        scores = [
            Score(cost, 1 / (1 + math.exp(cost)), 1, False, helpfulness=worth)
            for cost, worth in zip(COST[arms].tolist(), HELPFUL[arms].tolist(), strict=True)
        ]
        placed = torch.tensor([score.safe_score for score in scores])
        logprobs = logp[arms].unsqueeze(1)  # (B, 1)
        charged = placed[:, None] - algorithm.kl_ctrl.kl_coef * (logprobs.detach() + math.log(3))
        found = objective.worth(scores, benign, placed, charged, mask, ids)
        loss = policy_loss(logprobs.detach(), logprobs, found.advantages, mask, **batch_totals(mask)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(found.metrics)
        if step >= 450:
            costs.append(float(logp.exp().detach() @ COST))
            helpful.append(float(logp.exp().detach() @ HELPFUL))
            multipliers.append(found.metrics["objective/lambda"])
    assert fmean(costs) == pytest.approx(LIMIT, abs=0.05)
    assert fmean(helpful) > 0.6, "the best mixture of mean cost 0 has 0.65, the even one, of cost -0.33, 0.43"
    assert min(multipliers) < 1 < max(multipliers), "over their stds, the sign turns at 1"
