"""`algorithm.objective` and the overlong penalty in verl: an advantage estimator of ours, in verl's own registry.

verl hands an estimator the rewards, the mask and the prompts' ids, but not what else is known of the replies. Our
trainer reads that from verl's TransferQueue before it lets verl compute the advantages, and leaves it here
(`StepObjective.during`), in the same process. What is computed is `ups_rm.objective`, as in the local engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from ups_rm.durable import write_text
from ups_rm.errors import CheckpointError, RunError
from ups_rm.grpo import Combined, Component
from ups_rm.objective import Objective, Worth
from ups_rm.types import Score

ESTIMATOR = "ups_rm"
STATE = "ups_rm_objective.json"
"""In verl's checkpoint folder: the Lagrange multiplier."""


@dataclass(frozen=True)
class Replies:
    """What is known of the B replies of a step, in verl's order; `real` leaves verl's padding rows out (B,)."""

    keys: list[str]
    scores: list[Score]
    benign: Tensor
    placed: Tensor
    """What verl put on the last token: the safe score, 0 for an empty reply. Shape (B,)."""
    real: Tensor


class StepObjective:
    """Advantages of verl's steps by the recipe's objective.

    Attributes:
        worth: what the estimator made of the last step's replies that are no padding; None where it was not asked.
        keys: verl's names of these replies.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._replies: Replies | None = None
        self.worth: Worth | None = None
        self.keys: list[str] = []

    @contextmanager
    def during(self, replies: Replies) -> Iterator[None]:
        """The registered estimator answers for these replies."""
        global _under_way
        self._replies, self.worth, _under_way = replies, None, self
        try:
            yield
        finally:
            self._replies, _under_way = None, None

    def advantages(self, token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Any]) -> Tensor:
        """Advantages (B, R) of the replies of `during`; 0 for padding rows.

        Args:
            token_level_rewards: verl's: the safe score less KL. Shape (B, R).
            response_mask: Shape (B, R).
            index: prompt of each reply, B long.

        Raises:
            RMError: the objective weighs helpfulness and a reply has no such logit.
        """
        replies = self._replies
        assert replies is not None
        real = replies.real
        prompts = [str(prompt) for prompt in index]
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group_ids = torch.tensor([numbers[prompt] for prompt in prompts])[real]
        scores = [score for score, is_real in zip(replies.scores, real.tolist(), strict=True) if is_real]
        self.worth = self.objective.worth(
            scores,
            replies.benign[real],
            replies.placed[real],
            token_level_rewards[real],
            response_mask[real],
            group_ids,
        )
        self.keys = [key for key, is_real in zip(replies.keys, real.tolist(), strict=True) if is_real]
        advantages = torch.zeros_like(token_level_rewards)
        advantages[real] = self.worth.advantages
        return advantages

    def save(self, checkpoint: Path) -> None:
        """Write the multiplier into verl's checkpoint folder; nothing where the objective has none."""
        if self.objective.state:
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_text(checkpoint / STATE, json.dumps(self.objective.state) + "\n")

    def load(self, checkpoint: Path) -> None:
        """Go on with a checkpoint's multiplier.

        Raises:
            CheckpointError: the objective has one and the folder does not say it.
        """
        if self.objective.lagrange is None:
            return
        try:
            state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            self.objective.resume({"value": float(state["value"]), "updates": int(state["updates"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint / STATE}: the multiplier of algorithm.objective=constrained can't be read: {error}\n"
                "  fix: resume from an older checkpoint (trainer.resume_mode=resume_path)"
            ) from error


def in_order(combined: Combined, rows: Tensor) -> Combined:
    """The same replies in another order: `rows` are their places. Shape (B,)."""
    return Combined(
        rewards=combined.rewards[rows],
        advantages=combined.advantages[rows],
        parts={name: values[rows] for name, values in combined.parts.items()},
        components={name: Component(one.reward[rows], one.weight[rows]) for name, one in combined.components.items()},
        charge=combined.charge[rows],
        flat=combined.flat[rows],
    )


_under_way: StepObjective | None = None


@register_adv_est(ESTIMATOR)
def advantages_of_the_step(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray[Any, Any],
    config: Any = None,
    **_: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """verl's estimator `ups_rm`: advantages and returns, which are the same. Shape (B, R) each.

    Raises:
        RunError: there is no step under way: another trainer than ours asks.
    """
    if _under_way is None:
        raise RunError(f"algorithm.adv_estimator={ESTIMATOR} needs trainer.v1.trainer_mode=ups_rm")
    advantages = _under_way.advantages(token_level_rewards, response_mask, index)
    return advantages, advantages
