"""Runs the unmodified `verl.trainer.main_ppo` in a process of its own, and leaves none behind.

verl's output goes to `<run folder>/verl/console.log`; on our console one line per step is shown, and on failure verl's
last error. Whatever ends the run (success, error, Ctrl-C, a time limit), every process that was started for it is
ended: each carries a mark in its environment, and only marked ones are touched. On other nodes of a Ray cluster the
job's actors end with the driver.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from time import monotonic, sleep
from typing import IO, Any

from ups_rm import errors
from ups_rm.distributed.failures import FAILURE_FILE, read_failure
from ups_rm.errors import RunError, UpsRmError

MARK = "UPS_RM_VERL_RUN"
"""Environment variable that every process of a run carries."""
LAUNCHER = "UPS_RM_LAUNCHER"
"""Environment variable: process id of the command that started verl."""
TAIL = 2000
"""Last lines of verl's output that are searched for the error."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
RAY_PREFIX = re.compile(r"^\([A-Za-z_]\w*( pid=\d+)?(, ip=[\d.]+)?\) ")
ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt))(?:\([^)]*\))?: ?(.*)")


@dataclass
class VerlProcess:
    """One run of a command, its output kept in a file.

    Attributes:
        metrics_file: what verl's `file` tracker writes, read as it grows.
        on_metrics: called with (metrics, step) for each new line of it.
        time_limit, silence_limit: seconds; negative: none.
        grace: seconds that verl gets to end by itself after Ctrl-C.
        run_folder: where our trainer notes why it failed (failures.py); None where it is not ours that runs.
    """

    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    metrics_file: Path
    on_metrics: Callable[[dict[str, float], int], None]
    time_limit: float = -1.0
    silence_limit: float = -1.0
    grace: float = 20.0
    run_folder: Path | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    _heard: float = 0.0
    _read: int = 0

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Run to the end; False where `stop()` ended it early.

        Raises:
            UpsRmError: verl failed (of the class that our own code raised in one of its processes, else RunError), or
                a limit was reached.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.run_folder is not None:
            (self.run_folder / FAILURE_FILE).unlink(missing_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            process = Popen(
                self.command,
                env={**self.env, MARK: self.mark, LAUNCHER: str(os.getpid())},
                stdout=PIPE,
                stderr=STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to us alone
            )
            assert process.stdout is not None
            reader = threading.Thread(target=self._copy, args=(process.stdout, log), daemon=True)
            try:
                reader.start()
                why = self._watch(process, stop)
            finally:
                self._end(process)
                end_marked(self.mark)
                reader.join(timeout=10)
            self._take_metrics()
        if why == "stopped":
            return False
        if why:
            raise RunError(f"{why}\n  see {self.log}, which ends with:\n{self._last_lines(8)}")
        if process.returncode != 0:
            raise self._failure(process.returncode)
        return True

    def _watch(self, process: Popen[str], stop: Callable[[], bool]) -> str:
        """Wait for the end; "" if it ended by itself, "stopped", or the limit that was reached."""
        started = self._heard = monotonic()
        while process.poll() is None:
            self._take_metrics()
            now = monotonic()
            if stop():
                return "stopped"
            if 0 < self.time_limit < now - started:
                return f"verl ran longer than verl.time_limit={self.time_limit:g} s and was ended"
            if 0 < self.silence_limit < now - self._heard:
                return (
                    f"verl has printed nothing for verl.silence_limit={self.silence_limit:g} s and was ended: "
                    "it seems to hang"
                )
            sleep(0.2)
        return ""

    def _copy(self, source: IO[str], log: IO[str]) -> None:
        for line in source:
            log.write(line)
            log.flush()
            self.tail.append(ANSI.sub("", line.rstrip("\n")))
            self._heard = monotonic()

    def _take_metrics(self) -> None:
        """Hand on what the metrics file has gained; a line that is not whole yet is left for the next time."""
        if not self.metrics_file.is_file():
            return
        with self.metrics_file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                row = json.loads(line)
                self.on_metrics(numbers_of(row["data"]), int(row["step"]))

    def _end(self, process: Popen[str]) -> None:
        """Ask (SIGINT), wait, then insist: the driver and its group."""
        for number, seconds in ((signal.SIGINT, self.grace), (signal.SIGKILL, 20.0)):
            if process.poll() is not None:
                return
            os.killpg(process.pid, number)
            deadline = monotonic() + seconds
            while process.poll() is None and monotonic() < deadline:
                sleep(0.1)

    def _failure(self, code: int) -> UpsRmError:
        """What ended verl: the error that our trainer noted, else one of ours that was printed, else the last one."""
        noted = None if self.run_folder is None else read_failure(self.run_folder)
        if noted is not None:
            return type(noted)(f"{noted}\n  in verl's run, see {self.log}")
        last = ""
        lines = [RAY_PREFIX.sub("", line) for line in self.tail]
        for number, line in enumerate(lines):
            found = ERROR_LINE.match(line)
            if found is None:
                continue
            ours = getattr(errors, found[1], None)
            if isinstance(ours, type) and issubclass(ours, UpsRmError):
                fix = next((text for text in lines[number + 1 : number + 4] if text.lstrip().startswith("fix:")), None)
                return ours(found[2] + (f"\n  {fix.strip()}" if fix else "") + f"\n  in verl's run, see {self.log}")
            if found[2]:
                last = f"{found[1]}: {found[2]}"
        return RunError(
            f"verl ended with exit code {code}: {last or 'no error was printed'}\n  see {self.log}, which ends with:\n"
            + self._last_lines(8)
        )

    def _last_lines(self, count: int) -> str:
        return "\n".join(f"    {line[:300]}" for line in list(self.tail)[-count:])


def numbers_of(data: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers."""
    return {name: float(value) for name, value in data.items() if isinstance(value, (int, float))}


def marked_processes(mark: str) -> list[Any]:
    """Processes of this machine (psutil) that carry the mark."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or another user's
    return found


def end_marked(mark: str, patience: float = 10.0) -> None:
    """End every process that carries the mark, and wait until they are gone."""
    import psutil

    deadline = monotonic() + patience
    while found := marked_processes(mark):
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=2)
        if monotonic() > deadline:
            raise RunError(f"processes {[process.pid for process in found]} of verl's run can't be ended")


def python_command(overrides: Sequence[str], folder: Path) -> list[str]:
    """The command that runs verl; Hydra's own files go to `folder` instead of ./outputs."""
    from ups_rm.distributed.translate import hydra_value

    hydra = [f"hydra.run.dir={hydra_value(str(folder.absolute()))}", "hydra.output_subdir=hydra"]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, *hydra]
