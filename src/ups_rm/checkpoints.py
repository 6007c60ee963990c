"""Checkpoint folders as both engines name them: `<run>/global_step_<N>`, and a file that names the newest (verl's)."""

from __future__ import annotations

from pathlib import Path

from ups_rm.durable import remove_folder

LATEST = "latest_checkpointed_iteration.txt"


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, by step."""
    found = [path for path in folder.glob("global_step_*") if path.name.rsplit("_", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rsplit("_", 1)[1])


def drop_checkpoints_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: training goes on from `step` on another branch."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            remove_folder(path)
