"""The reward model as the loop sees it: conversations in, one safe score per reply out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ups_rm.device import torch_device
from ups_rm.errors import RMError
from ups_rm.recipe import Recipe
from ups_rm.types import Score, Scorer


def load_scorer(recipe: Recipe) -> Scorer:
    """The recipe's reward model or models as one scorer, on the device that trains.

    Raises:
        RecipeError: the recipe names none.
    """
    from ups_rm.reward.open import open_scorer

    return open_scorer(recipe.reward_model, str(torch_device(recipe.trainer.device)))


def evaluation_scorer(recipe: Recipe) -> Scorer:
    """As `load_scorer`, but safe_score = sigmoid(-logit) whatever the transform: a comparison is in (0, 1)."""
    from ups_rm.reward.open import open_scorer

    settings = replace(recipe.reward_model, transform="sigmoid", transform_temperature=1.0)
    return open_scorer(settings, str(torch_device(recipe.trainer.device)))


def safe_scores(scores: list[Score], device: torch.device) -> Tensor:
    """`safe_score` of every reply. Shape (B,).

    Raises:
        RMError: one of them is not a number.
    """
    safe_score = torch.tensor([score.safe_score for score in scores], device=device)
    broken = [score.logit for score, finite in zip(scores, safe_score.isfinite().tolist(), strict=True) if not finite]
    if broken:
        raise RMError(
            f"the RM gave {len(broken)} of {len(scores)} replies a score that is not a number (logit {broken[0]})\n"
            "  fix: reward_model.model.dtype=float32, then ups-rm rm check FOLDER"
        )
    return safe_score
