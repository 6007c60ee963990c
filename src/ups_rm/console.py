"""The one console and the one progress bar that every command shares.

On a terminal the bar is live; in a log file it is one line per tenth of the way, so that a log stays readable.
`--quiet` leaves warnings, alarms and errors (on stderr); `--json` makes stdout one JSON object per line, see `emit`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_WIDTH = 120
"""Columns of what is not a terminal (a log file, a notebook's pipe), unless COLUMNS says otherwise."""


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


console = Console(highlight=False, width=_width(sys.stdout))
err_console = Console(stderr=True, highlight=False, width=_width(sys.stderr))


_events = False


def set_output(*, quiet: bool = False, events: bool = False) -> None:
    """What stdout carries from now on: text for people, nothing (`quiet`), or events (`--json`) and nothing else."""
    global _events
    _events, console.quiet = events, quiet or events


def warn(message: str, style: str = "") -> None:
    """One line on stderr; where that and stdout are one terminal, above the live line instead of into it."""
    above = console.is_terminal and err_console.is_terminal and not console.quiet
    (console if above else err_console).print(message, style=style, markup=False, soft_wrap=True)


def emit(event: str, **fields: Any) -> None:
    """With `--json` one line on stdout: `{"event": ..., ...}`; else nothing. A number that is not finite is null."""
    if _events:
        sys.stdout.write(json.dumps({"event": event, **finite(fields)}, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()


def finite(value: Any) -> Any:
    """Copy with every nan or infinite number as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress_bar(
    description: str, total: int, *, unit: str = "", enabled: bool = True, done: int = 0
) -> Iterator[Advance]:
    """A progress bar over `total` steps, `done` of them before; yields `advance(steps=1, note="")`.

    Example: `with progress_bar("scoring", len(batches)) as advance: ...; advance(note="512 tok/s")`
    """
    if not enabled or console.quiet or total <= done:
        yield lambda steps=1, note="": None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # steps may take minutes: the time left is judged by all of them, not by rich's last half minute
        with Progress(*columns, console=console, speed_estimate_period=1e9) as progress:
            task = progress.add_task(description, total=total, completed=done, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                progress.update(task, advance=steps, note=note)

            yield advance
        return

    start, shown = perf_counter(), 10 * done // total

    def advance_lines(steps: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += steps
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            line = f"{description}: {done}/{total} {unit} {perf_counter() - start:.0f} s {note}"
            console.print(line.rstrip(), soft_wrap=True)

    yield advance_lines
