"""A run folder as plain JSON values, for the page: of either engine, finished or not, whole or in part."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ups_rm.errors import DataError, RunError, UpsRmError
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.report.groups import Prompts, read_groups
from ups_rm.report.numbers import short
from ups_rm.report.outcome import read_outcome
from ups_rm.report.sources import kept_sources, prompt_categories, read_json, read_sources
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.tracking.trackers import flatten

MOST_ROWS = 2000
"""Steps of the metrics in the page; of more, every so many-th."""
MADE_BY_RUN = "merge/merged_model/Naive-RM-saferlhf"
GROUP_BYTES = 12 * 2**20
"""Of the group log that a page starts from; `page.render` asks for less if the page grows too large."""


def read_run(folder: Path, *, group_bytes: int = GROUP_BYTES) -> dict[str, Any]:
    """All that the page shows of a run.

    Args:
        group_bytes: see `groups.read_groups`.

    Raises:
        RunError: the folder is not a run's: it has neither recipe.yaml nor metrics.jsonl.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise RunError(
            f"{folder} is not a run folder: it has neither recipe.yaml nor metrics.jsonl\n"
            "  fix: name the folder that `ups-rm run` or `ups-rm train` printed, runs/ups-rm/quickstart by default"
        )
    problems: list[str] = []
    recipe = _recipe(folder, problems)
    sources = kept_sources(folder, problems)
    was_kept = sources is not None
    if sources is None:
        sources = read_sources(folder, recipe) if recipe else {"reward_models": [], "data": {}}
    prompts = Prompts()
    groups = read_groups(_group_folder(folder, recipe), prompts, max_bytes=group_bytes, problems=problems)
    outcome = read_outcome(folder, prompts, problems)
    data = dict(sources["data"])
    for row in prompts.rows:
        row["categories"] = row["categories"] or prompt_categories(data, row["messages"][-1]["content"])
    data.pop("categories_of_prompts", None)
    metrics = _metrics(folder, problems)
    return {
        "name": folder.resolve().name,
        "steps": metrics["steps"][-1] if metrics["steps"] else 0,
        "total_steps": recipe.trainer.total_training_steps if recipe else None,
        "finished": (folder / "policy").is_dir(),
        "outcome": outcome,
        "alarms": _alarms(folder, problems, watched="alarm/count" in metrics["series"]),
        "metrics": metrics,
        "prompts": prompts.rows,
        "groups": groups,
        "reward_models": sources["reward_models"],
        "data": data,
        "sources_kept": was_kept,
        "recipe": _recipe_text(folder),
        "settings": {key: str(value) for key, value in flatten(recipe.as_dict()).items()} if recipe else {},
        "command": _command(folder, recipe),
        "made_with": read_json(folder / "made_with.json"),
        "problems": problems,
    }


def _recipe(folder: Path, problems: list[str]) -> Recipe | None:
    try:
        return load_recipe(folder / "recipe.yaml", engine=None)
    except UpsRmError as error:
        problems.append(str(error).splitlines()[0])
        return None


def _recipe_text(folder: Path) -> str:
    try:
        return (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _group_folder(folder: Path, recipe: Recipe | None) -> Path:
    """`groups` in the run folder, which may have been moved; else where the recipe put it."""
    inside = folder / "groups"
    return inside if inside.is_dir() or recipe is None else Path(recipe.trainer.group_log_dir)


def _metrics(folder: Path, problems: list[str]) -> dict[str, Any]:
    """{"steps": [...], "series": {name: one value per step, None where it was not logged}}; time is left out."""
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except FileNotFoundError:
        rows = []
    except (DataError, OSError, UnicodeDecodeError) as error:
        problems.append(str(error))
        rows = []
    total = len(rows)
    if total > MOST_ROWS:
        kept = {round(i * (total - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
        rows = [row for i, row in enumerate(rows) if i in kept or any(name.startswith("val") for name in row)]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "time"))
    series = {name: [short(row.get(name)) for row in rows] for name in names}
    return {"steps": [row["step"] for row in rows], "series": series, "steps_total": total}


def _alarms(folder: Path, problems: list[str], *, watched: bool) -> list[dict[str, Any]] | None:
    """Lines of alarms.jsonl: step, name, value, threshold, message. Without the file none; None where nothing `watched`
    the run."""
    file = folder / "alarms.jsonl"
    if not file.is_file():
        return [] if watched else None
    alarms = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            alarms.append({"step": row["step"], "name": str(row["name"])})
            alarms[-1] |= {key: short(row.get(key)) for key in ("value", "threshold")}
            alarms[-1]["message"] = str(row.get("message") or "")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{file}:{number}: {error}")
    return alarms


def _command(folder: Path, recipe: Recipe | None) -> str:
    """A command that makes the same run again, in a folder of its own.

    The recipe as it stood when training began names the reward model that `ups-rm run` had made by then; that one is
    left out, so that it is made again.
    """
    if recipe is None:
        return ""
    whole = (folder / "summary.json").is_file() or recipe.reward_model.model.path == MADE_BY_RUN
    words = ["ups-rm", "run" if whole else "train", "--recipe", str(folder / "recipe.yaml")]
    words += ["--out", f"{folder}-again"]
    if recipe.verl.overrides or (folder / "verl").is_dir():
        words += ["--engine", "verl"]
    if whole and not recipe.reward_model.models and recipe.reward_model.model.path == MADE_BY_RUN:
        words.append("reward_model.model.path=")
    words.append(f"trainer.group_log_dir={folder}-again/groups")  # the recipe has it spelled out
    return shlex.join(words)
