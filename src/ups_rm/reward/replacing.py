"""What `--force` may replace: folders that we made, and nothing else, however the path was mistyped."""

from __future__ import annotations

import json
from pathlib import Path

from ups_rm import __version__
from ups_rm.errors import RMError

MADE_BY = "ups_rm_made_by.json"
"""Stands in folders that `rm trim` and `rm train --lora` write: a Hugging Face folder alone could be anyone's."""


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Nothing there, an empty folder, or (with `overwrite`) a folder of ours.

    Raises:
        RMError: something else stands there; it is left alone.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RMError(f"{out} exists and is not empty\n  fix: another folder, or --force to replace it")
    if strange := _not_ours(out):
        raise RMError(
            f"{out} {strange}: it is not replaced, not even with --force\n  fix: another folder, or move this one away"
        )


def mark_as_ours(folder: Path, command: str) -> None:
    """Say which command made the folder, so that it may replace it."""
    made = {"made_by": command, "version": __version__}
    (folder / MADE_BY).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _not_ours(out: Path) -> str:
    """Why `out` is neither an RM folder nor one that carries our mark; empty if it is."""
    if not out.is_dir():
        return "is a file"
    if inner := next((entry.name for entry in sorted(out.iterdir()) if entry.is_dir()), None):
        return f"holds a folder ({inner}), which no folder of ours does"
    if (out / MADE_BY).is_file():
        return ""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        is_rm = "MyRM" in json.dumps(config.get("auto_map", {}))
    except (OSError, ValueError, AttributeError):
        is_rm = False
    return "" if is_rm else "is not a reward model's folder, nor one that ups-rm made"
