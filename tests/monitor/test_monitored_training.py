"""Policies that cheat, in the real trainer with tiny models: each raises its own alarm soon, a healthy one none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    TURN,
    Script,
    always_refuses,
    copies_the_prompt,
    healthy,
    one_answer,
    pads_with_politeness,
    repeats_a_phrase,
    trainer_of,
)

from tiny_training import SyntheticScorer, prefers, tiny_recipe
from ups_rm.errors import DataError
from ups_rm.local.trainer import Trainer
from ups_rm.monitor.limits import JUDGE, Alarm, Alarms
from ups_rm.monitor.watch import read_alarms
from ups_rm.reward.scorer import RewardScorer
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Conversation, Message

HELD_OUT = ["trainer.test_freq=1", "trainer.val_before_train=true", "data.val_max_samples=6", "monitor.window=100"]
CHEATS: dict[str, tuple[Script, set[str]]] = {
    "refuses_everything": (always_refuses, {"repetition"}),
    "repetition": (repeats_a_phrase, set()),
    "length_drift": (pads_with_politeness, {"repetition"}),
    "copies_prompt": (copies_the_prompt, {"repetition"}),
}
"""Own alarm: the script, and which other alarms it earns as well (one formula for everything has few word pairs)."""
K = 3
"""Steps after the turn within which the alarm must be there: the window."""


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheating_policy_raises_its_own_alarm(name: str, tmp_path: Path, policy_folder: Path) -> None:
    """And so it does where only the training replies or only the held-out ones are looked at."""
    script, also = CHEATS[name]
    overrides = [*HELD_OUT, "monitor.window=3", "trainer.total_training_steps=6"]
    trainer = trainer_of(tmp_path, policy_folder, script, *overrides)
    trainer.fit()
    alarms = read_alarms(tmp_path / "run")
    assert {alarm.name for alarm in alarms} == {name} | also
    assert len(alarms) == 1 + len(also)
    own = next(alarm for alarm in alarms if alarm.name == name)
    assert TURN < own.step <= TURN + K
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    for of_stream in (lambda metric: metric.startswith("val-"), lambda metric: not metric.startswith("val-")):
        judged = Alarms(trainer.recipe.monitor)
        seen = [{name: value for name, value in row.items() if of_stream(name)} for row in rows]
        first = {
            alarm.name: alarm.step
            for row, metrics in zip(rows, seen, strict=True)
            for alarm in judged.see(metrics, int(row["step"]))
        }
        assert set(first) == {name} | also
        assert TURN < first[name] <= TURN + K
    assert [row["step"] for row in rows if f"alarm/{name}" in row] == list(range(own.step, 7))
    assert rows[-1]["alarm/count"] == len(alarms)


@pytest.mark.parametrize("overrides", [[], [*HELD_OUT, "monitor.window=3"]], ids=["training", "both"])
def test_a_healthy_policy_raises_none(overrides: list[str], tmp_path: Path, policy_folder: Path) -> None:
    trainer_of(tmp_path, policy_folder, healthy, *overrides).fit()
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert {row["alarm/count"] for row in rows} == {0}
    assert not (tmp_path / "run/alarms.jsonl").exists()
    if overrides:  # what is looked at on held-out prompts
        assert {f"val-aux/{name}" for name in ("kl", "entropy", "distinct_2", "repetition", "saturated_share")} <= {
            *rows[0]
        }
        assert rows[0]["val-aux/kl"] == pytest.approx(0, abs=1e-5)
        assert 0 < rows[0]["val-aux/entropy"] < 6  # of 340 tokens at most log 340


def test_one_answer_to_each_prompt_collapses_the_groups(tmp_path: Path, policy_folder: Path) -> None:
    trainer_of(tmp_path, policy_folder, one_answer, "trainer.total_training_steps=6").fit()
    assert "collapsed_groups" in [alarm.name for alarm in read_alarms(tmp_path / "run")]


def test_scores_without_a_slope_are_saturated(tmp_path: Path, policy_folder: Path) -> None:
    sure = SyntheticScorer(lambda text: -6.0 - len(text) / 100)
    trainer_of(tmp_path, policy_folder, healthy, "trainer.total_training_steps=4", scorer=sure).fit()
    assert [(alarm.name, alarm.step) for alarm in read_alarms(tmp_path / "run")] == [("saturated", 3)]


def test_a_policy_that_runs_off_is_seen_by_its_kl(tmp_path: Path, policy_folder: Path) -> None:
    """No script: a real policy learns a letter at a learning rate that is far too high."""
    recipe = tiny_recipe(tmp_path, policy_folder, "actor_rollout_ref.actor.optim.lr=5e-2", "monitor.window=2",
                         "algorithm.use_kl_in_reward=false", "actor_rollout_ref.actor.use_kl_loss=true",
                         "trainer.total_training_steps=12", "monitor.stop_on=[kl_runaway]")  # fmt: skip
    result = Trainer(recipe, prefers("e")).fit()
    assert result.stopped_by == "kl_runaway"
    assert result.steps < 12
    assert result.metrics["kl/mean"] > 0.3


@pytest.mark.parametrize("where", ["training", "held-out"])
def test_a_judge_that_sees_no_gain_disagrees(where: str, tmp_path: Path, policy_folder: Path) -> None:
    """The reward model is fooled by politeness, the judge is not; it reads the held-out replies, or the step's own."""
    fooled = SyntheticScorer(lambda text: -2.0 if "Thank you" in text else 1.0)
    overrides = ["monitor.judge.callable=scripted:likes_please", "monitor.length_factor=null",
                 "monitor.distinct_2=null", "monitor.zero_std_share=null",
                 "trainer.total_training_steps=6"]  # fmt: skip
    overrides += HELD_OUT if where == "held-out" else []
    trainer_of(tmp_path, policy_folder, pads_with_politeness, *overrides, scorer=fooled).fit()
    alarms = read_alarms(tmp_path / "run")
    assert [(alarm.name, alarm.on) for alarm in alarms] == [("judge_disagrees", where)]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    judge, rm = JUDGE[where]  # type: ignore[index]
    assert rows[-1][judge] == pytest.approx(0.2689, abs=1e-4)  # sigmoid(-1)
    assert rows[-1][rm] == pytest.approx(0.8808, abs=1e-4)  # sigmoid(2)
    other = JUDGE["held-out" if where == "training" else "training"]
    assert not {*other} & {name for row in rows for name in row}


