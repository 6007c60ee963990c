"""Files and folders that a crash can't leave half: written beside, flushed to the disk, renamed into place.

A folder that is published carries `manifest.json`: size and sha256 of its files, so that one that was torn by a power
cut or whose bits turned on the disk is known before it is read (`damage`). Nothing here knows what is in them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ups_rm.data.files import file_sha256
from ups_rm.errors import RunError

MANIFEST = "manifest.json"


def write_text(file: Path, text: str) -> None:
    """Replace what the file holds, as a whole; its folder is made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Add the manifest, flush every file, and move the folder into place; what stood there is removed just before."""
    write_manifest(temporary)
    sync_tree(temporary)
    remove_folder(final)
    temporary.replace(final)
    sync_folder(final.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders' names, to the disk."""
    for file in _files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


def remove_folder(folder: Path) -> None:
    """Remove it so that a kill in between leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left under temporary names."""
    for pattern in (".*.tmp", ".*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_manifest(folder: Path, pattern: str = "*") -> None:
    """`manifest.json`: {"files": {name: {"size": bytes, "sha256": hex}}}; an older one is replaced.

    Args:
        pattern: only files of such names: what else the folder holds may be edited later.
    """
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in _files(folder)
        if file != folder / MANIFEST and file.match(pattern)
    }
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder against its manifest, by file; None where every byte is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        told = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__})"
    for name, (size, sha256) in told.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} bytes, {size} were written"
        if file_sha256(file) != sha256:
            return f"{name} has other bytes than were written (sha256 differs)"
    return None


def require_space(folder: Path, needed: int, what: str) -> None:
    """Whether `needed` bytes fit on the folder's disk, with a twentieth to spare.

    Raises:
        RunError: they don't; nothing was touched.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise RunError(
            f"{what} can't be written: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free at {folder}; what "
            "was written before is untouched\n"
            "  fix: free space; fewer checkpoints are trainer.max_ckpt_to_keep=1; the same command then goes on"
        )


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk: a rename is not safe from a power cut before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return  # some network file systems don't sync folders; the rename is as safe there as they make it
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
