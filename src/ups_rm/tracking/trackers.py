"""Sends each step's metrics to every tracker that the recipe names in `trainer.logger`.

`console` and `jsonl` are ours; `wandb`, `tensorboard` and the rest come from `accelerate.tracking`. `metrics.jsonl` is
always written, whether or not `jsonl` is named. A tracker that is named but not installed stops the run before it
starts; one that fails later only warns: a lost curve must not cost a training run. Those of accelerate, which may wait
for a network, live on a thread each, calls in order: a step waits for none of them, nor they for one another.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol

from ups_rm.console import console, warn
from ups_rm.errors import RunError
from ups_rm.tracking.console_line import ConsoleLine
from ups_rm.tracking.jsonl import MetricsFile, read_metrics
from ups_rm.tracking.wandb_run import WandbRun, start_wandb

EXTRAS = ("wandb", "tensorboard")
"""Trackers that an extra of this package installs: pip install "ups-rm[NAME]"."""

PACKAGES = {"comet_ml": "comet-ml"}
"""What to install for the others where the package is not called like the tracker."""

RUN_NAME_ARGUMENT = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}
"""How each tracker's start function calls the name of a run within its project."""

BEFORE_ANY = -1
"""`resume_step` of a run that was killed before its first checkpoint: it writes every point anew, under its old id."""

HERE = ("console", "jsonl")
"""Written on the training thread: they take no time, and metrics.jsonl is there when a step is over."""

MAX_FAILURES = 3
"""A tracker that fails this often in a row is left alone: checkpoints and the end shall not wait for its time-outs."""

PATIENCE = 10.0
"""Seconds that a checkpoint, or an error that ends the run, waits for trackers that are behind."""