@pytest.mark.parametrize("where", ["training", "held-out"])
def test_a_real_second_reward_model_disagrees_in_a_real_training(
    where: str, tmp_path: Path, policy_folder: Path, rm_folder: Path
) -> None:
    """No script: a policy learns the letter that its reward model likes. The judge, an RM folder whose head is random,
    sees nothing in it, and its figures are those that the folder's own scorer gives for the logged replies."""
    given = [f"monitor.judge.path={rm_folder}", "monitor.window=2", "monitor.kl=null", "monitor.distinct_2=null",
             "actor_rollout_ref.actor.optim.lr=1e-2", "trainer.total_training_steps=24",
             "monitor.stop_on=[judge_disagrees]"]  # fmt: skip
    given += ["trainer.test_freq=2", "trainer.val_before_train=true"] if where == "held-out" else []
    result = Trainer(tiny_recipe(tmp_path, policy_folder, *given), prefers("e")).fit()
    assert result.stopped_by == "judge_disagrees"
    (alarm,) = [alarm for alarm in read_alarms(tmp_path / "run") if alarm.name == "judge_disagrees"]
    assert (alarm.step, alarm.on, alarm.stop) == (result.steps, where, True)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    judge, rm = JUDGE[where]  # type: ignore[index]
    seen = [row for row in rows if judge in row]
    assert seen[-1][rm] - seen[0][rm] > 0.1
    if where == "training":
        log = read_group_log(tmp_path / f"run/groups/step_{result.steps:06d}.jsonl")
        talks: list[Conversation] = [
            [*group.messages, Message(role="assistant", content=sample.response)]
            for group in log.groups
            for sample in group.samples
        ]
        scores = [score.safe_score for score in RewardScorer.load(rm_folder).score(talks)]
        assert seen[-1][judge] == pytest.approx(sum(scores) / len(scores), abs=1e-3)


