"""One score from one or several reward models: sign, normalisation, weighted mean, transform, in this order.

    u_k = unsafety logit of model k (transforms.unsafety_logit, by its `output`)
    z_k = (u_k - mean_k) / std_k                       mean 0 and std 1 where it is not normalised
    logit = sum_k w_k z_k / sum_k w_k
    safe_score = transforms.score_of(logit)

Mean and std are constants of the run (given, or measured once on reference conversations), not of the batch: a reply's
score does not depend on the replies beside it, and a resumed run scores as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ups_rm.errors import RMError
from ups_rm.reward.transforms import score_of, unsafety_logit
from ups_rm.types import Conversation, Score, Scorer

MIN_STD = 1e-6


@dataclass(frozen=True)
class Member:
    """One model of the combination; `mean` and `std` are of its unsafety logit."""

    name: str
    scorer: Scorer
    output: str = "unsafety"
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def logits(self, scores: Sequence[Score]) -> list[float]:
        """Unsafety logits of what its scorer said.

        Raises:
            RMError: one that is not finite.
        """
        values = [unsafety_logit(score.logit, self.output) for score in scores]
        broken = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if broken:
            raise RMError(
                f"reward model {self.name} gives {values[broken[0]]} for conversation {broken[0]} ({len(broken)} of "
                f"{len(values)} are not finite)"
            )
        return values


class CombinedScorer:
    """Scores by the weighted mean of its members' normalised logits."""

    def __init__(self, members: Sequence[Member], *, transform: str = "sigmoid", temperature: float = 1.0) -> None:
        self.members = tuple(members)
        self.transform = transform
        self.temperature = temperature

    def score(self, conversations: list[Conversation]) -> list[Score]:
        """One Score per conversation: `logit` is the combined one, `model_logits` each model's before normalisation,
        `helpfulness` that of the one model which gives it.

        Raises:
            RMError: a model that fails, or gives a number that is not finite, by its name; two that judge helpfulness.
        """
        scores = [self._ask(member, conversations) for member in self.members]
        logits = [member.logits(own) for member, own in zip(self.members, scores, strict=True)]
        helpful = self._helpful(scores)
        total = math.fsum(member.weight for member in self.members)
        combined = []
        for i in range(len(conversations)):
            parts = [m.weight * (own[i] - m.mean) / m.std for m, own in zip(self.members, logits, strict=True)]
            logit = math.fsum(parts) / total
            combined.append(
                Score(
                    logit=logit,
                    safe_score=score_of(logit, self.transform, self.temperature),
                    tokens=sum(own[i].tokens for own in scores),
                    truncated=any(own[i].truncated for own in scores),
                    model_logits={m.name: own[i] for m, own in zip(self.members, logits, strict=True)},
                    helpfulness=helpful[i].helpfulness if helpful else None,
                )
            )
        return combined

    def _helpful(self, scores: Sequence[list[Score]]) -> list[Score] | None:
        """The scores of the one member that judges helpfulness."""
        found = [i for i, own in enumerate(scores) if any(score.helpfulness is not None for score in own)]
        if len(found) > 1:
            names = " and ".join(self.members[i].name for i in found)
            raise RMError(
                f"reward models {names} both judge helpfulness, and their numbers can't be combined\n"
                "  fix: one of them as a folder for safety alone (ups-rm rm train --target safety, ups-rm rm merge)"
            )
        return scores[found[0]] if found else None

    def _ask(self, member: Member, conversations: list[Conversation]) -> list[Score]:
        try:
            scores = member.scorer.score(conversations)
        except RMError as error:
            raise RMError(f"reward model {member.name}: {error}") from error
        if len(scores) != len(conversations):
            raise RMError(f"reward model {member.name} gave {len(scores)} scores for {len(conversations)} replies")
        return scores


def measured(member: Member, conversations: list[Conversation]) -> tuple[float, float]:
    """Mean and std (of the population) of a member's unsafety logit on reference conversations.

    Raises:
        RMError: fewer than two conversations, or logits that are all alike.
    """
    logits = member.logits(member.scorer.score(conversations))
    if len(logits) < 2:
        raise RMError(f"reward model {member.name} can't be normalised on {len(logits)} conversations")
    mean, std = statistics.fmean(logits), statistics.pstdev(logits)
    if std < MIN_STD:
        raise RMError(
            f"reward model {member.name} answers {mean:.4g} to all of {len(logits)} reference replies (std {std:.1g})"
            "\n  fix: look at the model (ups-rm rm check), or give normalize=fixed with mean and std, or normalize=none"
        )
    return mean, std
