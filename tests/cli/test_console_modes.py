"""What `ups-rm train` prints: a live line on a terminal, plain lines in a pipe, events with --json, nothing when quiet;
and `ups-rm runs`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from tiny_training import command, prefers, prompt_file, recipe_yaml, tiny_recipe
from ups_rm.console import console, err_console, progress_bar
from ups_rm.local.trainer import Trainer
from ups_rm.locks import beside, only_one
from ups_rm.monitor.runs import find_runs, read_run


@pytest.fixture
def arguments(tmp_path: Path, policy_folder: Path, rm_folder: Path) -> list[str]:
    return [
        "train", "--recipe", str(recipe_yaml(tmp_path)), "--policy", str(policy_folder), "--rm", str(rm_folder),
        "--train-data", str(prompt_file(tmp_path / "train.parquet")), "--skip-rm-check", "trainer.logger=[console]",
        "--val-data", str(prompt_file(tmp_path / "val.parquet", unsafe=3, benign=3)), "--out", str(tmp_path / "run"),
    ]  # fmt: skip


STOP = ["monitor.window=1", "monitor.kl=1e-4", "monitor.stop_on=[kl_runaway]", "algorithm.kl_penalty=abs",
        "monitor.distinct_2=null", "actor_rollout_ref.actor.optim.lr=1e-2"]  # fmt: skip
"""The first step after an update has a KL above 0: stopped at step 2."""


def test_json_is_events_and_nothing_else_and_the_stop_rule_has_its_exit_code(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command(*arguments, "--json", "trainer.test_freq=2", *STOP) == 3
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [event["event"] for event in events] == ["step", "step", "alarm", "result"]
    assert [event["step"] for event in events[:3]] == [1, 2, 2]
    assert events[2]["name"] == "kl_runaway"
    assert events[2]["stop"] is True
    assert {"critic/score/mean", "val-aux/kl", "alarm/count"} <= events[1]["metrics"].keys()
    run = tmp_path / "run"
    assert events[3] == {"event": "result", "folder": str(run), "policy": str(run / "policy"), "steps": 2,
                         "interrupted": False, "stopped_by": "kl_runaway"}  # fmt: skip
    assert "alarm at step 2: kl_runaway" in captured.err
    found = read_run(run)
    assert (found.state, found.steps, found.total_steps, found.alarms) == ("stopped", 2, 3, ("kl_runaway",))

    assert command(*arguments, "--json", "trainer.total_training_steps=3", *STOP) == 0  # goes on, past the alarm
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3
    assert read_run(run).state == "finished"

    assert command(*arguments, "--json", "trainer.no_such_key=1") == 2  # an error is an event too
    captured = capsys.readouterr()
    (event,) = [json.loads(line) for line in captured.out.splitlines()]
    assert (event["event"], event["type"]) == ("error", "RecipeError")
    assert command("models", "--help") == 0  # the next command of this process prints as always
    assert "Usage" in capsys.readouterr().out


def test_quiet_leaves_alarms_and_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert command(*arguments, "--quiet", *STOP) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(": ")[0] for line in captured.err.splitlines()] == ["alarm at step 2"]


def test_in_a_pipe_there_are_plain_lines_and_no_control_characters(arguments: list[str]) -> None:
    more = ["trainer.test_freq=3", "trainer.val_before_train=true"]
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    command_line = [sys.executable, "-m", "ups_rm", *arguments, *more]
    done = subprocess.run(command_line, capture_output=True, env=env, timeout=300, check=True)
    assert not set(done.stdout) & set(b"\x1b\r\x07")
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    kinds = [re.match(r"(held-out, )?step \d", line) for line in lines]
    assert [kind[0] for kind in kinds if kind] == [
        "held-out, step 0", "step 1", "step 2", "step 3", "held-out, step 3",
    ]  # fmt: skip
    assert re.search(r"since step 0\)  unsafe \d\.\d{3}  benign \d\.\d{3}  refusals unsafe", "\n".join(lines))


def test_on_a_terminal_one_line_is_live(tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step, time left, score, KL and tokens/s stand in one line that is drawn over; no line per step is left behind."""
    screen = StringIO()
    monkeypatch.setattr(console, "_file", screen)
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 130)
    monkeypatch.setattr(err_console, "_force_terminal", True)
    more = ["trainer.logger=[console]", "trainer.test_freq=3", "trainer.total_training_steps=3", "monitor.window=1"]
    more += ["monitor.kl=1e-5", "algorithm.kl_penalty=abs", "actor_rollout_ref.actor.optim.lr=1e-2"]
    Trainer(tiny_recipe(tmp_path, policy_folder, *more), prefers("e")).fit()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"GRPO .* 3/3 steps +0:00:\d\d left 0:00:00 +score \d\.\d{3}  kl -?\d\.\d{4}  tokens/s \d+", text)
    assert "held-out, step 3: score" in text
    assert re.search(r"^alarm at step 2: kl_runaway: .*$", text, re.M)  # above the live line, not into it
    assert not re.search(r"^step \d", text, re.M)


