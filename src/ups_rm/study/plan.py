"""The study's file: which recipe, which arms, which seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ups_rm.errors import RecipeError
from ups_rm.recipe import Recipe, load_recipe

KEYS = {"recipe": str, "overrides": list, "arms": dict, "seeds": list}
SEEDED = ("actor_rollout_ref.rollout.seed", "data.seed", "trainer.seed")
"""Keys that take a cell's seed: replies, order of the prompts, new adapters."""
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Cell:
    """One training of the study."""

    arm: str
    seed: int
    overrides: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        return out / self.arm / f"seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        recipe: a packaged recipe or a YAML file, that every arm starts from.
        overrides: `key=value` of all arms.
        arms: `key=value` of each arm, by its name.
        seeds: each arm is trained with each of them.
    """

    name: str
    recipe: str
    arms: dict[str, list[str]]
    seeds: list[int]
    overrides: list[str] = field(default_factory=list)

    def cells(self, more: tuple[str, ...] = ()) -> list[Cell]:
        """All trainings, seed by seed, so that every arm has a result early; `more` are overrides from the command."""
        return [
            Cell(
                arm,
                seed,
                (*self.overrides, *(f"{key}={seed}" for key in SEEDED), *own, *more),
            )
            for seed in self.seeds
            for arm, own in self.arms.items()
        ]

    def load(self, cell: Cell, out: Path) -> Recipe:
        """The cell's recipe, with its run folder.

        Raises:
            RecipeError: an override that is none, by the arm's name.
        """
        given = [*cell.overrides, f"trainer.default_local_dir={cell.folder(out)}"]
        try:
            return load_recipe(self.recipe, given)
        except RecipeError as error:
            raise RecipeError(f"arm {cell.arm}: {error}") from error


def study_file(name: str) -> Path:
    """The file of a packaged study (`study_constrained`), or the path itself.

    Raises:
        RecipeError: neither.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(f"no study file at {name}")
        return Path(name)
    packaged = Path(str(resources.files("ups_rm") / "recipes" / f"{name}.yaml"))
    if not packaged.is_file() or not name.startswith("study_"):
        known = sorted(entry.stem for entry in packaged.parent.glob("study_*.yaml"))
        raise RecipeError(f"no study named {name!r}; packaged ones: {', '.join(known)}; or give a .yaml file")
    return packaged


def read_study(name: str) -> Study:
    """Read a study's file and check all its recipes.

    Raises:
        RecipeError: not such a file, by key; an arm whose recipe is wrong.
    """
    file = study_file(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} can't be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file} is not a study: expected the keys {', '.join(KEYS)}")
    for key, value in content.items():
        if key not in KEYS:
            raise RecipeError(f"{file}: {key} is not a key of a study; known: {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise RecipeError(f"{file}: {key} is {_kind(value)}, expected {_kind(KEYS[key]())}")
    if missing := [key for key in ("recipe", "arms", "seeds") if not content.get(key)]:
        raise RecipeError(f"{file}: {missing[0]} is missing or empty")
    arms = {str(name): own or [] for name, own in content["arms"].items()}
    for arm, own in arms.items():
        if not NAME.fullmatch(arm):
            raise RecipeError(f"{file}: arms: {arm!r} must be letters, digits, '-', '_' and '.': it names a folder")
        if not isinstance(own, list):
            raise RecipeError(f"{file}: arms.{arm} is {_kind(own)}, expected a list of key=value")
    seeds = content["seeds"]
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise RecipeError(f"{file}: seeds={seeds} must be different whole numbers")
    texts = {arm: [str(text) for text in own] for arm, own in arms.items()}
    recipe = str(content["recipe"])
    if recipe.endswith((".yaml", ".yml")):
        recipe = str((file.parent / recipe) if not Path(recipe).is_absolute() else recipe)
    study = Study(file.stem, recipe, texts, seeds, [str(text) for text in content.get("overrides") or []])
    for cell in study.cells():
        study.load(cell, Path())
    return study


def _kind(value: Any) -> str:
    return {str: "a text", list: "a list", dict: "a section", int: "a number"}.get(type(value), type(value).__name__)
