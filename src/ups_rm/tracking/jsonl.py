"""metrics.jsonl: one JSON object per logged step, appended and flushed: a killed process loses at most one line.

Each line is flat: `{"step": 12, "time": 1767225600.1, "critic/score/mean": 0.41, ...}`; `time` is Unix time in seconds.
A number that is not finite (nan, inf) is written as null, which every JSON reader understands.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ups_rm.durable import write_text
from ups_rm.errors import DataError


class MetricsFile:
    """Appends metrics to a file; a run that goes on from step S first forgets what came after S.

    Args:
        file: usually `<run folder>/metrics.jsonl`; its folder is made if needed.
        resume_step: the last step that the resumed checkpoint has seen; later lines are dropped. None: a new run; a
            file that is already there is kept beside as `metrics.previous.jsonl`.
    """

    def __init__(self, file: Path, *, resume_step: int | None = None) -> None:
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            if resume_step is None:
                self.file.replace(self.file.with_suffix(".previous.jsonl"))
            else:
                _drop_after(self.file, resume_step)
        self._stream = self.file.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line and flush it to the operating system."""
        line = {"step": step, "time": round(time.time(), 3)} | {name: _json_number(v) for name, v in metrics.items()}
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Have every line that was logged on the disk: a power cut does not take it back."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self) -> None:
        self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; null becomes nan, and a last line cut short by a kill is left out.

    Raises:
        DataError: for a broken line that is not the last.
    """
    rows, lines = [], Path(file).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{file}:{number}: not JSON ({error})\n  fix: remove that line") from error
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _drop_after(file: Path, step: int) -> None:
    """Keep the lines up to `step`; a line that a kill cut short goes too. Replaces the file in one go."""
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(file, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_number(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