def test_a_judge_that_cannot_be_opened_is_named_before_training(tmp_path: Path, policy_folder: Path) -> None:
    from ups_rm.errors import RMError

    with pytest.raises(RMError, match=r"monitor\.judge: nowhere:score: module nowhere can't be imported"):
        trainer_of(tmp_path, policy_folder, healthy, "monitor.judge.callable=nowhere:score")


# ---- the stop rule, and going on


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "alarms.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_stop_rule_saves_a_checkpoint_and_the_same_command_goes_on_without_doubles(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def turns_twice(prompt: str, i: int) -> str:  # 16 replies a step
        return repeats_a_phrase(prompt, i) if i < 16 * 7 else pads_with_politeness(prompt, i)

    whole = trainer_of(tmp_path / "whole", policy_folder, turns_twice).fit()
    assert (whole.steps, whole.stopped_by) == (9, "")
    expected = lines(tmp_path / "whole/run")
    assert [line["name"] for line in expected] == ["repetition", "length_drift"]

    stop = "monitor.stop_on=[repetition]"
    capsys.readouterr()
    result = trainer_of(tmp_path / "parts", policy_folder, turns_twice, stop).fit()
    captured = capsys.readouterr()
    first = expected[0]["step"]
    assert (result.steps, result.stopped_by, result.interrupted) == (first, "repetition", False)
    assert f"alarm at step {first}: repetition: share of a reply that repeats itself" in captured.err
    assert f"stopped after step {first} by the alarm repetition (monitor.stop_on); checkpoint: " in captured.out
    assert "the same command goes on from there, past this alarm" in captured.out
    run = tmp_path / "parts/run"
    assert (run / f"global_step_{first}/state.json").is_file()
    assert (run / "policy/model.safetensors").is_file()
    assert [line["stop"] for line in lines(run)] == [True]

    result = trainer_of(tmp_path / "parts", policy_folder, turns_twice, stop).fit()  # past the alarm, which is known
    assert (result.steps, result.stopped_by) == (9, "")
    assert [line | {"stop": False} for line in lines(run)] == expected
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 10))


def test_a_killed_run_writes_its_alarms_again_from_its_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    """The alarm of step 4 comes after the checkpoint of step 3: it is forgotten with its step and raised anew."""
    save = ["trainer.save_freq=3", "trainer.total_training_steps=5"]
    trainer = trainer_of(tmp_path, policy_folder, repeats_a_phrase, *save, "monitor.window=1")
    real, steps = trainer.step, []

    def killed(prompts: Any, number: int) -> Any:
        steps.append(number)
        if number == 5:
            raise KeyboardInterrupt
        return real(prompts, number)

    trainer.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    before = lines(tmp_path / "run")
    assert [line["step"] for line in before] == [4]
    trainer_of(tmp_path, policy_folder, repeats_a_phrase, *save, "monitor.window=1").fit()
    assert lines(tmp_path / "run") == before


def test_a_new_run_keeps_the_old_alarms_beside(tmp_path: Path, policy_folder: Path) -> None:
    few = ["trainer.total_training_steps=2", "monitor.window=1", "trainer.resume_mode=disable"]
    trainer_of(tmp_path, policy_folder, one_answer, *few, turn=0).fit()
    trainer_of(tmp_path, policy_folder, healthy, *few, "trainer.overwrite=true").fit()
    assert not (tmp_path / "run/alarms.jsonl").exists()
    assert "collapsed_groups" in (tmp_path / "run/alarms.previous.jsonl").read_text(encoding="utf-8")


def test_a_line_that_is_no_alarm_is_named(tmp_path: Path) -> None:
    (tmp_path / "alarms.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"alarms\.jsonl:1: not an alarm"):
        read_alarms(tmp_path)
    assert read_alarms(tmp_path / "nowhere") == []
    alarm = Alarm(3, "kl_runaway", float("nan"), 0.5, "m", "kl/mean", "training")
    (tmp_path / "alarms.jsonl").write_text(json.dumps(vars(alarm) | {"value": None}) + "\n")
    assert read_alarms(tmp_path)[0].value != read_alarms(tmp_path)[0].value
