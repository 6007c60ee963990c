"""The runs below a folder and what came of them, read from what a run leaves: nothing is loaded, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ups_rm.durable import file_damage
from ups_rm.errors import DataError
from ups_rm.locks import beside, is_held
from ups_rm.monitor.watch import read_alarms
from ups_rm.tracking.jsonl import read_metrics

LAST = 5
"""Steps whose score is averaged: one batch's depends on its prompts."""


@dataclass(frozen=True)
class RunInfo:
    """One run folder.

    Attributes:
        state: `running` (a process holds its lock), `finished` (its policy is there), `stopped` (by an alarm at its
            last step), `unreadable` (metrics, alarms or figures are damaged), else `unfinished`: interrupted or failed.
        steps, total_steps: done, and wanted by the recipe (None: as many as its epochs have).
        score, kl: mean of `critic/score/mean` and of `kl/mean` over the last `LAST` steps; None without a step.
        gain, ci95: change of the safe score on held-out prompts with its interval, where it was evaluated.
        alarms: names, in the order in which they were raised first.
        changed: Unix time of the last logged step, or of the recipe.
    """

    folder: Path
    state: str
    steps: int
    total_steps: int | None
    score: float | None
    kl: float | None
    gain: float | None
    ci95: tuple[float, float] | None
    alarms: tuple[str, ...]
    changed: float


def find_runs(folder: Path) -> list[RunInfo]:
    """Every run folder at or below `folder` (one with recipe.yaml and metrics.jsonl), the newest last.

    A run is not looked for within another one.
    """
    return sorted(map(read_run, _run_folders(Path(folder))), key=lambda run: run.changed)


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file():  # the first alone may be anyone's
        yield folder
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _run_folders(entry)


def read_run(folder: Path) -> RunInfo:
    """What a run folder says of its run."""
    state = "finished" if (folder / "policy").is_dir() else "unfinished"
    try:
        rows, alarms = read_metrics(folder / "metrics.jsonl"), read_alarms(folder)
    except DataError:
        rows, alarms, state = [], [], "unreadable"
    trained = [row for row in rows if "critic/score/mean" in row]
    steps = int(trained[-1]["step"]) if trained else 0
    if any(alarm.stop and alarm.step == steps for alarm in alarms):
        state = "stopped"
    if is_held(beside(folder)):
        state = "running"
    figures = [folder / "summary.json", folder / "eval" / "comparison.json"]
    if any(file_damage(file) is not None for file in figures):
        figures, state = [], "unreadable"
    safe_score = next((found for file in figures if (found := _json(file))), {}).get("safe_score", {})
    ci95 = safe_score.get("ci95")
    trainer = _yaml(folder / "recipe.yaml").get("trainer") or {}
    return RunInfo(
        folder=folder,
        state=state,
        steps=steps,
        total_steps=trainer.get("total_training_steps"),
        score=_mean(trained, "critic/score/mean"),
        kl=_mean(trained, "kl/mean"),
        gain=safe_score.get("diff"),
        ci95=None if ci95 is None else (ci95[0], ci95[1]),
        alarms=tuple(dict.fromkeys(alarm.name for alarm in alarms)),
        changed=float(rows[-1]["time"]) if rows else (folder / "recipe.yaml").stat().st_mtime,
    )


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows[-LAST:] if name in row]
    return sum(values) / len(values) if values else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
