"""Whether two recipes compute the same training: what a checkpoint of either engine is held against."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ups_rm.content import content_hash
from ups_rm.errors import CheckpointError
from ups_rm.models import resolve_model
from ups_rm.recipe import Recipe, as_list
from ups_rm.reward.open import inputs_of

# Settings that may differ between a run and its continuation.
FREE_TO_CHANGE = ("logger", "total_training_steps", "total_epochs", "test_freq", "save_freq", "val_before_train",
                  "resume_mode", "resume_from_path", "max_actor_ckpt_to_keep", "default_local_dir", "group_log_dir",
                  "group_log_freq", "group_log_max_groups", "group_log_max_samples_per_group")  # fmt: skip
SERVICE = ("max_batch_tokens", "placement", "num_workers", "timeout_s", "retries", "node_resource")
"""Keys of `reward_model` that say where and how patiently replies are scored: no score depends on them."""
BESIDE_TRAINING = ("prepare", "reward_training", "evaluation", "monitor", "ray_kwargs", "verl")
"""Sections that decide nothing in the training; what the first two made is named by its path."""
OF_VERL = ("overrides", "external_modules")
"""What of `verl` decides all the same: an override may be of any key."""


def recipe_hash(recipe: Recipe) -> str:
    """sha256 over the settings that decide what training computes."""
    settings = recipe.as_dict()
    for section in BESIDE_TRAINING:
        settings.pop(section)
    settings |= {f"verl.{name}": value for name in OF_VERL if (value := getattr(recipe.verl, name))}
    settings["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in FREE_TO_CHANGE}
    settings["reward_model"] = {key: value for key, value in settings["reward_model"].items() if key not in SERVICE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def input_hashes(recipe: Recipe) -> dict[str, str]:
    """Content hashes of policy, RMs and prompts, by recipe key: a path alone does not say what stands there."""
    policy, rm = recipe.actor_rollout_ref.model.path, recipe.reward_model.model.path
    hashes = {"actor_rollout_ref.model.path": content_hash(resolve_model(policy))}
    for file in inputs_of(recipe.reward_model):
        hashes["reward_model.model.path" if file == rm else f"reward_model: {file}"] = content_hash(file)
    return hashes | {f"data.train_files: {file}": content_hash(file) for file in as_list(recipe.data.train_files)}


@dataclass(frozen=True)
class MadeWith:
    """What a checkpoint comes from: the recipe's settings, and the content of what it names."""

    recipe_hash: str
    inputs: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe) -> MadeWith:
        return cls(recipe_hash(recipe), input_hashes(recipe))

    def check(self, now: MadeWith, path: Path) -> None:
        """Whether the checkpoint at `path` may be gone on with.

        Raises:
            CheckpointError: other settings, or other contents under the same paths.
        """
        if self.recipe_hash != now.recipe_hash:
            raise CheckpointError(
                f"{path} was made with another recipe\n  fix: use the same settings, another "
                "trainer.default_local_dir, or trainer.resume_mode=disable to start anew"
            )
        changed = [key for key, value in now.inputs.items() if self.inputs.get(key, value) != value]
        if changed:
            raise CheckpointError(
                f"{path} was made with other contents of {', '.join(changed)}: what stood there was replaced or "
                "edited\n  fix: put it back; or another trainer.default_local_dir (--out) or "
                "trainer.resume_mode=disable (--resume never) to start anew"
            )
