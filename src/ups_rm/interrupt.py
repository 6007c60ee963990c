"""Ctrl-C that lets a training end in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ups_rm.console import console


@dataclass
class StopRequest:
    requested: bool = False


@contextmanager
def interruptible(what: str = "stopping after this step, with a checkpoint") -> Iterator[StopRequest]:
    """Within: the first Ctrl-C (or SIGTERM) asks the loop to stop, `what` says how; the second one stops at once."""
    stop = StopRequest()
    previous: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        console.print(f"\n{what} (once more: stop at once)")

    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            previous[which] = signal.signal(which, ask)
    except ValueError:  # not in the main thread, for example in a notebook's executor: Ctrl-C stays as it was
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
