"""Stages that know whether they are done.

Beside its output folder `X` a stage leaves a stamp `.X.ups_rm_stage.json`: the hash of all inputs and settings, and of
what it made. It is skipped while both still fit. A folder that holds something without a stamp is refused, even with
FRESH=1, and of a stamped one only what the stage made is removed: nothing of the user's is overwritten. What stood in
the folder when the stage began anew is the user's for good; the stamp carries those names on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ups_rm import __version__
from ups_rm.console import console, emit
from ups_rm.content import content_hash
from ups_rm.durable import write_text
from ups_rm.errors import RunError


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        name: as the user sees it, and as `summary.json` names its seconds.
        inputs: files or folders whose content decides the result.
        settings: everything else that decides it; JSON.
        out: the folder that it owns; its stamp stands beside it.
        outputs: files or folders that must be there afterwards.
        action: does the work; called with nothing.
        keeps_partial: an unfinished `out` with the same hash is gone on with.
        precious: an `out` of other settings or inputs is never replaced unasked (others are made anew).
        goes_on_changed: an `out` of other settings or inputs is gone on with, too; the action sees to what that means.
    """

    name: str
    inputs: Sequence[Path | str]
    settings: dict[str, Any]
    out: Path
    outputs: Sequence[Path]
    action: Callable[[], object]
    keeps_partial: bool = False
    precious: bool = False
    goes_on_changed: bool = False

    def may_go_on(self, stamp: dict[str, Any], wanted: str) -> bool:
        """Whether what stands in `out` is the beginning of what is wanted."""
        return self.keeps_partial and (stamp.get("hash") == wanted or self.goes_on_changed)

    @property
    def stamp(self) -> Path:
        out = self.out.absolute()
        return out.parent / f".{out.name}.ups_rm_stage.json"


def run_stage(stage: Stage, *, fresh: bool = False) -> float:
    """Do the stage unless it is done; returns the seconds it took (those of the first time where it is skipped).

    Raises:
        RunError: `out` holds files that no stage of ours wrote, or the action left an output unmade.
    """
    wanted = stage_hash(stage)
    stamp = read_stamp(stage)
    if not fresh and stamp.get("hash") == wanted and "made" in stamp and stamp["made"] == _made(stage):
        console.print(f"[green]✓[/green] {stage.name}: done before, skipped ({stage.out})", soft_wrap=True)
        emit("stage", name=stage.name, skipped=True, out=stage.out)
        return float(stamp["seconds"])
    _clear(stage, stamp, wanted, fresh)
    console.rule(f"[bold]{stage.name}")
    started = perf_counter()
    goes_on = stage.may_go_on(stamp, wanted) and not fresh
    before = float(stamp.get("seconds", 0.0)) if goes_on and "made" not in stamp else 0.0
    half_done = goes_on and "entries" not in stamp
    theirs = set(stamp.get("theirs", ())) if half_done else _names(stage) - set(stamp.get("entries", ()))
    note = {"hash": wanted, "theirs": sorted(theirs)}
    _write_stamp(stage, {**note, "seconds": before})
    try:
        stage.action()
    finally:  # an interrupted stage remembers the time it took so far
        seconds = before + perf_counter() - started
        _write_stamp(stage, {**note, "seconds": seconds})
    missing = [str(output) for output in stage.outputs if not output.exists()]
    if missing:
        raise RunError(f"stage {stage.name} ended without making {', '.join(missing)}")
    entries = sorted(_names(stage) - theirs)
    _write_stamp(stage, {**note, "seconds": seconds, "made": _made(stage), "entries": entries})
    console.print(f"[green]✓[/green] {stage.name}: {seconds:.0f} s", soft_wrap=True)
    emit("stage", name=stage.name, skipped=False, out=stage.out, seconds=round(seconds, 1))
    return seconds


def _clear(stage: Stage, stamp: dict[str, Any], wanted: str, fresh: bool) -> None:
    if not stage.out.exists() or not any(stage.out.iterdir()):
        return
    if not stamp:
        raise RunError(
            f"{stage.out} is not empty and was not made by this command: nothing is overwritten\n"
            "  fix: move it away; or name what is there (REWARD_MODEL_PATH; TRAIN_DATA and VAL_DATA), "
            "or OUTPUT_DIR=another/folder for a run"
        )
    if stage.may_go_on(stamp, wanted) and not fresh:
        return
    if stage.precious and stamp.get("hash") != wanted and not fresh:
        raise RunError(
            f"{stage.out} holds a run with other settings or inputs: nothing is overwritten\n"
            "  fix: OUTPUT_DIR=another/folder for a new run, FRESH=1 to replace this one, or --allow-changes to go on "
            "from its last checkpoint"
        )
    ours = stamp.get("entries")  # None: it never finished, so all that was not there before is its own
    for entry in stage.out.iterdir():
        if entry.name in stamp.get("theirs", ()) or (ours is not None and entry.name not in ours):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _names(stage: Stage) -> set[str]:
    """What stands in the stage's folder."""
    return {entry.name for entry in stage.out.iterdir()} if stage.out.is_dir() else set()


def _made(stage: Stage) -> dict[str, str] | None:
    """Content hash of every output; None while one is missing."""
    if not all(output.exists() for output in stage.outputs):
        return None
    return {output.name: content_hash(output) for output in stage.outputs}


def stage_hash(stage: Stage) -> str:
    """sha256 over the version, the settings and the content of every input."""
    digest = hashlib.sha256(f"{__version__}\n{stage.name}\n".encode())
    digest.update(json.dumps(stage.settings, sort_keys=True, default=str).encode())
    for item in stage.inputs:
        digest.update(content_hash(item).encode())
    return digest.hexdigest()


def read_stamp(stage: Stage) -> dict[str, Any]:
    """The stage's stamp; empty where there is none or it can't be read."""
    try:
        stamp = json.loads(stage.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(stage: Stage, stamp: dict[str, Any]) -> None:
    stage.out.mkdir(parents=True, exist_ok=True)
    write_text(stage.stamp, json.dumps({"stage": stage.name, **stamp}, indent=1))
