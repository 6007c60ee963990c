"""Trackers: what is logged is really there, in each one's own format; and none of them can stop a training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import tracking as accelerate_tracking

from ups_rm.errors import DataError, RunError
from ups_rm.tracking import MetricsFile, Trackers, read_metrics
from ups_rm.tracking import trackers as trackers_module
from ups_rm.tracking.console_line import render_line
from ups_rm.tracking.trackers import flatten, known_trackers

CONFIG = {"trainer": {"logger": ["console", "wandb"], "save_freq": 10, "resume": None}, "algorithm": {"kl": 0.001}}


def start(loggers: list[str], folder: Path, **more: Any) -> Trackers:
    return Trackers(loggers, project_name="proj", experiment_name="exp", folder=folder, config=CONFIG, **more)


class Recording(accelerate_tracking.GeneralTracker):
    """A tracker of someone else's, as accelerate lets people register them."""

    name = "recording"
    requires_logging_directory = False
    lines: list[tuple[int, dict[str, float]]]
    fail_at: tuple[int, ...] = ()
    latest: Recording | None = None

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name, self.lines, self.config, self.closed = run_name, [], {}, 0
        type(self).latest = self

    @property
    def tracker(self) -> list[Any]:
        return self.lines

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        if step in self.fail_at:
            raise ConnectionError(f"no route to host at step {step}")
        self.lines.append((step or 0, values))

    def finish(self) -> None:
        self.closed += 1


class Mlflow(Recording):
    name = "mlflow"

    def __init__(self, experiment_name: str, run_name: str) -> None:
        assert run_name == "exp"
        super().__init__(experiment_name)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recording]]:
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recording", Recording)
    monkeypatch.setattr(Recording, "fail_at", ())
    return Recording


# ---- metrics.jsonl


def test_metrics_jsonl_is_always_written_and_flushed_at_once(tmp_path: Path) -> None:
    trackers = start([], tmp_path)
    trackers.log({"critic/score/mean": torch.tensor(0.5), "actor/lr": np.float32(0.25), "reward/mean": 1}, 1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "time": pytest.approx(0, abs=1e12), "critic/score/mean": 0.5, "actor/lr": 0.25, "reward/mean": 1.0}
    ]
    trackers.finish()


def test_numbers_that_json_lacks_are_null_and_come_back_as_nan(tmp_path: Path) -> None:
    with start(["file"], tmp_path) as trackers:
        trackers.log({"a": float("nan"), "b": float("inf"), "c": 0.1 + 0.2}, 1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["a"], line["b"], line["c"]) == (None, None, 0.1 + 0.2)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert np.isnan(row["a"])


def test_a_killed_process_loses_at_most_its_last_line(tmp_path: Path) -> None:
    """SIGKILL in the middle of the run, not at its end; then go on from step 3 in the same file."""
    script = f"""
        import os, signal
        from pathlib import Path
        from ups_rm.tracking import MetricsFile
        file = MetricsFile(Path({str(tmp_path)!r}) / "metrics.jsonl")
        for step in range(1, 6):
            file.log({{"x": step}}, step)
        file._stream.write('{{"step": 6, "x"')
        file._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    resumed = MetricsFile(tmp_path / "metrics.jsonl", resume_step=3)
    resumed.log({"x": 40}, 4)
    assert [(row["step"], row["x"]) for row in read_metrics(resumed.file)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_run_keeps_the_old_file_beside(tmp_path: Path) -> None:
    for value in (1, 2):
        with start([], tmp_path) as trackers:
            trackers.log({"x": value}, 1)
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.previous.jsonl")] == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not JSON"):
        read_metrics(file)


# ---- console


def test_a_step_is_one_readable_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "critic/score/mean": 0.41234,
        "reward/mean": float("nan"),
        "kl/mean": 0.012345,
        "response_length/mean": 47.4,
        "response_length/clip_ratio": 0.25,
        "text/refusal_rate": 0.1,
        "actor/lr": 5e-5,
        "perf/time_per_step": 11.2,
        "timing_s/gen": 3.0,
    }
    with start(["console"], tmp_path, total_steps=60) as trackers:
        trackers.log(metrics, 12)
    line = "step 12/60  score 0.412  reward -  kl 0.0123  length 47  cut 25%  refusals 10%  lr 5.0e-05  time 11.2 s\n"
    assert capsys.readouterr().out == line


def test_a_validation_is_a_summary_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the step's line, with the change since the first one; before training there is no step to show."""
    before = {
        "val-core/PKU-SafeRLHF/reward/mean@2": 0.5, "val-aux/unsafe/reward/mean@2": 0.375,
        "val-aux/benign/refusal_rate": 0.02, "val-aux/kl": 0.0, "timing_s/testing": 1.0, "alarm/count": 0.0,
    }  # fmt: skip
    after = before | {"critic/score/mean": 0.6, "val-core/PKU-SafeRLHF/reward/mean@2": 0.625, "val-aux/kl": 0.01}
    with start(["console"], tmp_path) as trackers:
        trackers.log(before, 0)
        trackers.log(after, 20)
    assert capsys.readouterr().out.splitlines() == [
        "held-out, step 0: score 0.500  unsafe 0.375  refusals benign 2%  kl 0.0000",
        "step 20  score 0.600",
        "held-out, step 20: score 0.625 (+0.125 since step 0)  unsafe 0.375  refusals benign 2%  kl 0.0100",
    ]


