"""Whether two recipes compute the same training: what a checkpoint of either engine is held against."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ups_rm.console import console
from ups_rm.content import content_hash
from ups_rm.errors import CheckpointError
from ups_rm.models import resolve_model
from ups_rm.recipe import Recipe, as_list
from ups_rm.reward.open import inputs_of

# Settings that may differ between a run and its continuation.
FREE_TO_CHANGE = ("logger", "total_training_steps", "total_epochs", "test_freq", "save_freq", "val_before_train",
                  "resume_mode", "resume_from_path", "allow_changes", "overwrite", "max_actor_ckpt_to_keep",
                  "max_ckpt_to_keep", "best_ckpt_to_keep", "async_save", "device", "nonfinite", "max_skipped_steps",
                  "max_grad_norm", "default_local_dir", "group_log_dir",
                  "group_log_freq", "group_log_max_groups", "group_log_max_samples_per_group")  # fmt: skip
SERVICE = ("max_batch_tokens", "placement", "num_workers", "timeout_s", "retries", "max_dropped_share", "node_resource")
"""Keys of `reward_model` that say where and how patiently replies are scored: no score depends on them."""
BESIDE_TRAINING = ("prepare", "reward_training", "evaluation", "monitor", "ray_kwargs", "verl")
"""Sections that decide nothing in the training; what the first two made is named by its path."""
OF_VERL = ("overrides", "external_modules")
"""What of `verl` decides all the same: an override may be of any key."""


def deciding_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what training computes, nested."""
    settings = recipe.as_dict()
    for section in BESIDE_TRAINING:
        settings.pop(section)
    settings |= {f"verl.{name}": value for name in OF_VERL if (value := getattr(recipe.verl, name))}
    settings["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in FREE_TO_CHANGE}
    settings["reward_model"] = {key: value for key, value in settings["reward_model"].items() if key not in SERVICE}
    if not recipe.reward_model.helpfulness.named:  # as it was before there was such a section
        del settings["reward_model"]["helpfulness"]
    return settings


def recipe_hash(recipe: Recipe) -> str:
    """sha256 over `deciding_settings`."""
    return hashlib.sha256(json.dumps(deciding_settings(recipe), sort_keys=True).encode()).hexdigest()


def input_hashes(recipe: Recipe) -> dict[str, str]:
    """Content hashes of policy, RMs and prompts, by recipe key: a path alone does not say what stands there."""
    policy, rm = recipe.actor_rollout_ref.model.path, recipe.reward_model.model.path
    hashes = {"actor_rollout_ref.model.path": content_hash(resolve_model(policy))}
    for file in inputs_of(recipe.reward_model):
        hashes["reward_model.model.path" if file == rm else f"reward_model: {file}"] = content_hash(file)
    return hashes | {f"data.train_files: {file}": content_hash(file) for file in as_list(recipe.data.train_files)}


@dataclass(frozen=True)
class MadeWith:
    """What a checkpoint comes from: the recipe's settings, and the content of what it names.

    Attributes:
        settings: `deciding_settings` by dotted key, so that a change can be named.
    """

    recipe_hash: str
    inputs: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> MadeWith:
        return cls(recipe_hash(recipe), input_hashes(recipe), _dotted(deciding_settings(recipe)))

    def changes(self, now: MadeWith) -> tuple[list[str], list[str]]:
        """(settings that differ, as `key: 1, now 2`; names of inputs whose content differs)."""
        keys = sorted(self.settings.keys() | now.settings.keys())
        settings = [
            f"{key}: {self.settings.get(key, 'not there')}, now {now.settings.get(key, 'not there')}"
            for key in keys
            if self.settings.get(key) != now.settings.get(key)
        ]
        if self.recipe_hash != now.recipe_hash and not settings:
            settings = ["settings that it does not name"]
        return settings, [key for key, value in now.inputs.items() if self.inputs.get(key, value) != value]

    def check(self, now: MadeWith, path: Path, *, allow_changes: bool = False) -> list[str]:
        """Whether the checkpoint at `path` may be gone on with; returns what changed where that is allowed.

        Raises:
            CheckpointError: other settings, or other contents under the same paths, and `allow_changes` is not set.
        """
        settings, inputs = self.changes(now)
        changed = [*settings, *(f"other contents of {name}" for name in inputs)]
        if changed and allow_changes:
            console.print(f"{path} was made with another recipe or inputs:", markup=False, soft_wrap=True)
            for change in changed:
                console.print(f"  {change}", markup=False, soft_wrap=True)
            return changed
        if settings:
            listed = "".join(f"\n  {change}" for change in settings)
            raise CheckpointError(
                f"{path} was made with another recipe{listed}\n  fix: --allow-changes (trainer.allow_changes=true) to "
                "go on; the same settings; another trainer.default_local_dir; or trainer.resume_mode=disable to "
                "start anew"
            )
        if inputs:
            raise CheckpointError(
                f"{path} was made with other contents of {', '.join(inputs)}: what stood there was replaced or "
                "edited\n  fix: put it back; --allow-changes (trainer.allow_changes=true) to go on with it; or another "
                "trainer.default_local_dir (--out) or trainer.resume_mode=disable (--resume never) to start anew"
            )
        return []


def _dotted(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _dotted(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat
