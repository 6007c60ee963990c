"""A batch of replies with what the reward model says about them: who has a score, which groups differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ups_rm.grpo.groups import flat_groups, usable_replies
from ups_rm.local.rollout import Rollout
from ups_rm.local.scoring import score_replies
from ups_rm.recipe import Recipe
from ups_rm.types import Score, Scorer


@dataclass(frozen=True)
class Judged:
    """B replies to P prompts.

    Attributes:
        scores: of every reply; nan where the reward model failed.
        safe_score: 0 where `usable` is not. Shape (B,).
        usable: the reply has a score, and others to be compared with. Shape (B,), bool.
        flat: the scores of the reply's group are equal (the logits, where those are the cost), and its helpfulness
            where that counts. Shape (B,), bool.
        resampled: groups whose replies were drawn anew, each time counted.
    """

    rollout: Rollout
    scores: list[Score]
    safe_score: Tensor
    usable: Tensor
    flat: Tensor
    resampled: int = 0

    def flat_prompts(self) -> list[int]:
        """Numbers of the prompts whose groups are flat."""
        return torch.unique(self.rollout.sequences.group_ids[self.flat]).tolist()


def judge(rollout: Rollout, scorer: Scorer, recipe: Recipe) -> Judged:
    """Have the replies scored.

    Raises:
        RMError: the reward model fails on more of them than `reward_model.max_dropped_share`.
    """
    settings = recipe.reward_model
    share = settings.max_dropped_share
    scores, scored = score_replies(scorer, rollout.conversations, retries=settings.retries, max_dropped_share=share)
    return _judged(rollout, scores, scored, recipe)


def judge_again(before: Judged, groups: list[int], new: Rollout, scorer: Scorer, recipe: Recipe) -> Judged:
    """`before` with the replies to the prompts `groups` replaced by those of `new`, which are scored."""
    n = recipe.actor_rollout_ref.rollout.n
    rows = [group * n + i for group in groups for i in range(n)]
    judged, scores = judge(new, scorer, recipe), list(before.scores)
    scored = before.usable.clone()
    for i, row in enumerate(rows):
        scores[row], scored[row] = judged.scores[i], judged.usable[i]
    merged = _judged(before.rollout.replaced(rows, new), scores, scored, recipe)
    return replace(merged, resampled=before.resampled + len(groups))


def _judged(rollout: Rollout, scores: list[Score], scored: Tensor, recipe: Recipe) -> Judged:
    group_ids = rollout.sequences.group_ids
    usable = usable_replies(scored.to(group_ids.device), group_ids)
    safe_score = torch.tensor([score.safe_score for score in scores], device=group_ids.device)
    safe_score = torch.where(usable, safe_score, torch.zeros_like(safe_score))
    counts = safe_score
    if recipe.algorithm.objective == "constrained":  # cost is the logit, which goes on where the safe score is 1
        logits = torch.tensor([score.logit for score in scores], device=group_ids.device)
        counts = torch.where(usable, logits, torch.zeros_like(logits))
    flat = flat_groups(counts, group_ids, usable, recipe.algorithm.zero_std_tolerance)
    if recipe.algorithm.objective != "safety":  # replies that are equally safe may still differ
        helpfulness = torch.tensor([score.helpfulness or 0.0 for score in scores], device=group_ids.device)
        flat &= flat_groups(helpfulness, group_ids, usable, recipe.algorithm.zero_std_tolerance)
    return Judged(rollout, scores, safe_score, usable, flat)
