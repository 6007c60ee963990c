"""Output folders that never hold half of anything: everything is written beside, then renamed into place.

`staging(out)` gives a temporary folder inside `out`; `publish` moves its finished files over the old ones. If the
process is killed or the disk fills up, the old files stand untouched and the next run sweeps up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ups_rm.durable import manifest_of, note_file, replace_files
from ups_rm.errors import RunError

_PREFIX = ".prepare-"
_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file size limit hit",
}


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder in `out`, on the same disk, gone afterwards. One process at a time may stage in a folder.

    Raises:
        RunError: another process is writing there, the folder can't be made, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"{out}: can't write there: {error.strerror}") from error
    try:
        _lock(folder, out)
        for left in out.glob(f"{_PREFIX}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=out))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(out).free
        raise RunError(
            f"{out}: {_FULL[error.errno]} ({free / 2**20:.0f} MiB free); nothing was replaced\n"
            "  fix: make room, or choose another output folder"
        ) from error
    finally:
        os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{out}: another process is writing to this folder; wait for it or choose another one") from None
    except OSError:
        return  # some network file systems don't lock folders; the renames are atomic there too


def publish(stage: Path, out: Path, names: Sequence[str]) -> None:
    """Moves the finished files from `stage` over those in `out`, flushed to disk first, in the order given.

    Each gets a manifest, unless one stands beside it already.
    """
    for name in names:
        if not manifest_of(stage / name).exists():
            note_file(stage / name)
    replace_files({stage / name: out / name for name in names})
