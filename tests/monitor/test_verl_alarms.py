"""The verl engine: the same alarms from the metrics that verl writes, and its end by the stop rule. verl itself is left
out: a process that reports metrics step by step stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_alarms import healthy_rows

from tiny_training import base_overrides, recipe_yaml
from ups_rm.distributed import engine
from ups_rm.distributed.prompts import PromptFiles
from ups_rm.errors import RecipeError
from ups_rm.monitor.watch import read_alarms
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.tracking.jsonl import read_metrics


@dataclass
class Reports:
    """Stands for `VerlProcess`: hands its rows on until it is asked to stop; a checkpoint at every second step."""

    rows: list[dict[str, Any]]
    folder: Path
    start: int = 0
    on_metrics: Callable[[dict[str, float], int], None] = field(default=lambda *_: None)

    def run(self, stop: Callable[[], bool]) -> bool:
        for row in self.rows[self.start :]:
            metrics = {name: value for name, value in row.items() if name != "step"}
            if stop():
                return False
            if row["step"] % 2 == 0:
                (self.folder / f"global_step_{row['step']}" / "actor").mkdir(parents=True)
                (self.folder / "latest_checkpointed_iteration.txt").write_text(str(row["step"]))
            self.on_metrics(metrics, int(row["step"]))
        return True


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train on "verl" with these rows; runs in the same folder go on from its last checkpoint."""

    def run(rows: list[dict[str, Any]], *overrides: str) -> Any:
        given = [*base_overrides(tmp_path, tmp_path), "reward_model.model.path=rm", "trainer.n_gpus_per_node=1"]
        recipe = load_recipe(recipe_yaml(tmp_path), [*given, *overrides], engine="verl")
        folder = tmp_path / "run"
        (folder / "verl").mkdir(parents=True, exist_ok=True)
        newest = engine.newest_checkpoint(folder)
        start = 0 if newest is None else engine.step_of(newest)

        def process_of(_: Any, on_metrics: Callable[[dict[str, float], int], None]) -> Reports:
            return Reports(rows, folder, start, on_metrics)

        files = PromptFiles(train=tmp_path, val=tmp_path, total_steps=len(rows), steps_per_epoch=len(rows))
        monkeypatch.setattr(engine, "check_machine", lambda _: None)
        monkeypatch.setattr(engine.MadeWith, "of", lambda _: engine.MadeWith("", {}))
        monkeypatch.setattr(engine, "steps_done", lambda *_: start)
        monkeypatch.setattr(engine, "prepare", lambda recipe: engine.VerlRun(recipe, files, []))
        monkeypatch.setattr(engine, "process_of", process_of)
        monkeypatch.setattr("ups_rm.distributed.export.export_policy", lambda _, out, **__: out)
        return engine.train(recipe)

    return run


def refusing(from_step: int) -> list[dict[str, Any]]:
    rows = healthy_rows()[:20]
    for row in rows[from_step - 1 :]:
        row["text/refusal_rate_benign_prompts"] = 0.9
    return rows


def test_the_stop_rule_ends_verl_and_the_same_command_goes_on(
    train: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, stop = refusing(10), "monitor.stop_on=[refuses_everything]"
    result = train(rows, stop)
    captured = capsys.readouterr()
    (alarm,) = read_alarms(tmp_path / "run")
    assert (alarm.name, alarm.step, alarm.on, alarm.stop) == ("refuses_everything", 11, "training", True)
    assert (result.steps, result.policy, result.interrupted, result.stopped_by) == (11, None, False, alarm.name)
    assert "alarm at step 11: refuses_everything" in captured.err
    assert "stopped after step 11 by the alarm refuses_everything" in captured.out
    assert "global_step_10\n  the same command comes to this alarm again" in captured.out
    # the checkpoint is of step 10: the alarm of step 11 is raised anew there, so that it stops again and not for good
    again = train(rows, stop)
    assert (again.steps, again.stopped_by) == (11, "refuses_everything")
    last = train(rows)
    assert (last.steps, last.stopped_by) == (20, "")
    assert [(a.name, a.step) for a in read_alarms(tmp_path / "run")] == [("refuses_everything", 11)]
    logged = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, 21))
    assert [row["alarm/count"] for row in logged] == [0] * 10 + [1] * 10


def test_a_healthy_run_on_verl_raises_none(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train(healthy_rows()[:20]).stopped_by == ""
    assert read_alarms(tmp_path / "run") == []


def test_a_second_judge_is_refused_there() -> None:
    from ups_rm.distributed.translate import check_for_verl

    recipe = Recipe()
    recipe.monitor.judge.path = "judge"
    with pytest.raises(RecipeError, match=r"monitor\.judge: the verl engine has no second judge"):
        check_for_verl(recipe)
