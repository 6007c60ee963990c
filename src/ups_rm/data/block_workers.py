"""Digests of a source's blocks, in order, made by this process and by helpers on the other cores.

A helper is a Python process at the other end of a pipe: blocks go in, digests come out. Of a plain file it is told
where to read, and gets some blocks ahead; this process makes a digest itself whenever all helpers have enough to do,
and waits for them when it is MOST_UNDER_WAY blocks ahead. A helper's error is raised here. Helpers end with their pipe,
so also when this process is killed; Ctrl-C reaches this process only.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from ups_rm.data.digest import Digest, block_digest
from ups_rm.data.sources import Block, Part
from ups_rm.errors import RunError

HELP_FROM = 24 * 2**20
"""Bytes of a source that are worth the start of a helper."""
MOST_HELPERS = 3
AHEAD = 3
"""Blocks that a helper is given at once."""
MOST_UNDER_WAY = 64
"""Blocks whose digests may wait for an earlier one."""


@dataclass(frozen=True)
class Wanted:
    """What `block_digest` is to keep of the rows."""

    categories: frozenset[str] = frozenset()
    keep: bool = False
    keep_categories: bool = False


@dataclass
class _Task:
    """A block under way; `digest` is there when it is done."""

    block: Block
    part: Part
    digest: Digest | None = None


class _Helper:
    """This end of the pipe, and the tasks that the other end has."""

    def __init__(self, pipe: Connection, wanted: Wanted) -> None:
        self.pipe, self.wanted = pipe, wanted
        self.tasks: deque[_Task] = deque()

    def takes(self, task: _Task) -> bool:
        """Hand it a task, if it has too few. It gets the bytes of a block only when it waits for them, so that never
        both ends write."""
        if len(self.tasks) >= (AHEAD if task.block.path is not None else 1):
            return False
        self.tasks.append(task)
        try:
            self.pipe.send((task.block, task.part, self.wanted))
        except OSError:
            self._died()
        return True

    def collect(self, block: bool = False) -> None:
        """Take what is done; with `block`, wait for one."""
        while self.tasks and (block or self.pipe.poll()):
            try:
                found = self.pipe.recv()
            except (EOFError, OSError):
                self._died()
            if isinstance(found, BaseException):
                raise found
            self.tasks.popleft().digest = found
            block = False

    def _died(self) -> NoReturn:
        raise RunError(
            f"a process that helps to read {self.tasks[0].part.name} ended\n  fix: see its message above; run it again"
        )


def digests(blocks: Iterable[tuple[Block, Part]], wanted: Wanted, *, helpers: int) -> Iterator[Digest]:
    """One digest per block, in the order of the blocks; rejects are numbered through their part.

    Raises:
        RunError: a helper died. DataError: from reading the blocks.
    """
    lines, last_part = 0, None
    for task in _done(blocks, wanted, helpers):
        found = task.digest
        assert found is not None
        if task.part is not last_part:
            lines, last_part = 0, task.part
        yield replace(found, rejects=[replace(one, line=one.line + lines) for one in found.rejects])
        lines += found.lines


def _done(blocks: Iterable[tuple[Block, Part]], wanted: Wanted, helpers: int) -> Iterator[_Task]:
    with ExitStack() as stack:
        team = [stack.enter_context(_helper(wanted)) for _ in range(helpers)]
        under_way: deque[_Task] = deque()
        for block, part in blocks:
            task = _Task(block, part)
            under_way.append(task)
            if not any(helper.takes(task) for helper in team):
                task.digest = block_digest(block, part, wanted.categories, wanted.keep, wanted.keep_categories)
                for helper in team:
                    helper.collect()
            while under_way[0].digest is None and len(under_way) > MOST_UNDER_WAY:
                for helper in team:
                    helper.collect(block=True)
            while under_way and under_way[0].digest is not None:
                yield under_way.popleft()
        for helper in team:
            while helper.tasks:
                helper.collect(block=True)
        yield from under_way


@contextmanager
def _helper(wanted: Wanted) -> Iterator[_Helper]:
    ours, theirs = Pipe()
    code = (
        f"import sys; sys.path[:] = {sys.path}; from ups_rm.data.block_workers import serve; serve({theirs.fileno()})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    try:
        yield _Helper(ours, wanted)
    finally:
        process.kill()  # nothing that it still does is wanted
        process.wait()
        ours.close()


def serve(descriptor: int) -> None:
    """What a helper does: digests for blocks, until the other end of the pipe is closed."""
    pipe: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            block, part, wanted = pipe.recv()
        except (EOFError, OSError):  # closed, or the other process was killed
            return
        try:
            answer: Any = block_digest(block, part, wanted.categories, wanted.keep, wanted.keep_categories)
        except Exception as error:  # raised at the other end
            answer = error
        pipe.send(answer)
