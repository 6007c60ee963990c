"""The reward side's part of verl's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ups_rm.errors import RecipeError
from ups_rm.recipe import Recipe, RewardModel, RewardModelModel


def verl_overrides(recipe: Recipe) -> dict[str, Any]:
    """Our reward manager, our trainer and what they read: `reward_model` goes to `reward.ups_rm`, key by key.

    One reward-loop worker per node: each gathers its own batches, so fewer make fuller ones.
    """
    trainer, settings = recipe.trainer, recipe.reward_model
    section = dataclasses.asdict(settings)
    for entry in (section["model"], section["helpfulness"], *section["models"]):
        for key in ("path", "template", "reference_replies"):
            entry[key] = _absolute(entry[key])
    section["reference_data"] = _absolute(section["reference_data"])
    return {
        "reward.num_workers": trainer.nnodes,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "SafetyRewardManager",
        "reward.reward_manager.module.path": "pkg://ups_rm.distributed.reward_manager",
        "trainer.v1.trainer_mode": "ups_rm",
        "+trainer.group_log_dir": str(Path(trainer.group_log_dir).absolute()),
        "+trainer.group_log_freq": trainer.group_log_freq,
        "+trainer.group_log_max_groups": trainer.group_log_max_groups,
        "+trainer.group_log_max_samples_per_group": trainer.group_log_max_samples_per_group,
        **{f"+reward.ups_rm.{key}": value for key, value in _leaves(section)},
        **{f"+trainer.ups_rm_algorithm.{key}": value for key, value in _leaves(dataclasses.asdict(recipe.algorithm))},
    }


def check_placement(settings: RewardModel) -> None:
    """What the placement asks of the reward models, and verl of a judge.

    Raises:
        RecipeError: `http` and the addresses don't go together; a judge of pairs without replies to compare with.
    """
    local = [entry for entry in settings.asked() if not entry.url]
    if settings.placement == "http" and local:
        raise RecipeError(
            f"reward_model.placement=http, but {local[0].path or local[0].callable} is no service\n"
            "  fix: reward_model.model.url=http://HOST:PORT"
        )
    if settings.placement != "http" and settings.entries() and not local:
        raise RecipeError(
            f"reward_model.placement={settings.placement}, but the reward model is a service and needs no device\n"
            "  fix: reward_model.placement=http"
        )
    if any(entry.kind == "pairwise" and not entry.reference_replies for entry in settings.asked()):
        raise RecipeError(
            "kind=pairwise compares the replies to one prompt, and verl scores reply by reply\n"
            "  fix: reference_replies=FILE to compare with, or ENGINE=local"
        )


def check_reachable(settings: RewardModel) -> None:
    """What the RM workers would fail on after verl's minute of start-up: a wrong path, a service that is not there.

    Folders of RM nodes (`node`) that are not here as well are left to the workers there.

    Raises:
        RMError: a folder that is no reward model; a service that does not score one conversation, or something else
            at its address.
    """
    from ups_rm.reward.open import ask_service

    for entry in settings.asked():
        if entry.url:
            ask_service(entry)
        elif entry.path and (settings.placement != "node" or Path(entry.path).exists()):
            check_folder(entry)


def check_folder(entry: RewardModelModel) -> None:
    """Whether a reward model's folder is one; nothing is loaded.

    Raises:
        RMError: it is not there, or is none.
    """
    from ups_rm.reward.native import read_config
    from ups_rm.reward.open import kind_of

    read_config(entry.path)
    kind_of(entry)


def _absolute(path: str) -> str:
    """A file or folder as an absolute path: verl's processes start elsewhere. What is neither stays as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
