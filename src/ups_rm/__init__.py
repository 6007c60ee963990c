"""UPS-RM: make a language model safer by GRPO against your own reward model.

The names below are what a notebook needs; they are loaded when first used, so that `import ups_rm` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ups_rm.evaluation.compare import compare
    from ups_rm.local.evaluate import evaluate
    from ups_rm.local.trainer import Trainer
    from ups_rm.models import fetch, resolve_model
    from ups_rm.recipe import Recipe, load_recipe
    from ups_rm.reward.doctor import check_rm
    from ups_rm.reward.scorer import RewardScorer

_HOMES = {
    "RewardScorer": "ups_rm.reward.scorer",
    "check_rm": "ups_rm.reward.doctor",
    "Trainer": "ups_rm.local.trainer",
    "evaluate": "ups_rm.local.evaluate",
    "compare": "ups_rm.evaluation.compare",
    "Recipe": "ups_rm.recipe",
    "load_recipe": "ups_rm.recipe",
    "fetch": "ups_rm.models",
    "resolve_model": "ups_rm.models",
}

__all__ = [
    "Recipe",
    "RewardScorer",
    "Trainer",
    "check_rm",
    "compare",
    "evaluate",
    "fetch",
    "load_recipe",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ups_rm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