class Tracker(Protocol):
    """What `Trackers` needs of a tracker."""

    def log(self, values: Any, step: int) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """All trackers of one run behind one `log`.

    Args:
        loggers: names from `trainer.logger`: console, jsonl (verl's name `file` works too), wandb, tensorboard, and the
            others of accelerate: aim, clearml, comet_ml, dvclive, mlflow, swanlab, trackio.
        project_name: groups runs on wandb and the like.
        experiment_name: this run.
        folder: the run folder; takes `metrics.jsonl`, `tensorboard/`, `wandb/`.
        config: the resolved recipe, nested mappings; stored with the run where the tracker can.
        resume_step: last step of the checkpoint that training goes on from; None for a new run.
        run_ids: ids of the trackers' runs to go on with, as a checkpoint names them.
        total_steps: shown on the console line.

    Attributes:
        run_ids: tracker -> id of its run, where it has one.

    Raises:
        RunError: a name that is unknown or whose package is not installed, with the pip command.
    """

    def __init__(
        self,
        loggers: Sequence[str],
        *,
        project_name: str,
        experiment_name: str,
        folder: Path,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        run_ids: Mapping[str, str] | None = None,
        total_steps: int | None = None,
    ) -> None:
        names = list(dict.fromkeys("jsonl" if name == "file" else name for name in loggers))
        for name in names:
            _check_available(name)
        self.folder = Path(folder)
        self._failures: dict[str, int] = {}
        self._metrics = MetricsFile(self.folder / "metrics.jsonl", resume_step=resume_step)
        self._trackers: dict[str, Tracker] = {"jsonl": self._metrics}
        self.run_ids: dict[str, str] = {}
        if "console" in names:
            self._trackers["console"] = ConsoleLine(total_steps)
        # mlflow's run belongs to the thread that began it
        self._threads = {name: OneThread(name) for name in names if name not in HERE}
        self._sent: list[Future[None]] = []

        def begin(name: str) -> None:
            known_id = (run_ids or {}).get(name)
            try:
                started = _start(name, project_name, experiment_name, self.folder, config, resume_step, known_id)
            except Exception as error:
                warn(f"tracker {name} did not start, training goes on without it: {error}")
                return
            self._trackers[name] = started
            if isinstance(started, WandbRun):
                self.run_ids[name] = started.run_id
                if resume_step is not None:
                    started.catch_up(read_metrics(self._metrics.file))

        for name, thread in self._threads.items():
            thread.call(begin, name).result()

    @property
    def names(self) -> list[str]:
        """The trackers that are still logged to."""
        return list(self._trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step everywhere, on accelerate's trackers in a moment. Values: Python, numpy or 0-dim torch numbers.

        A tracker that raises is reported once and dropped after `MAX_FAILURES` failures in a row.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        self._sent = [sent for sent in self._sent if not sent.done()]
        for name in list(self._trackers):
            if name in HERE:
                self._log(name, numbers, step)
            else:
                self._sent.append(self._threads[name].call(self._log, name, numbers, step))

    def _log(self, name: str, numbers: Mapping[str, float], step: int) -> None:
        tracker = self._trackers.get(name)
        if tracker is None:  # left alone since
            return
        try:
            tracker.log(dict(numbers), step=step)
            self._failures.pop(name, None)
        except Exception as error:
            self._report(name, error)

    def sync(self) -> None:
        """Have metrics.jsonl on the disk, before a checkpoint that has seen its steps is; the others get `PATIENCE`.

        Raises:
            RunError: it can't be; a checkpoint now would go on with a hole in the metrics.
        """
        try:
            self._metrics.sync()
        except OSError as error:
            raise RunError(
                f"{self._metrics.file} can't be written: {error.strerror}; no checkpoint is written after its steps\n"
                "  fix: free space; the same command goes on from the checkpoint before"
            ) from error
        wait(self._sent, timeout=PATIENCE)

    def finish(self, *, patient: bool = True) -> None:
        """Close every tracker, once it has what was logged; safe to call twice.

        Args:
            patient: wait for them until Ctrl-C, not for `PATIENCE`. What they have not taken then is in metrics.jsonl.
        """
        closing = {}
        for name in list(self._trackers):
            if name in HERE:
                self._finish(name)
            else:
                closing[name] = self._threads[name].call(self._finish, name)
        try:
            late = wait(closing.values(), timeout=PATIENCE).not_done
            if late and patient:
                console.print("waiting for trackers to take what was logged (Ctrl-C leaves it out)")
                try:
                    late = wait(closing.values()).not_done
                except KeyboardInterrupt:
                    late = wait(closing.values(), timeout=0).not_done
            if late:
                behind = ", ".join(name for name, call in closing.items() if call in late)
                warn(f"{behind} did not take all that was logged; metrics.jsonl has it")
        finally:
            self._trackers.clear()
            for call in (*self._sent, *closing.values()):
                call.cancel()
            for thread in self._threads.values():
                thread.end()

    def _finish(self, name: str) -> None:
        tracker = self._trackers.pop(name, None)
        if tracker is None:  # left alone since
            return
        try:
            tracker.finish()
        except Exception as error:
            warn(f"tracker {name} did not close properly: {error}")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(patient=error is None)

    def _report(self, name: str, error: Exception) -> None:
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        if failures == 1:
            warn(f"tracker {name} failed, training goes on: {error}")
        if failures == MAX_FAILURES:
            warn(f"tracker {name} failed {failures} times in a row and is left alone")
            self._trackers.pop(name, None)


class OneThread:
    """Calls, one after the other, on a thread that the process's end does not wait for (an executor's would)."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        Thread(target=self._work, name=name, daemon=True).start()

    def call(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """function(*arguments) after all calls before it."""
        future: Future[None] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        return future

    def end(self) -> None:
        """No more calls are taken after those that wait."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, function = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


@dataclass
class _MlflowNames:
    """mlflow refuses "@" in a metric's name; verl writes `mean@1` as `mean_at_1` there, and so do we."""

    tracker: Tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.tracker.log({name.replace("@", "_at_"): value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.tracker.finish()


def known_trackers() -> list[str]:
    """Every name that `trainer.logger` may hold."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return [*HERE, *sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested mappings as one level with dotted keys; what is neither text nor number is written as text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def _check_available(name: str) -> None:
    if name in HERE:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = known_trackers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RunError(f'trainer.logger: "{name}" is not a tracker{hint}\n  known: {", ".join(known)}')
    ours = name in {str(kind) for kind in LoggerType}
    if ours and name not in [str(kind) for kind in get_available_trackers()]:
        package = f'"ups-rm[{name}]"' if name in EXTRAS else PACKAGES.get(name, name)
        raise RunError(f'trainer.logger: "{name}" is not installed\n  fix: pip install {package}')
    assert name in LOGGER_TYPE_TO_CLASS


def _start(
    name: str,
    project_name: str,
    experiment_name: str,
    folder: Path,
    config: Mapping[str, Any],
    resume_step: int | None,
    run_id: str | None,
) -> Tracker:
    """Start one of accelerate's trackers and hand it the configuration."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers log through it
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if name == "wandb":

        def start(**more: Any) -> Any:
            return _started(tracker_class(project_name, **more), config)

        return start_wandb(start, folder, experiment_name, resumes=resume_step is not None, known_id=run_id)
    arguments: dict[str, Any] = {}
    if name == "tensorboard":
        project_name = experiment_name  # its run name is the folder of the event files
        # points that a killed process left after the checkpoint, or an older run altogether, are not shown again
        arguments["purge_step"] = 0 if resume_step is None else resume_step + 1
    elif name in RUN_NAME_ARGUMENT:
        arguments[RUN_NAME_ARGUMENT[name]] = experiment_name
    if tracker_class.requires_logging_directory:
        arguments["logging_dir"] = str(folder / name)
    if name == "dvclive":
        arguments["dir"] = str(folder / name)
    tracker: Tracker = _started(tracker_class(project_name, **arguments), config)
    return _MlflowNames(tracker) if name == "mlflow" else tracker


def _started(tracker: Any, config: Mapping[str, Any]) -> Any:
    tracker.start()
    tracker.store_init_configuration(flatten(config))
    return tracker
