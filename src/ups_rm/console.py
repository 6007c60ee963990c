"""The one console and the one progress bar that every command shares.

On a terminal the bar is live; in a log file it is one line per tenth of the way, so that a log stays readable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_WIDTH = 120
"""Columns of what is not a terminal (a log file, a notebook's pipe), unless COLUMNS says otherwise."""


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


console = Console(highlight=False, width=_width(sys.stdout))
err_console = Console(stderr=True, highlight=False, width=_width(sys.stderr))


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress_bar(description: str, total: int, *, unit: str = "", enabled: bool = True) -> Iterator[Advance]:
    """A progress bar over `total` steps; yields `advance(steps=1, note="")`.

    Example: `with progress_bar("scoring", len(batches)) as advance: ...; advance(note="512 tok/s")`
    """
    if not enabled or total <= 0:
        yield lambda steps=1, note="": None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                progress.update(task, advance=steps, note=note)

            yield advance
        return

    start, done, shown = perf_counter(), 0, 0

    def advance_lines(steps: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += steps
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            line = f"{description}: {done}/{total} {unit} {perf_counter() - start:.0f} s {note}"
            console.print(line.rstrip(), soft_wrap=True)

    yield advance_lines
