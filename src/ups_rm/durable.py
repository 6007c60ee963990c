"""Files and folders that a crash can't leave half: written beside, flushed to the disk, renamed into place.

What is published carries a manifest, size and sha256 of every file, so that one that was torn by a power cut or whose
bits turned on the disk is known before it is read: a folder `manifest.json` in it (`damage`), a single file X
`.X.manifest.json` beside it (`check_file`). Nothing here knows what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ups_rm.errors import RunError, UpsRmError

MANIFEST = "manifest.json"


@contextmanager
def publishing(file: Path, *, manifest: bool = True) -> Iterator[Path]:
    """A name to write to; after the block `file` is replaced by what stands there, as a whole, and gets its manifest.

    The folder is made if needed. A block that raises leaves the old file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        if manifest:
            note_file(temporary, name=file.name)
        replace_files({temporary: file})
    finally:
        temporary.unlink(missing_ok=True)
        manifest_of(temporary).unlink(missing_ok=True)


def write_text(file: Path, text: str, *, manifest: bool = False) -> None:
    """Replace what the file holds, as a whole; its folder is made if needed."""
    with publishing(file, manifest=manifest) as temporary:
        temporary.write_text(text, encoding="utf-8")


def manifest_of(file: Path) -> Path:
    """Where the manifest of a single file stands: hidden, so that a reader of all `*.json` passes it over."""
    return file.with_name(f".{file.name}.{MANIFEST}")


def note_file(file: Path, *, name: str | None = None) -> str:
    """Write the manifest of a file, under another `name` where it is to be renamed to that; its sha256."""
    entry = _entry(file)
    manifest_of(file).write_text(_listing({name or file.name: entry}), encoding="utf-8")
    return str(entry["sha256"])


def replace_files(moves: Mapping[Path, Path]) -> None:
    """Flush files and rename them, in this order, with their manifests where they have any.

    Old manifests go first and new ones come last: a kill in between leaves whole files without one.
    """
    folders = {to.parent for to in moves.values()}
    notes = {manifest_of(file): manifest_of(to) for file, to in moves.items()}
    for file in (*moves, *notes):
        if file.exists():
            _sync_file(file)
    old = [note for note in notes.values() if note.exists()]
    for note in old:
        note.unlink()
    for folder in folders if old else ():
        sync_folder(folder)
    for file, to in moves.items():
        file.replace(to)
    for note, to in notes.items():
        if note.exists():
            note.replace(to)
    for folder in folders:
        sync_folder(folder)


def remove_file(file: Path) -> None:
    """Remove a file and its manifest."""
    file.unlink(missing_ok=True)
    manifest_of(file).unlink(missing_ok=True)


def publish_folder(temporary: Path, final: Path, mark: Callable[[], object] | None = None) -> None:
    """Add the manifest, flush every file, and move the folder into place; what stood there is removed just before.

    Args:
        mark: writes what says that the folder is whole; called when the old one is gone, so that a kill never leaves
            the new mark beside it. If it fails, the folder stands there without.
    """
    write_manifest(temporary)
    sync_tree(temporary)
    remove_folder(final)
    try:
        if mark is not None:
            mark()
    finally:
        temporary.replace(final)
    sync_folder(final.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders' names, to the disk."""
    for file in _files(folder):
        _sync_file(file)
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
    for pattern in (".*.tmp", f"..*.tmp.{MANIFEST}", ".*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_manifest(folder: Path, pattern: str = "*") -> None:
    """`manifest.json`: {"files": {name: {"size": bytes, "sha256": hex}}}; an older one is replaced.

    Args:
        pattern: only files of such names: what else the folder holds may be edited later.
    """
    files = {
        file.relative_to(folder).as_posix(): _entry(file)
        for file in _files(folder)
        if file != folder / MANIFEST and file.match(pattern)
    }
    write_text(folder / MANIFEST, _listing(files))


def damage(folder: Path) -> str | None:
    """What is wrong with a folder against its manifest, by file; None where every byte is as it was written."""
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing, so it was not written to its end"
    return _damage(folder / MANIFEST)


def file_damage(file: Path) -> str | None:
    """What is wrong with a file against the manifest beside it; None where nothing is, and where one is missing."""
    note = manifest_of(file)
    return _damage(note) if note.exists() and file.exists() else None


def check_file(file: Path, error: type[UpsRmError], fix: str) -> None:
    """Refuse a file of ours that is not as it was written; one without a manifest passes.

    Args:
        fix: the way out, besides removing the manifest.

    Raises:
        error: with the file and what is wrong with it.
    """
    if (wrong := file_damage(file)) is not None:
        raise error(f"{file} is damaged: {wrong}\n  fix: {fix}; where the change was meant, remove {manifest_of(file)}")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _entry(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}


def _listing(files: Mapping[str, Mapping[str, int | str]]) -> str:
    return json.dumps({"files": files}, indent=1) + "\n"


def _damage(manifest: Path) -> str | None:
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        told = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest.name} can't be read ({type(error).__name__})"
    for name, (size, sha256) in told.items():
        file = manifest.parent / name
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


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
