"""Digests of a source's blocks, in order, made by this process and by helpers on the other cores.

A helper is `python -m ups_rm.data.block_workers`: blocks come in by its standard input, digests go out by its standard
output, both pickled. Whoever is free takes the next block; this process takes one whenever all helpers have enough to
do. A source below HELP_FROM bytes is not worth a helper's start. A helper's error is raised here; helpers end with
their input, so also when this process is killed.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import Full, Queue
from threading import Thread
from typing import Any

from ups_rm.data.digest import Digest, block_digest
from ups_rm.data.sources import Block, Part
from ups_rm.errors import RunError

HELP_FROM = 24 * 2**20
MOST_HELPERS = 3
WAITING = 3  # blocks per helper that wait for it


@dataclass(frozen=True)
class Wanted:
    """What `block_digest` is to keep of the rows."""

    categories: frozenset[str] = frozenset()
    keep: bool = False


def digests(blocks: Iterable[tuple[Block, Part]], wanted: Wanted, *, helpers: int) -> Iterator[Digest]:
    """One digest per block, in the order of the blocks.

    Raises:
        RunError: a helper died. DataError: from reading the blocks.
    """
    with ExitStack() as stack:
        free = [stack.enter_context(_helper(wanted)) for _ in range(helpers)]
        waiting: list[Queue[Any]] = []  # one place per block under way, in order; filled when it is done
        for block, part in blocks:
            place: Queue[Any] = Queue()
            waiting.append(place)
            if not any(_offered(inbox, (block, part, place)) for inbox in free):
                place.put(block_digest(block, part, wanted.categories, wanted.keep))
            while waiting and (not waiting[0].empty() or len(waiting) > 4 * WAITING * (helpers + 1)):
                yield _result(waiting.pop(0))
        for place in waiting:
            yield _result(place)


def _offered(inbox: Queue[Any], work: tuple[Block, Part, Queue[Any]]) -> bool:
    try:
        inbox.put_nowait(work)
    except Full:
        return False
    return True


def _result(place: Queue[Any]) -> Digest:
    found = place.get()
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, Digest)
    return found


@contextmanager
def _helper(wanted: Wanted) -> Iterator[Queue[Any]]:
    """A helper process with the thread that feeds it; the queue takes (block, part, place for the digest)."""
    command = [sys.executable, "-c", "from ups_rm.data.block_workers import help; help()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    inbox: Queue[Any] = Queue(maxsize=WAITING)
    feeder = Thread(target=_feed, args=(process, inbox, wanted), daemon=True)
    feeder.start()
    try:
        yield inbox
    finally:
        process.kill()  # nothing that it still does is wanted
        inbox.put(None)
        feeder.join()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what it had not read yet
                stream.close()
        process.wait()


def _feed(process: subprocess.Popen[bytes], inbox: Queue[Any], wanted: Wanted) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    while (work := inbox.get()) is not None:
        block, part, place = work
        try:
            pickle.dump((block, part, wanted), process.stdin, protocol=5)
            process.stdin.flush()
            place.put(pickle.load(process.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            message = f"a process that helps to read {part.name} ended (exit code {process.poll()})"
            place.put(RunError(f"{message}\n  fix: see its message above; run it again"))


def help() -> None:
    """What a helper does: blocks from standard input, digests to standard output."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    while True:
        try:
            block, part, wanted = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # its end, or cut short: the other process is gone
            return
        answer = block_digest(block, part, wanted.categories, wanted.keep)
        pickle.dump(answer, sys.stdout.buffer, protocol=5)
        sys.stdout.buffer.flush()
