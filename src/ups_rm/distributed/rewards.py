"""The reward side's part of verl's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ups_rm.recipe import Recipe


def verl_overrides(recipe: Recipe) -> dict[str, Any]:
    """Settings of our reward manager, which verl loads by its own hook; free keys stand under `reward.ups_rm`."""
    settings = recipe.reward_model
    return {
        "reward.num_workers": 1,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "SafetyRewardManager",
        "reward.reward_manager.module.path": "pkg://ups_rm.distributed.reward_manager",
        "+reward.ups_rm.path": str(Path(settings.model.path).absolute()),
        "+reward.ups_rm.dtype": settings.model.dtype,
        "+reward.ups_rm.trust_remote_code": settings.model.trust_remote_code,
        "+reward.ups_rm.max_batch_tokens": settings.max_batch_tokens,
        "+trainer.group_log_dir": str(Path(recipe.trainer.group_log_dir).absolute()),
        "+trainer.group_log_freq": recipe.trainer.group_log_freq,
        "+trainer.group_log_max_groups": recipe.trainer.group_log_max_groups,
        "+trainer.group_log_max_samples_per_group": recipe.trainer.group_log_max_samples_per_group,
    }
