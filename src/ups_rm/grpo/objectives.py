"""Several things to be good at: the components of a reward, how they become one advantage, the Lagrange multiplier.

A component is a number per reply, higher = better: `safety` and `helpfulness` here. Each is charged what the reply
costs elsewhere (KL, length) and has a weight per reply, so that a constraint may bind on some prompts only.

    after:  A = estimate( sum_k w_k r_k / sum_k w_k - charge )
    before: A = sum_k w_k estimate( r_k - charge ) / sum_k w_k

`before` is GDPO's order (arXiv:2601.05242): a component whose scale is large, or whose replies hardly differ, does not
drown the other. GDPO also whitens the sum over the batch, which is left out: it would undo what `cost_limit` weighs.

Constrained (Safe RLHF, arXiv:2310.12773): maximise helpfulness subject to mean cost <= limit, cost being the unsafety
logit. With r_safety = -cost, weights 1 and lambda, the sum above is its (A_r - lambda A_c) / (1 + lambda).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ups_rm.grpo.advantages import estimate_advantages
from ups_rm.grpo.groups import flat_groups

ORDERS = ("before", "after")
"""When components are normalised within their group: before they are combined, or after."""


@dataclass(frozen=True)
class Component:
    """What each reply is worth in one respect (B,), and how much that counts for it (B,), at least 0."""

    reward: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Combined:
    """Several components as one.

    Attributes:
        rewards: weighted mean of the components, less the charge. Shape (B,).
        advantages: 0 outside the response mask, and where `flat`. Shape (B, R).
        parts: the advantage that each component gives by itself. Shape (B,) each.
        components: what they were made of.
        charge: what was taken off. Shape (B,).
        flat: nothing that counts differs within the reply's group. Shape (B,), bool.
    """

    rewards: Tensor
    advantages: Tensor
    parts: dict[str, Tensor]
    components: Mapping[str, Component]
    charge: Tensor
    flat: Tensor


@torch.no_grad()
def combine(
    components: Mapping[str, Component],
    charge: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    *,
    order: str = "before",
    estimator: str = "grpo",
    scale_by_std: bool = True,
    tolerance: float = 0.0,
) -> Combined:
    """One advantage per reply from several components; the formulas stand above.

    Args:
        components: by name; within a group a component has one weight, and some weight is above 0.
        charge: taken off every component's reward. Shape (B,).
        response_mask: Shape (B, R).
        group_ids: Shape (B,).
        order: `before` or `after`.
        estimator, scale_by_std: see `estimate_advantages`.
        tolerance: a group whose rewards have a std up to this has advantages of 0, and not rounding over 1e-6.

    Raises:
        ValueError: another order, or all weights of a reply are 0.
    """
    if order not in ORDERS:
        raise ValueError(f'"{order}" is not an order of normalisation; known: {", ".join(ORDERS)}')
    total = torch.stack([component.weight for component in components.values()]).sum(0)  # (B,)
    if bool((total <= 0).any()):
        raise ValueError(f"reply {int((total <= 0).nonzero()[0])} has no component of weight above 0")
    one = response_mask.new_ones((len(group_ids), 1), dtype=charge.dtype)  # one token per reply
    everyone = torch.ones_like(group_ids, dtype=torch.bool)

    def advantages_of(rewards: Tensor) -> tuple[Tensor, Tensor]:
        flat = flat_groups(rewards, group_ids, everyone, tolerance)
        mask = response_mask if estimator == "opo" else one  # opo weighs by length
        placed = torch.zeros_like(mask, dtype=rewards.dtype)
        placed[:, 0] = rewards
        found = estimate_advantages(estimator, placed, mask, group_ids, scale_by_std=scale_by_std)
        per_reply = found.gather(1, mask.bool().long().argmax(1, keepdim=True)).squeeze(1)
        return torch.where(flat, torch.zeros_like(per_reply), per_reply), flat

    rewards = sum((c.weight * c.reward for c in components.values()), torch.zeros_like(charge)) / total - charge
    own = {name: advantages_of(component.reward - charge) for name, component in components.items()}
    parts = {name: advantages for name, (advantages, _) in own.items()}
    if order == "after":
        advantages, flat = advantages_of(rewards)
    else:
        advantages = sum((c.weight * parts[k] for k, c in components.items()), torch.zeros_like(charge)) / total
        flat = everyone.clone()
        for name, component in components.items():
            flat &= own[name][1] | (component.weight == 0)
    return Combined(rewards, advantages.unsqueeze(-1) * response_mask, parts, components, charge, flat)


@dataclass
class Lagrange:
    """The multiplier of `mean cost <= limit`, steered by dual ascent on its logarithm.

        log lambda <- clip(log lambda + lr * (mean cost - limit), log least, log most)

    The multiplicative form keeps lambda positive. Safe RLHF (arXiv:2310.12773, appendix B.2) has another factor lambda
    in the step, the derivative with respect to log lambda; it is left out, because with it a small lambda hardly rises
    when replies turn unsafe. Fixed points are the same: mean cost = limit, or lambda at a bound.

    Attributes:
        value: lambda.
        limit: the largest mean cost that is allowed, in the cost's unit (logits).
        lr: step on log lambda per unit of cost.
        least, most: bounds of lambda, both above 0.
        warmup: so many updates leave lambda alone.
    """

    value: float
    limit: float
    lr: float
    least: float
    most: float
    warmup: int = 0
    updates: int = 0

    def update(self, mean_cost: float) -> None:
        """After a batch whose replies (those that the constraint binds on) cost `mean_cost` on average."""
        self.updates += 1
        if self.updates <= self.warmup or not math.isfinite(mean_cost):
            return
        log = math.log(self.value) + self.lr * (mean_cost - self.limit)
        self.value = math.exp(min(max(log, math.log(self.least)), math.log(self.most)))