def test_the_time_left_is_known_when_steps_take_longer_than_rich_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich forgets a step after 30 s; a step of verl's may take minutes."""
    screen, now = StringIO(), 0.0
    monkeypatch.setattr(console, "_file", screen)
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 130)
    monkeypatch.setattr(console, "get_time", lambda: now)
    with progress_bar("GRPO", 10, unit="steps", done=4) as advance:
        for _ in range(3):
            now += 100
            advance()
    assert "7/10 steps" in screen.getvalue()
    assert "0:05:00" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


# ---- ups-rm runs


def test_runs_are_listed_with_their_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(name: str, at: float, *, steps: int = 3, policy: bool = True) -> Path:
        run = tmp_path / "runs" / "project" / name
        (run / "policy").mkdir(parents=True) if policy else run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("trainer: {total_training_steps: 8}")
        rows = [{"step": i, "time": at + i, "critic/score/mean": 0.1 * i, "kl/mean": 0.01} for i in range(1, steps + 1)]
        rows.insert(0, {"step": 0, "time": at, "val-core/PKU-SafeRLHF/reward/mean@1": 0.5})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    now = time.time()
    done, half = made("done", now + 30, steps=7), made("half", now + 20, policy=False)
    broken = made("broken", now)
    safe_score = {"before": 0.5, "after": 0.7, "diff": 0.2, "ci95": [0.1, 0.3], "n": 9}
    (done / "summary.json").write_text(json.dumps({"safe_score": safe_score}))
    (done / "policy" / "recipe.yaml").write_text("")  # nothing is looked for within a run
    (tmp_path / "runs" / "recipe.yaml").write_text("")  # and a recipe alone is no run
    (broken / "metrics.jsonl").write_text("not json\n{}\n")
    alarms = [{"step": 2, "name": name, "value": 1.0, "threshold": 0.5, "message": "", "metric": "", "on": "training",
               "stop": False} for name in ("repetition", "saturated", "repetition")]  # fmt: skip
    (done / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms))
    with only_one(beside(half), what="it", fix="wait"):
        found = {run.folder.name: run for run in find_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "broken": "unreadable", "half": "running", "done": "finished",
    }  # fmt: skip
    assert read_run(half).state == "unfinished"  # the lock's file is still there, its process is not
    run = found["done"]
    assert (run.steps, run.total_steps, run.gain, run.ci95) == (7, 8, 0.2, (0.1, 0.3))
    assert run.score == pytest.approx(0.5)  # of steps 3 to 7
    assert run.alarms == ("repetition", "saturated")

    assert command("runs", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    assert [word for word in out.split() if word in ("finished", "unfinished", "unreadable")] == [
        "unreadable", "unfinished", "finished",
    ]  # fmt: skip
    assert "+0.200 [+0.100, +0.300]" in out
    assert command("runs", tmp_path / "runs", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["steps"] for row in rows] == [0, 3, 7]
    assert rows[-1]["ci95"] == [0.1, 0.3]
    (tmp_path / "none").mkdir()
    assert command("runs", tmp_path / "none") == 0
    assert "no runs in" in capsys.readouterr().out
    assert command("runs", tmp_path / "nowhere") == 2
