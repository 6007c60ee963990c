"""The reward model as the loop sees it: conversations in, one safe score per reply out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ups_rm.errors import RecipeError, RMError
from ups_rm.local.policy import pick_device
from ups_rm.recipe import Recipe
from ups_rm.types import Conversation, Score


class Scorer(Protocol):
    """What the loop needs of a reward model; `ups_rm.reward.scorer.RewardScorer` is one."""

    def score(self, conversations: list[Conversation]) -> list[Score]: ...


def load_scorer(recipe: Recipe) -> Scorer:
    """The RM folder of the recipe as a scorer.

    Raises:
        RecipeError: the recipe names no RM.
    """
    from ups_rm.reward.scorer import RewardScorer

    settings = recipe.reward_model
    if not settings.model.path:
        raise RecipeError(
            "reward_model.model.path is empty\n"
            "  fix: give an RM folder (REWARD_MODEL_PATH=FOLDER), or use `ups-rm run`, which makes one"
        )
    return RewardScorer.load(
        settings.model.path,
        device=str(pick_device(recipe.trainer.device)),
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        max_batch_tokens=settings.max_batch_tokens,
    )


def safe_scores(scores: list[Score], device: torch.device) -> Tensor:
    """`safe_score` of every reply. Shape (B,).

    Raises:
        RMError: one of them is not a number.
    """
    safe_score = torch.tensor([score.safe_score for score in scores], device=device)
    if not bool(torch.isfinite(safe_score).all()):
        bad = int((~torch.isfinite(safe_score)).sum())
        raise RMError(
            f"the RM gave {bad} of {len(scores)} replies a score that is not a number (logit {scores[0].logit})\n"
            "  fix: reward_model.model.dtype=float32, then ups-rm rm check FOLDER"
        )
    return safe_score
