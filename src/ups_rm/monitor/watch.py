"""The alarms of a run as it goes: on the console, in the trackers, in `<run folder>/alarms.jsonl`.

`alarms.jsonl` is what the present thresholds say about the run's metrics.jsonl: a resumed run reads the lines up to its
checkpoint again and writes the file anew, so that nothing stands there twice. There is no file while there is no alarm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ups_rm.console import emit, finite, warn
from ups_rm.durable import write_text
from ups_rm.errors import DataError
from ups_rm.monitor.limits import Alarm, Alarms
from ups_rm.recipe import Monitor as MonitorSettings
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.tracking.trackers import Trackers

FILE = "alarms.jsonl"


class Monitor:
    """Stands before the trackers of a run: what is logged through it is also judged.

    Args:
        trackers: of the run; their folder gets the file.
        settings: `recipe.monitor`.
        start: step that the run goes on after; 0: a new one, whose folder may hold an older alarms.jsonl, which is kept
            beside as `alarms.previous.jsonl`.
    """

    def __init__(self, trackers: Trackers, settings: MonitorSettings, start: int = 0) -> None:
        self.trackers, self.alarms = trackers, Alarms(settings)
        self.file = trackers.folder / FILE
        self.stopped_by: Alarm | None = None
        """The first alarm that began in this process and is in `monitor.stop_on`."""
        if start == 0 and self.file.exists():
            self.file.replace(self.file.with_suffix(".previous.jsonl"))
        metrics = trackers.folder / "metrics.jsonl"
        rows = read_metrics(metrics) if start and metrics.exists() else []
        self.raised = [alarm for row in rows for alarm in self.alarms.see(row, int(row["step"]))]
        if start:
            self._write()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics with `alarm/count` and the alarms that are on; show and write those that begin."""
        begun = self.alarms.see(metrics, step)
        on = {f"alarm/{name}": 1.0 for name in sorted(self.alarms.active)}
        logged = {**metrics, "alarm/count": float(len(on)), **on}
        self.trackers.log(logged, step)
        emit("step", step=step, metrics=logged)
        for alarm in begun:
            warn(f"alarm at step {alarm.step}: {alarm.name}: {alarm.message}", style="bold red")
            emit("alarm", **asdict(alarm))
        if begun:
            self.raised += begun
            self._write()
        self.stopped_by = self.stopped_by or next((alarm for alarm in begun if alarm.stop), None)

    def _write(self) -> None:
        """The whole file in one go; one that can't be written warns and costs no training."""
        try:
            if not self.raised:
                self.file.unlink(missing_ok=True)
                return
            lines = [json.dumps(finite(asdict(alarm)), allow_nan=False) for alarm in self.raised]
            write_text(self.file, "\n".join(lines) + "\n")
        except OSError as error:
            warn(f"{self.file} can't be written, training goes on: {error}")


def stop_message(alarm: Alarm, done: int, checkpoint: Path | None) -> str:
    """What the console says where `monitor.stop_on` ended a training."""
    saved = "no checkpoint was written" if checkpoint is None else f"checkpoint: {checkpoint}"
    if checkpoint is not None and checkpoint.name == f"global_step_{done}":
        goes_on = "the same command goes on from there, past this alarm"
    else:
        goes_on = "the same command comes to this alarm again; without it in monitor.stop_on it goes on"
    return (
        f"stopped after step {done} by the alarm {alarm.name} (monitor.stop_on); {saved}\n"
        f"  {goes_on}; ups-rm groups RUN --step {done} shows the replies"
    )


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms of a run folder in order; none where it has no alarms.jsonl.

    Raises:
        DataError: a line is not one of ours.
    """
    file = Path(folder) / FILE
    if not file.exists():
        return []
    alarms = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            alarms.append(Alarm(**row | {"value": math.nan if row["value"] is None else row["value"]}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}:{number}: not an alarm ({error})\n  fix: remove that line") from error
    return alarms
