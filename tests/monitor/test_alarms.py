"""The thresholds as a function of metrics: what raises which alarm, when it begins, when it is over."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.errors import RecipeError
from ups_rm.monitor.limits import ALARMS, JUDGE, LIMITS, STREAMS, WATCHED, Alarm, Alarms
from ups_rm.recipe import Monitor as Settings
from ups_rm.recipe import Recipe, RewardModelModel, load_recipe

HEALTHY = Path(__file__).with_name("healthy_quickstart.jsonl")


def healthy_rows() -> list[dict[str, Any]]:
    """40 steps of the default recipe on the default policy, as they were logged (the watched metrics, 5 digits)."""
    return [json.loads(line) for line in HEALTHY.read_text(encoding="utf-8").splitlines()]


def raised(rows: list[dict[str, Any]], **changes: Any) -> list[Alarm]:
    alarms = Alarms(Settings(**changes))
    return [alarm for row in rows for alarm in alarms.see(row, int(row["step"]))]


def steps(metric: str, *values: float) -> list[dict[str, Any]]:
    return [{"step": i, metric: value} for i, value in enumerate(values, start=1)]


def test_a_real_healthy_run_raises_none() -> None:
    rows = healthy_rows()
    assert len(rows) == 40
    assert set(rows[0]) >= set(WATCHED["training"]) - set(JUDGE["training"]) - {"actor/grad_norm"}  # added later
    assert raised(rows) == []
    for window in (3, 4, 8, 10):
        assert raised(rows, window=window) == []


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.key)
@pytest.mark.parametrize("stream", STREAMS)
def test_every_limit_turns_the_healthy_run_into_its_alarm(limit: Any, stream: str) -> None:
    """The metric is moved beyond its threshold from step 20 on: the alarm comes within the window, once, by its name.
    With the key null it does not come."""
    metric = limit.training if stream == "training" else limit.held_out
    if not metric:
        pytest.skip("held-out replies have no gradient")
    rows = healthy_rows()
    for row in rows:
        training = row.pop(limit.training, 1.0 + 0.5 * (row["step"] % 3))
        row[metric] = training if row["step"] < 20 else {
            "above": 1.0, "rise": training + 0.45, "factor": 1.9 * training, "share of start": 0.3 * training,
            "times start": 40.0 * training,
        }[limit.how]  # fmt: skip
    others = {other.key: None for other in LIMITS if other.key != limit.key}
    found = raised(rows, **others)
    assert [alarm.name for alarm in found] == [limit.alarm]
    assert found[0].step == 20 if stream == "held-out" else 20 <= found[0].step < 25
    assert (found[0].on, found[0].metric) == (stream, metric)
    assert f"{found[0].threshold:g}" in found[0].message or f"{found[0].threshold:.0%}" in found[0].message
    assert raised(rows, **others, **{limit.key: None}) == []


def test_a_gradient_that_shrinks_or_doubles_is_no_alarm() -> None:
    rows = [{"step": float(i), "actor/grad_norm": norm} for i, norm in enumerate([2.0] * 6 + [0.01] * 9 + [19.0] * 9)]
    assert raised(rows) == []
    exploding = [*rows, *({"step": 24.0 + i, "actor/grad_norm": 21.0} for i in range(6))]
    (alarm,) = raised(exploding)
    assert (alarm.name, alarm.metric, alarm.threshold) == ("gradient_explosion", "actor/grad_norm", 10.0)
    assert "2 at the start" in alarm.message


def test_lengths_drift_in_both_directions() -> None:
    for factor, expected in ((1.6, 1), (1 / 1.6, 1), (1.4, 0), (1 / 1.4, 0)):
        assert len(raised(steps("response_length/mean", *[100] * 5, *[100 * factor] * 5))) == expected


@pytest.mark.parametrize(("prompts", "start", "now", "refuses"), [
    (10, 0.2, 0.4, False),  # as in a real validation of ten harmless prompts: two of ten, then four
    (10, 0.0, 0.45, True), (34, 0.2, 0.4, False), (34, 0.2, 0.45, True), (200, 0.2, 0.41, True),
    (200, 0.2, 0.39, False),
])  # fmt: skip
def test_a_rise_of_refusals_must_be_more_than_chance(prompts: int, start: float, now: float, refuses: bool) -> None:
    """Two standard errors of a difference of rates: 2 sqrt(p (1 - p) / m + q (1 - q) / m), m prompts each."""
    row = {"val-aux/benign/prompts": prompts}
    rows = [row | {"step": i, "val-aux/benign/refusal_rate": rate} for i, rate in enumerate((start, now))]
    assert [alarm.name for alarm in raised(rows)] == ["refuses_everything"] * refuses
    # the same prompts over five steps of training
    row = {"text/benign_prompts": prompts / 5}
    rows = [row | {"step": i, "text/refusal_rate_benign_prompts": start if i < 5 else now} for i in range(10)]
    assert [alarm.name for alarm in raised(rows)] == ["refuses_everything"] * refuses


def test_a_single_bad_step_is_no_alarm() -> None:
    assert raised(steps("text/repetition", 0, 0, 0, 0, 0, 0.9, 0, 0, 0, 0)) == []


def test_values_that_are_missing_or_not_numbers_are_not_judged() -> None:
    rows: list[dict[str, Any]] = steps("kl/mean", *[9.0] * 4, *[float("nan")] * 10)
    assert raised(rows) == []  # 4 values are less than a window
    assert raised([*rows, {"step": 15}, {"step": 16, "kl/mean": 9.0}])[0].step == 16


def test_an_alarm_begins_once_and_again_only_after_a_quiet_window() -> None:
    quiet, loud = [0.1], [0.9]
    rows = steps("score/saturated_share", *loud * 3, *quiet, *loud * 3, *quiet * 6, *loud)
    assert [alarm.step for alarm in raised(rows, window=1)] == [1, 14]  # the dip at step 4 is no end
    assert [alarm.step for alarm in raised(rows, window=1000)] == []
    alarms = Alarms(Settings(window=2))
    active = [(alarms.see(row, int(row["step"])), alarms.active)[1] for row in steps("kl/mean", 9, 9, 0, 0, 0, 0)]
    assert active == [set(), *[{"kl_runaway"}] * 4, set()]  # passed at steps 2 and 3, quiet at 4 and 5


def test_a_batch_without_harmless_prompts_does_not_end_their_alarm() -> None:
    name = "text/refusal_rate_benign_prompts"
    rows = [{"step": i, "text/refusal_rate": 0.5} | ({name: 0.9} if i % 4 else {}) for i in range(1, 30)]
    assert [(alarm.name, alarm.metric) for alarm in raised(rows, window=2)] == [("refuses_everything", name)]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("gain", "judge_gain", "disagrees"),
    [(0.3, 0.15, False), (0.3, 0.05, True), (0.3, 0.0, True), (0.3, -0.2, True), (0.05, -0.2, False)],
)
def test_the_judge_must_see_a_share_of_the_gain(stream: str, gain: float, judge_gain: float, disagrees: bool) -> None:
    """As was measured on real rows, a judge sees half of a healthy gain (docs/design.md); small gains are noise."""
    judge, rm = JUDGE[stream]  # type: ignore[index]
    rows = [
        {"step": i, judge: 0.4 + judge_gain * (i > 5), rm: 0.5 + gain * (i > 5)} for i in range(1, 12)
    ]  # fmt: skip
    found = raised(rows)
    assert [alarm.name for alarm in found] == ["judge_disagrees"] * disagrees
    if disagrees:
        assert found[0].value < 0.2
        assert raised(rows, judge_share=None) == []


values = st.floats(0, 2, allow_nan=False) | st.just(float("nan"))


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(sorted({*WATCHED["training"], *WATCHED["held-out"]})), values),
                  max_size=30),
    cut=st.integers(0, 30), window=st.integers(1, 4),
)  # fmt: skip
@settings(deadline=None)
def test_seen_in_two_parts_or_in_one_is_the_same(rows: list[dict[str, float]], cut: int, window: int) -> None:
    """What a resumed run reads again gives the state that the interrupted one had; and an alarm that is on is known."""
    whole, first = Alarms(Settings(window=window)), Alarms(Settings(window=window))
    in_one = [alarm for i, row in enumerate(rows) for alarm in whole.see(row, i)]
    begun = [alarm for i, row in enumerate(rows[:cut]) for alarm in first.see(row, i)]
    resumed = Alarms(Settings(window=window))
    assert [alarm for i, row in enumerate(rows[:cut]) for alarm in resumed.see(row, i)] == begun
    for i, row in enumerate(rows[cut:], start=cut):
        new = resumed.see(row, i)
        assert {alarm.name for alarm in new} <= resumed.active
        begun += new
    assert begun == in_one


# ---- the recipe


def test_every_threshold_is_a_key_and_every_key_a_threshold() -> None:
    others = {"stop_on", "window", "judge", "judge_share", "judge_min_gain"}
    assert {limit.key for limit in LIMITS} == {field.name for field in fields(Settings)} - others
    assert len(ALARMS) == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("monitor.stop_on=[refuses_all]", "monitor.stop_on: refuses_all is not one of .* did you mean refuses_every"),
        ("monitor.length_factor=1", "monitor.length_factor=1.0 must be more than 1"),
        ("monitor.repetition_rise=1.5", "monitor.repetition_rise=1.5 must lie between 0 and 1"),
        ("monitor.window=0", "monitor.window=0 must be at least 1"),
        ("monitor.judge.kind=bert", "monitor.judge.kind=bert is not one of"),
        ("monitor.judge.callable=nothing", r"monitor.judge.callable='nothing' is not `module:callable`"),
    ],
)
def test_wrong_values_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


def test_thresholds_can_be_off() -> None:
    recipe = load_recipe("quickstart", ["monitor.kl=null", "monitor.stop_on=[repetition,saturated]"])
    assert recipe.monitor.kl is None
    assert recipe.monitor.stop_on == ["repetition", "saturated"]


def test_the_monitor_is_no_part_of_what_a_checkpoint_is_held_against() -> None:
    from ups_rm.recipe_hash import recipe_hash

    changed = Recipe(monitor=Settings(kl=0.1, stop_on=["kl_runaway"], judge=RewardModelModel(path="judge")))
    assert recipe_hash(changed) == recipe_hash(Recipe())