def test_unknown_metrics_are_not_dropped_in_silence() -> None:
    assert render_line({"my/own": 0.25}, 1) == "step 1  my/own 0.25"


# ---- tensorboard


def test_tensorboard_holds_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install "ups-rm[tensorboard]"')
    with start(["tensorboard"], tmp_path) as trackers:
        for step in (1, 2, 3, 4):
            trackers.log({"critic/score/mean": step / 8, "actor/lr": 1e-5}, step)
    assert scalars(tmp_path / "tensorboard" / "exp", "critic/score/mean") == {1: 0.125, 2: 0.25, 3: 0.375, 4: 0.5}
    assert scalars(tmp_path / "tensorboard" / "exp", "actor/lr")[2] == pytest.approx(1e-5)
    (hparams,) = (tmp_path / "tensorboard" / "exp").glob("*/hparams.yml")
    assert "trainer.save_freq: 10" in hparams.read_text()

    with start(["tensorboard"], tmp_path, resume_step=2) as trackers:
        trackers.log({"critic/score/mean": 0.75}, 3)
    assert scalars(tmp_path / "tensorboard" / "exp", "critic/score/mean") == {1: 0.125, 2: 0.25, 3: 0.75}


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


# ---- others by name


def test_any_tracker_that_accelerate_knows_works_by_name(tmp_path: Path, recording: type[Recording]) -> None:
    with start(["recording"], tmp_path) as trackers:
        trackers.log({"x": 1.0}, 7)
    assert recording.latest is not None
    assert recording.latest.run_name == "proj"
    assert recording.latest.lines == [(7, {"x": 1.0})]
    assert recording.latest.config["trainer.logger"] == "['console', 'wandb']"
    assert recording.latest.closed == 1
    trackers.finish()
    assert recording.latest.closed == 1


