"""One process at a time: a lock file whose lock the system drops when its process ends, however it ends.

The file stays behind (removing it would let two processes lock two files of one name); only a process that is alive
holds its lock. It says who: pid, host, since when, with which command.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ups_rm.console import console
from ups_rm.errors import RunError


@contextmanager
def only_one(lock_file: Path, *, what: str, fix: str) -> Iterator[None]:
    """Hold the lock of `lock_file` within.

    Args:
        what: is busy, as the message says: "merge/ and Data/ of this folder".
        fix: the way out besides waiting.

    Raises:
        RunError: another process holds it, or the file can't be written.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{lock_file}: can't write there: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{what}: in use by {_holder(lock_file)}\n  fix: wait until it ends, or {fix}") from None
        except OSError as error:  # some network file systems don't lock
            console.print(f"{lock_file} can't be locked ({error.strerror}): start no second run here", markup=False)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_self()).encode())
        yield
    finally:
        os.close(descriptor)  # drops the lock


def is_held(lock_file: Path) -> bool:
    """Whether a process that is alive holds the lock. Looks only: no file is made."""
    try:
        descriptor = os.open(lock_file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def beside(folder: Path) -> Path:
    """The lock file of a folder, next to it, so that the folder itself stays as its owner made it."""
    folder = folder.absolute()
    return folder.parent / f".{folder.name}.ups_rm.lock"


def _self() -> dict[str, str | int]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def _holder(lock_file: Path) -> str:
    """Who holds the lock, as far as the file says it."""
    try:
        told = json.loads(lock_file.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']} since {told['since']} ({told['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process, which has not written who it is into {lock_file} yet"
