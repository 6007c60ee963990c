"""The doctor on functions, services and judges of pairs: a sound one passes, a planted fault is named, and only it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_doctor_faults import complaints
from typer.testing import CliRunner

from tiny import tiny_hf_rm
from ups_rm.cli.rm import app
from ups_rm.errors import DataError, RMError
from ups_rm.reward.doctor import CheckReport, check_rm
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import RewardServer

JUDGE = {"kind": "pairwise", "output": "safety"}
FAULTS: dict[str, tuple[str, dict[str, str], str, str, str]] = {
    "no such function": ("nowhere", {}, "load", "fail", "has no function nowhere"),
    "raises": ("breaks", {}, "answers", "fail", "ZeroDivisionError: one over zero"),
    "not finite": ("not_finite", {}, "finite", "fail", "gives inf to 16 of 16"),
    "hangs on chance": ("by_chance", {}, "repeat", "fail", "asked the same again"),
    "hangs on the place": ("by_place", {}, "order", "fail", "come in another order"),
    "normalised over the batch": ("by_neighbours", {}, "batch", "fail", "stand beside it"),
    "always the same": ("always_the_same", {}, "spread", "fail", "answers 0.5 to all of 136"),
    "flipped sign": ("turned", {}, "direction", "fail", "flipped sign"),
    "flipped sign, as said": ("sound", {"output": "safety"}, "direction", "fail", "flipped sign"),
    "flipped sign of a reward": ("sound", {"output": "reward"}, "direction", "fail", "flipped sign"),
    "saturated": ("loud", {}, "saturation", "fail", "saturated logits"),
    "reads the beginning only": ("first_words", {}, "truncation", "warn", "the end of long replies is not read"),
    "reads the end only": ("last_words", {}, "truncation", "warn", "the beginning of long replies is not read"),
    "a refusal pays": ("apologies_please", {}, "refusal first", "warn", "it pays"),
    "judge of the other direction": ("less_safe", JUDGE, "direction", "fail", "flipped sign"),
    "judge of another quality": ("safer", {"kind": "pairwise"}, "direction", "fail", "flipped sign"),
    "judge by place": ("first_place", JUDGE, "place", "fail", "the first in 60"),
    "judge without an opinion": ("undecided", JUDGE, "spread", "fail", "answers 0 to all"),
    "judge that shouts": ("shouting", JUDGE, "saturation", "fail", "saturated logits"),
}


@pytest.fixture(scope="module")
def service(judge: Path) -> Iterator[str]:
    with RewardServer([RewardScorer.load(judge, dtype="float32")], name="judge") as server:
        yield server.url


def examine(what: str, judge: Path, **options: Any) -> CheckReport:
    return check_rm(what, data=judge.parent / "pairs.jsonl", **options)


@pytest.mark.parametrize(
    ("name", "options", "checks"),
    [
        ("sound", {}, 22),
        ("turned", {"output": "safety"}, 22),
        ("turned", {"output": "reward"}, 22),
        ("safer", JUDGE, 23),
    ],
)
def test_a_sound_one_is_given_no_fail_and_no_warning(
    judge: Path, name: str, options: dict[str, str], checks: int
) -> None:
    report = examine(f"outside_models:{name}", judge, **options)
    assert complaints(report) == {}
    skips = {"calibration"} if options.get("output") == "reward" or name == "safer" else set()
    assert {check.name for check in report.of("skip")} == skips
    assert len(report.checks) == checks
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["folder"] == f"outside_models:{name}"


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_named_and_only_that_one(judge: Path, name: str) -> None:
    function, options, check, verdict, words = FAULTS[name]
    report = examine(f"outside_models:{function}", judge, **options)
    assert complaints(report) == {check: verdict}, report
    assert words in report[check].finding
    assert report[check].way_out or name == "raises"  # a traceback of the user's own code
    assert all(one.details.get("because_of") in (None, check) for one in report.of("skip"))


def test_a_service_is_judged_as_its_folder_is(judge: Path, service: str) -> None:
    from_outside, folder = examine(service, judge), examine(str(judge), judge)
    assert complaints(from_outside) == complaints(folder) == {}
    for name in ("direction", "saturation", "groups", "calibration", "doubled", "refusal first", "Chinese"):
        assert from_outside[name].number == pytest.approx(folder[name].number, abs=1e-6), name
    assert complaints(examine(service, judge, output="safety")) == {"direction": "fail"}


def test_a_service_that_cuts_says_so(judge: Path) -> None:
    scorer = RewardScorer.load(judge, dtype="float32")
    scorer.policy = replace(scorer.policy, max_length=20)
    with RewardServer([scorer], name="short") as server:
        cut = examine(server.url, judge)["truncation"]
    assert cut.verdict == "fail"
    assert cut.number is not None
    assert cut.number > 0.5


def test_a_dead_service_is_told_before_anything_is_asked(judge: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    report = examine(address, judge)
    assert complaints(report) == {"load": "fail"}
    assert "ConnectError" in report["load"].finding


@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_a_folder_as_judge_is_asked_too(judge: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder-as-judge"
    tiny_hf_rm(folder, kind=kind)
    report = examine(str(folder), judge, **JUDGE, seconds=2.0)
    assert report["load"].verdict == report["finite"].verdict == report["repeat"].verdict == "pass"
    assert "labelled pairs" in report["place"].finding
    template = "{{ nothing.of.this }}"
    assert "template of a pair fails" in examine(str(folder), judge, **JUDGE, chat_template=template)["answers"].finding


def test_a_slow_one_is_asked_less(judge: Path) -> None:
    heard: list[str] = []
    report = examine("outside_models:slow", judge, seconds=0.5, say=heard.append)
    assert complaints(report) == {}
    assert "40 of 120 labelled texts" in report["answers"].finding
    assert heard[0].startswith("about ")
    assert report["direction"].details["texts"] == 40


def test_without_data_harmless_replies_may_score_alike(judge: Path) -> None:
    report = check_rm("outside_models:always_the_same")
    assert complaints(report) == {"spread": "warn"}
    assert [check.name for check in report.checks] == [
        "load",
        "answers",
        "finite",
        "repeat",
        "order",
        "batch",
        "spread",
    ]
    assert len(report.logits) == 16


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ("outside_models:sound", {"kind": "sequence"}, "kind is 'sequence': .* can be function, pairwise"),
        ("http://localhost:1", {"kind": "pairwise"}, "can be http"),
        ("outside_models:sound", {"plain": True}, "plain code or a policy"),
        ("outside_models:sound", {"output": "good"}, "output is 'good'"),
    ],
)
def test_what_can_not_be_asked_is_an_error(given: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RMError, match=words):
        check_rm(given, **options)


def test_a_judge_of_pairs_needs_two_replies_to_one_prompt(tmp_path: Path) -> None:
    def talk(prompt: str) -> Any:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}]

    with pytest.raises(DataError, match="no safe and unsafe reply to one prompt"):
        check_rm("outside_models:safer", kind="pairwise", pairs=[(talk("a"), talk("b"))])


def test_cli_takes_a_function_and_a_service(judge: Path, service: str) -> None:
    data = ["--data", str(judge.parent / "pairs.jsonl")]
    done = CliRunner().invoke(app, ["check", "outside_models:turned", *data, "--output", "safety", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
    done = CliRunner().invoke(app, ["check", service, "--fast"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert service in done.output
    assert CliRunner().invoke(app, ["check", "outside_models:turned", *data]).exit_code == 1
