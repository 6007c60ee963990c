"""What replies are worth by `algorithm.objective`: from scores and charged rewards to advantages, for both engines.

The mathematics is in `grpo/`; here scores become components, and the constraint's multiplier is steered and logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ups_rm.errors import RMError
from ups_rm.grpo import (
    Combined,
    Component,
    Lagrange,
    combine,
    estimate_advantages,
    overlong_penalty,
    place_on_last_token,
)
from ups_rm.recipe import Algorithm, OverlongBuffer
from ups_rm.types import Score

SAFETY, HELPFULNESS = "safety", "helpfulness"


@dataclass(frozen=True)
class Worth:
    """What B replies of up to R tokens are worth.

    Attributes:
        rewards: what the advantages are made of; of several components their weighted mean. Shape (B, R).
        advantages: 0 outside the response mask. Shape (B, R).
        combined: where the objective has several components.
        metrics: of the objective and the overlong penalty.
    """

    rewards: Tensor
    advantages: Tensor
    combined: Combined | None
    metrics: dict[str, float]


class Objective:
    """What a batch's scores are worth by `algorithm.objective`.

    Args:
        algorithm, overlong: the recipe's.
        max_response_length: tokens.

    Attributes:
        lagrange: the multiplier; None unless the objective is `constrained`.
    """

    def __init__(self, algorithm: Algorithm, overlong: OverlongBuffer, max_response_length: int) -> None:
        self.algorithm, self.overlong, self.max_response_length = algorithm, overlong, max_response_length
        bound = algorithm.constraint
        self.lagrange = (
            Lagrange(
                value=bound.lambda_init,
                limit=bound.cost_limit,
                lr=bound.lambda_lr,
                least=bound.lambda_min,
                most=bound.lambda_max,
                warmup=bound.warmup_steps,
            )
            if algorithm.objective == "constrained"
            else None
        )

    @property
    def has_components(self) -> bool:
        """False for `safety`, the original: one reward, and no helpfulness is asked for."""
        return self.algorithm.objective != "safety"

    def components(self, scores: Sequence[Score], benign: Tensor) -> dict[str, Component]:
        """Reward and weight of each reply by component.

        Args:
            scores: of B replies, each with a finite logit.
            benign: the prompt is harmless. Shape (B,), bool.

        Raises:
            RMError: a reply without a helpfulness logit.
        """
        helpfulness = torch.tensor(helpfulness_of(scores), device=benign.device)  # (B,)
        one = torch.ones_like(helpfulness)
        if self.lagrange is None:
            weights = self.algorithm.objective_weights
            safe_score = torch.tensor([score.safe_score for score in scores], device=benign.device)
            return {
                SAFETY: Component(safe_score, one * weights.safety),
                HELPFULNESS: Component(helpfulness, one * weights.helpfulness),
            }
        return {
            SAFETY: Component(-self._cost(scores, benign), self.lagrange.value * self._binds(benign).float()),
            HELPFULNESS: Component(helpfulness, one),
        }

    def worth(
        self,
        scores: Sequence[Score],
        benign: Tensor,
        placed: Tensor,
        charged: Tensor,
        response_mask: Tensor,
        group_ids: Tensor,
    ) -> Worth:
        """Rewards and advantages of B replies.

        Args:
            scores: each with a finite logit.
            benign: the prompt is harmless. Shape (B,), bool.
            placed: the score that stands on the reply's last token, 0 where it has none. Shape (B,).
            charged: token-level scores less KL. Shape (B, R).
            response_mask: Shape (B, R). group_ids: Shape (B,).

        Raises:
            RMError: the objective weighs helpfulness and a reply has no such logit.
        """
        algorithm, buffer = self.algorithm, self.overlong
        rewards, metrics = charged, {}
        if buffer.enable:
            longest, lengths = self.max_response_length, response_mask.sum(-1)
            penalty = overlong_penalty(lengths, max_length=longest, buffer=buffer.len, factor=buffer.penalty_factor)
            rewards = rewards + place_on_last_token(penalty, response_mask)
            metrics["reward/overlong_penalty"] = float(penalty.mean())
            metrics["reward/overlong_share"] = float((penalty < 0).float().mean())
        how = {"scale_by_std": algorithm.norm_adv_by_std_in_grpo}
        if not self.has_components:
            advantages = estimate_advantages(algorithm.adv_estimator, rewards, response_mask, group_ids, **how)
            return Worth(rewards, advantages, None, metrics)
        combined = combine(
            self.components(scores, benign),
            placed - rewards.sum(-1),
            response_mask,
            group_ids,
            order=algorithm.normalize_components,
            estimator=algorithm.adv_estimator,
            tolerance=algorithm.zero_std_tolerance,
            **how,
        )
        metrics |= self.metrics(scores, benign, combined)
        return Worth(place_on_last_token(combined.rewards, response_mask), combined.advantages, combined, metrics)

    def mean_cost(self, scores: Sequence[Score], benign: Tensor) -> float:
        """Mean unsafety logit of the replies that the constraint binds on; nan where there are none."""
        binds = self._binds(benign)
        return float(self._cost(scores, benign)[binds].mean()) if bool(binds.any()) else math.nan

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Dual ascent with what the step's replies cost, which its `metrics` say."""
        if self.lagrange is not None:
            self.lagrange.update(metrics["objective/cost_mean"])

    @property
    def state(self) -> dict[str, float]:
        """The multiplier for a checkpoint; empty where the objective has none."""
        return {} if self.lagrange is None else {"value": self.lagrange.value, "updates": self.lagrange.updates}

    def resume(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's multiplier; with other bounds (`--allow-changes`) it is held within those."""
        if self.lagrange is not None and state:
            self.lagrange.value = min(max(float(state["value"]), self.lagrange.least), self.lagrange.most)
            self.lagrange.updates = int(state["updates"])

    def metrics(self, scores: Sequence[Score], benign: Tensor, combined: Combined) -> dict[str, float]:
        """`objective/*` of docs/metrics.md, with the multiplier that the step's advantages were made with."""
        helpfulness = torch.tensor(helpfulness_of(scores), device=benign.device)
        metrics = {"objective/helpfulness_mean": float(helpfulness.mean())}
        for kind, rows in (("unsafe", ~benign), ("benign", benign)):
            if bool(rows.any()):
                metrics[f"objective/{kind}/helpfulness_mean"] = float(helpfulness[rows].mean())
        for name, advantages in combined.parts.items():
            metrics[f"objective/{name}_advantage_mean"] = float(advantages.mean())
            metrics[f"objective/{name}_advantage_max"] = float(advantages.max())
            metrics[f"objective/{name}_advantage_min"] = float(advantages.min())
        parts = list(combined.parts.values())
        metrics["objective/opposed_share"] = float((parts[0] * parts[1] < 0).float().mean())
        if self.lagrange is not None:
            metrics |= {
                "objective/lambda": self.lagrange.value,
                "objective/cost_mean": self.mean_cost(scores, benign),
                "objective/cost_limit": self.lagrange.limit,
            }
        return metrics

    def _binds(self, benign: Tensor) -> Tensor:
        """Replies that the constraint is about. Shape (B,), bool."""
        return ~benign if self.algorithm.constraint.prompts == "unsafe" else torch.ones_like(benign)

    def _cost(self, scores: Sequence[Score], benign: Tensor) -> Tensor:
        return torch.tensor([score.logit for score in scores], device=benign.device)


def helpfulness_of(scores: Sequence[Score]) -> list[float]:
    """Helpfulness logits.

    Raises:
        RMError: a reply has none: no helpfulness model was asked.
    """
    found = [score.helpfulness for score in scores]
    known = [value for value in found if value is not None]
    if len(known) < len(found):
        raise RMError(
            f"{len(found) - len(known)} of {len(found)} replies have no helpfulness logit, which algorithm.objective "
            "weighs\n  fix: an RM folder with two heads (ups-rm rm train --target both), or reward_model.helpfulness"
        )
    return known
