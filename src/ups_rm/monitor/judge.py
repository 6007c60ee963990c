"""A second opinion on the replies: another reward model, which the policy is not trained against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ups_rm.device import torch_device
from ups_rm.errors import RMError
from ups_rm.recipe import Recipe, RewardModel
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Score, Scorer


def open_judge(recipe: Recipe) -> Scorer | None:
    """The scorer that `monitor.judge` names, on the device that trains; None where it names none.

    Raises:
        RMError: it can't be opened.
    """
    from ups_rm.reward.open import open_scorer

    settings = judge_settings(recipe)
    if not settings.entries():
        return None
    try:
        return open_scorer(settings, str(torch_device(recipe.trainer.device)))
    except RMError as error:
        raise RMError(f"monitor.judge: {error}") from error


def judge_settings(recipe: Recipe) -> RewardModel:
    """`monitor.judge` as the recipe's only reward model, its score sigmoid(-logit)."""
    judge, helpfulness = recipe.monitor.judge, RewardModel().helpfulness  # which names none
    settings = replace(recipe.reward_model, model=judge, models=[], helpfulness=helpfulness)
    return replace(settings, transform="sigmoid", transform_temperature=1.0)


def judge_name(recipe: Recipe) -> str:
    """What reports call the judge: its name or the last part of its place, another one than the reward models'."""
    from ups_rm.reward.open import entry_names

    return entry_names([*recipe.reward_model.entries(), recipe.monitor.judge])[-1]


def judge_means(judged: Sequence[Score], scores: Sequence[Score]) -> tuple[float, float]:
    """(judge's, reward model's) mean of sigmoid(-logit) over the same replies, whatever transform the training uses."""
    return _mean_safe_score(judged), _mean_safe_score(scores)


def _mean_safe_score(scores: Sequence[Score]) -> float:
    return math.fsum(safe_score(score.logit) for score in scores) / len(scores)
