"""Helpfulness from a second reward model, where the one for safety has no head for it.

    helpfulness = the number of `reward_model.helpfulness`, higher = more helpful (sign by its `output`)

The two models are asked one after the other about the same conversations; a folder with both heads needs one forward
pass for both numbers (scorer.py) and is the cheaper way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ups_rm.errors import RMError
from ups_rm.types import Conversation, Score, Scorer


@dataclass(frozen=True)
class HelpfulnessModel:
    """Whatever gives one number per conversation, higher = more helpful."""

    name: str
    ask: Callable[[list[Conversation]], list[float]]

    def numbers(self, conversations: list[Conversation]) -> list[float]:
        """One finite number per conversation, in input order.

        Raises:
            RMError: the model fails, or gives a number that is not finite.
        """
        try:
            numbers = self.ask(conversations)
        except RMError as error:
            raise RMError(f"helpfulness model {self.name}: {error}") from error
        if len(numbers) != len(conversations):
            raise RMError(f"helpfulness model {self.name} gave {len(numbers)} numbers for {len(conversations)} replies")
        broken = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
        if broken:
            raise RMError(
                f"helpfulness model {self.name} gives {numbers[broken[0]]} for conversation {broken[0]} "
                f"({len(broken)} of {len(numbers)} are not finite)"
            )
        return numbers


class WithHelpfulness:
    """Scores of a reward model for safety, with the number of a second model as their `helpfulness`."""

    def __init__(self, scorer: Scorer, helpfulness: HelpfulnessModel) -> None:
        self.scorer = scorer
        self.helpfulness = helpfulness

    def score(self, conversations: list[Conversation]) -> list[Score]:
        """One Score per conversation, in input order.

        Raises:
            RMError: one of the models fails; the one for safety judges helpfulness itself.
        """
        scores = self.scorer.score(conversations)
        if any(score.helpfulness is not None for score in scores):
            raise RMError(
                "the reward model for safety has a helpfulness head, and reward_model.helpfulness names another model\n"
                "  fix: leave reward_model.helpfulness out, or name a folder for safety alone"
            )
        numbers = self.helpfulness.numbers(conversations)
        return [replace(score, helpfulness=number) for score, number in zip(scores, numbers, strict=True)]
