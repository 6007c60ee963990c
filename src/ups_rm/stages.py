"""Stages that know whether they are done: a stamp with the hash of all inputs and settings stands beside the outputs.

A stage whose stamp fits is skipped. One whose output folder holds something that no stage wrote is refused, so that
nothing of the user's is overwritten. Large files are hashed once and remembered by size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ups_rm import __version__
from ups_rm.console import console
from ups_rm.errors import RunError
from ups_rm.models import cache_folder

STAMP = ".ups_rm_stage.json"


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        name: as the user sees it, and as `summary.json` names its seconds.
        inputs: files or folders whose content decides the result.
        settings: everything else that decides it; JSON.
        out: the folder that it owns and where its stamp stands.
        outputs: files or folders that must be there afterwards.
        action: does the work; called with nothing.
        keeps_partial: an unfinished `out` with the same hash is gone on with.
        precious: an `out` of other settings or inputs is never replaced unasked (others are made anew).
    """

    name: str
    inputs: Sequence[Path | str]
    settings: dict[str, Any]
    out: Path
    outputs: Sequence[Path]
    action: Callable[[], object]
    keeps_partial: bool = False
    precious: bool = False


def run_stage(stage: Stage, *, fresh: bool = False) -> float:
    """Do the stage unless it is done; returns the seconds it took (those of the first time where it is skipped).

    Raises:
        RunError: `out` holds files that no stage of ours wrote, or the action left an output unmade.
    """
    wanted = stage_hash(stage)
    stamp = read_stamp(stage)
    done = stamp.get("hash") == wanted and stamp.get("done") and all(output.exists() for output in stage.outputs)
    if done and not fresh:
        console.print(f"[green]✓[/green] {stage.name}: done before, skipped ({stage.out})", soft_wrap=True)
        return float(stamp["seconds"])
    _clear(stage, stamp, wanted, fresh)
    console.rule(f"[bold]{stage.name}")
    started = perf_counter()
    _write_stamp(stage, {"hash": wanted, "done": False})
    stage.action()
    missing = [str(output) for output in stage.outputs if not output.exists()]
    if missing:
        raise RunError(f"stage {stage.name} ended without making {', '.join(missing)}")
    seconds = (
        perf_counter() - started + float(stamp.get("seconds", 0.0) if stamp.get("hash") == wanted and not fresh else 0)
    )
    _write_stamp(stage, {"hash": wanted, "done": True, "seconds": seconds})
    console.print(f"[green]✓[/green] {stage.name}: {seconds:.0f} s", soft_wrap=True)
    return seconds


def _clear(stage: Stage, stamp: dict[str, Any], wanted: str, fresh: bool) -> None:
    if not stage.out.exists() or not any(stage.out.iterdir()):
        return
    if not stamp and not fresh:
        raise RunError(
            f"{stage.out} is not empty and was not made by this command: nothing is overwritten\n"
            f"  fix: move it away, point to another folder, or FRESH=1 to replace it"
        )
    if stage.keeps_partial and stamp.get("hash") == wanted and not fresh:
        return
    if stage.precious and stamp.get("hash") != wanted and not fresh:
        raise RunError(
            f"{stage.out} holds a run with other settings or inputs: nothing is overwritten\n"
            "  fix: OUTPUT_DIR=another/folder for a new run, or FRESH=1 to replace this one"
        )
    for entry in stage.out.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def stage_hash(stage: Stage) -> str:
    """sha256 over the version, the settings and the content of every input."""
    digest = hashlib.sha256(f"{__version__}\n{stage.name}\n".encode())
    digest.update(json.dumps(stage.settings, sort_keys=True, default=str).encode())
    for item in stage.inputs:
        digest.update(content_hash(item).encode())
    return digest.hexdigest()


def content_hash(item: Path | str) -> str:
    """sha256 of a file, or of a folder's files with their names; of the text itself for what is not on disk."""
    path = Path(item)
    if not path.exists():
        return hashlib.sha256(str(item).encode()).hexdigest()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != STAMP)
    digest = hashlib.sha256()
    known = _Digests()
    for file in files:
        digest.update(f"{file.relative_to(path) if file != path else ''}\0{known.of(file)}\n".encode())
    known.save()
    return digest.hexdigest()


class _Digests:
    """sha256 of files, remembered in the user's cache by path, size and modification time."""

    def __init__(self) -> None:
        self.file = cache_folder() / "digests.json"
        try:
            self.known: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}
        self.changed = False

    def of(self, file: Path) -> str:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self.known:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            if stat.st_size < 1 << 20:
                return digest.hexdigest()  # quick to read again: not worth remembering
            self.known[key], self.changed = digest.hexdigest(), True
        return self.known[key]

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(list(self.known.items())[-1000:])), encoding="utf-8")
            temporary.replace(self.file)
        except OSError:
            return  # only a cache: the next run hashes again


def read_stamp(stage: Stage) -> dict[str, Any]:
    """The stage's stamp; empty where there is none or it can't be read."""
    try:
        stamp = json.loads((stage.out / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(stage: Stage, stamp: dict[str, Any]) -> None:
    stage.out.mkdir(parents=True, exist_ok=True)
    temporary = stage.out / f"{STAMP}.tmp"
    temporary.write_text(json.dumps({"stage": stage.name, **stamp}, indent=1), encoding="utf-8")
    temporary.replace(stage.out / STAMP)