def test_a_step_does_not_wait_for_a_tracker_and_nothing_of_it_is_lost(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its network hangs until all steps are taken: metrics.jsonl has them, and it gets them in their order."""
    network, threads = threading.Event(), set()
    log = recording.log

    def slow(self: Recording, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        threads.add(threading.get_ident())
        assert network.wait(60)
        log(self, values, step, **more)

    monkeypatch.setattr(recording, "log", slow)
    monkeypatch.setattr(trackers_module, "PATIENCE", 0.2)
    with start(["recording"], tmp_path) as trackers:
        for step in range(1, 6):
            trackers.log({"x": float(step)}, step)
        trackers.sync()  # a checkpoint waits for a moment, not for ever
        assert recording.latest is not None
        assert recording.latest.lines == []
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        threading.Timer(0.5, network.set).start()
    assert recording.latest.lines == [(step, {"x": float(step)}) for step in range(1, 6)]
    assert recording.latest.closed == 1
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert "waiting for trackers" in capsys.readouterr().out


def test_an_error_does_not_wait_for_a_tracker_that_hangs(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = threading.Event()
    monkeypatch.setattr(recording, "log", lambda self, values, step=None, **more: network.wait(60))
    monkeypatch.setattr(trackers_module, "PATIENCE", 0.1)
    trackers = start(["recording"], tmp_path)
    trackers.log({"x": 1.0}, 1)
    trackers.__exit__(ValueError, ValueError("of the step"), None)
    network.set()
    assert "recording did not take all that was logged; metrics.jsonl has it" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_tracker_that_hangs_does_not_hold_up_another(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hangs(Recording):
        name = "hangs"

        def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
            network.wait(60)

    network = threading.Event()
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "hangs", Hangs)
    monkeypatch.setattr(trackers_module, "PATIENCE", 0.5)
    trackers = start(["hangs", "recording"], tmp_path)
    other = recording.latest
    trackers.log({"x": 1.0}, 1)
    trackers.finish(patient=False)
    network.set()
    assert other is not None
    assert (other.lines, other.closed) == ([(1, {"x": 1.0})], 1)
    assert "hangs did not take" in capsys.readouterr().err


def test_ctrl_c_gets_out_of_waiting_for_a_tracker(tmp_path: Path) -> None:
    """Of a process: its end waits for no call that hangs, nor for those behind it."""
    script = f"""
        import os, signal, threading, time
        from pathlib import Path
        from accelerate import tracking
        from ups_rm.tracking import Trackers, trackers

        class Hangs(tracking.GeneralTracker):
            name, requires_logging_directory, tracker = "hangs", False, None
            def __init__(self, run_name): super().__init__()
            def store_init_configuration(self, values): pass
            def log(self, values, step=None, **more): print("asked", step, flush=True); time.sleep(600)

        tracking.LOGGER_TYPE_TO_CLASS["hangs"] = Hangs
        trackers.PATIENCE = 0.1
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        folder = Path({str(tmp_path)!r})
        with Trackers(["hangs"], project_name="p", experiment_name="e", folder=folder, config={{}}) as run:
            run.log({{"x": 1.0}}, 1)
            run.log({{"x": 2.0}}, 2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr  # what was trained is told all the same
    assert "hangs did not take all that was logged" in done.stderr
    assert done.stdout.count("asked") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_mlflow_gets_names_that_it_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with mlflow 3.17: one "@" in a name makes it refuse the whole step."""
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Mlflow)
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", ["mlflow"])
    with start(["mlflow"], tmp_path) as trackers:
        trackers.log({"val-core/PKU-SafeRLHF/reward/mean@1": 0.5}, 1)
    assert Mlflow.latest is not None
    assert Mlflow.latest.lines == [(1, {"val-core/PKU-SafeRLHF/reward/mean_at_1": 0.5})]
    assert Mlflow.latest.closed == 1
    assert "val-core/PKU-SafeRLHF/reward/mean@1" in read_metrics(tmp_path / "metrics.jsonl")[0]


def test_known_names() -> None:
    assert {"console", "jsonl", "wandb", "tensorboard", "mlflow", "swanlab", "trackio"} <= set(known_trackers())


def test_config_is_flat_for_trackers() -> None:
    assert flatten(CONFIG)["algorithm.kl"] == 0.001
    assert flatten(CONFIG)["trainer.resume"] == "None"


def test_a_misspelt_name_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match='"wanbd" is not a tracker; did you mean wandb'):
        start(["console", "wanbd"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "fix"), [("wandb", r"ups-rm\[wandb\]"), ("comet_ml", "comet-ml"), ("aim", "aim")])
def test_a_missing_package_is_an_error_with_its_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fix: str
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    with pytest.raises(RunError, match=f'"{name}" is not installed\n  fix: pip install .*{fix}'):
        start([name], tmp_path)


# ---- failures


def test_a_failing_tracker_warns_once_and_never_stops_the_run(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording, "fail_at", (2, 4, 5, 6, 7))
    with start(["recording"], tmp_path) as trackers:
        for step in range(1, 9):
            trackers.log({"x": float(step)}, step)
        trackers.sync()
        assert trackers.names == ["jsonl"]
    assert recording.latest is not None
    assert [step for step, _ in recording.latest.lines] == [1, 3]  # left alone after 4, 5, 6
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    warnings = capsys.readouterr().err
    assert warnings.count("failed, training goes on: no route to host") == 2  # at 2, and anew at 4
    assert "no route to host at step 4" in warnings
    assert "3 times in a row and is left alone" in warnings


def test_a_tracker_that_does_not_start_is_left_out(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Recording) -> None:
        raise OSError("quota exceeded")

    monkeypatch.setattr(recording, "start", refuse)
    with start(["recording", "console"], tmp_path) as trackers:
        assert trackers.names == ["jsonl", "console"]
    assert "recording did not start, training goes on without it: quota exceeded" in capsys.readouterr().err


def test_trackers_are_closed_when_training_raises(tmp_path: Path, recording: type[Recording]) -> None:
    with pytest.raises(ZeroDivisionError), start(["recording"], tmp_path):
        raise ZeroDivisionError
    assert recording.latest is not None
    assert recording.latest.closed == 1


def test_importing_trackers_pulls_in_none_of_them() -> None:
    script = "import sys, ups_rm.tracking.trackers; print(sorted({'wandb', 'tensorboard', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
