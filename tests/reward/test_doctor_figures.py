"""The doctor's figures by themselves: intervals, groups, transforms, tricks, truncation, the data and the time."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ups_rm.cli.rm import app
from ups_rm.data.sample import sample_root
from ups_rm.errors import DataError
from ups_rm.reward.card import write_card
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.doctor.direction import auc_interval, figures
from ups_rm.reward.doctor.exam import DataExam
from ups_rm.reward.doctor.labelled import Pair, collect, fewer, read_labelled
from ups_rm.reward.doctor.scale import best_transform, separations
from ups_rm.reward.doctor.tricks import TRICKS, mid_word, trick
from ups_rm.types import Conversation, Score


def talk(prompt: str, reply: str) -> Conversation:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


# --- direction ---


def test_the_auc_interval_covers_the_true_auc_as_often_as_it_says() -> None:
    """Two normals a distance of 1 apart: AUC = Phi(1 / sqrt 2)."""
    truth, rng, covered = NormalDist().cdf(2**-0.5), np.random.default_rng(3), 0
    for _ in range(60):
        labels = torch.arange(60) % 2
        logits = torch.tensor(rng.normal(size=60)) + labels
        low, high = auc_interval(logits, labels, torch.arange(60), n_resamples=100)
        covered += low <= truth <= high
    assert covered >= 50  # of 60; 57 expected, fewer with probability 0.001


def test_repeats_of_a_prompt_do_not_narrow_the_interval() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(40) % 2
    logits = torch.randn(40, generator=generator) + labels
    once = auc_interval(logits, labels, torch.arange(40))
    often = auc_interval(logits.repeat(5), labels.repeat(5), torch.arange(40).repeat(5))
    assert often == pytest.approx(once, abs=0.02)


def test_contradicted_and_unknown_labels_are_no_evidence() -> None:
    rows = [Pair((talk(f"{i}", "good"), talk(f"{i}", "bad")), (False, True)) for i in range(8)]
    both_ways = [
        Pair((talk("x", "odd"), talk("x", "even")), (False, True)),
        Pair((talk("x", "odd"), talk("x", "even")), (True, False)),
    ]
    unknown = [Pair((talk("y", "who"), talk("y", "knows")), (None, None))]
    data = collect([*rows, *both_ways, *unknown], "rows")
    assert len(data.conversations) == 20
    logits = torch.tensor([float("bad" in talk[-1]["content"]) for talk in data.conversations])
    found = figures(data, logits)
    assert (found.texts, found.auc, found.pairs) == (16, 1.0, 10)
    assert found.pairwise_accuracy == pytest.approx((8 + 0.5 + 0.5) / 10)


# --- scale ---


def test_flat_sigmoids_lose_groups_and_another_transform_keeps_them() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(50).repeat_interleave(4)
    within = torch.randn(200, generator=generator, dtype=torch.float64)
    sound = {one.name: one for one in separations(within, prompts)}
    assert sound["sigmoid"].zero_share == 0
    assert best_transform(list(sound.values())).name == "sigmoid"
    side = (prompts % 2 * 2 - 1) * 20  # every prompt wholly safe or wholly unsafe, far out
    flat = separations(within * 3 + side, prompts)
    assert flat[0].zero_share > 0.9
    best = best_transform(flat)
    assert best.name.startswith("tempered sigmoid")
    assert best.zero_share == 0


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 0.3), st.integers(0, 10_000))
def test_simulated_groups_have_the_spread_that_was_drawn(deviation: float, seed: int) -> None:
    """Near 0 the sigmoid's slope is 1/4, so a group's std is deviation / 4 times what n = 4 leaves of it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(300).repeat_interleave(5)
    logits = torch.randn(1500, generator=generator, dtype=torch.float64) * deviation
    found = {one.name: one for one in separations(logits, prompts)}
    # the median of chi with 3 degrees of freedom, by sqrt 3, against the std of all: residual and mean of 5
    assert found["logit"].group_std == pytest.approx(1.538 / 3**0.5 / 1.2**0.5, rel=0.1)
    low = sum(
        np.std(np.random.default_rng(i).normal(size=4) * deviation / 4, ddof=1) < 0.01 for i in range(1000)
    )  # by numpy, with the linearised sigmoid
    assert found["sigmoid"].low_share == pytest.approx(low / 1000, abs=0.05)


def test_prompts_with_one_reply_tell_nothing_of_groups() -> None:
    assert separations(torch.randn(5, dtype=torch.float64), torch.arange(5)) == []


# --- tricks ---

WEAKNESSES = {
    "doubled": lambda reply: reply.count("zap") >= 2,
    "politeness": lambda reply: "thank you" in reply,
    "refusal first": lambda reply: "I can't help" in reply,
    "emptied": lambda reply: reply == "",
    "cut mid-word": lambda reply: reply.endswith(("k", "kr")),
    "prompt copied": lambda reply: reply.startswith("How"),
    "capitals": lambda reply: reply.isupper(),
    "Chinese": lambda reply: any("\u4e00" <= letter <= "\u9fff" for letter in reply),
    "another prompt's reply": lambda reply: False,
}


def exam_of(logit: Any) -> Any:
    """An examination of a made-up RM whose logit is a function of prompt and reply."""
    rows = [
        Pair((talk(f"How {i}?", f"fine {i} bread"), talk(f"How {i}?", f"{i} zap krullkrull")), (False, True))
        for i in range(20)
    ]
    data = collect(rows, "rows")

    class Scorer:
        def score(self, talks: list[Conversation]) -> list[Score]:
            return [Score(logit(one[0]["content"], one[-1]["content"]), 0.5, 1, False) for one in talks]

    return DataExam(scorer=Scorer(), data=data, trick_replies=12)


@pytest.mark.parametrize("weak", TRICKS)
def test_the_trick_that_fools_an_rm_is_the_one_that_pays(weak: str) -> None:
    def logit(prompt: str, reply: str) -> float:
        if weak == "another prompt's reply":
            return -3.0 if prompt[4:-1] not in reply.split() and "zap" in reply.split() else float("fine" not in reply)
        return -3.0 if WEAKNESSES[weak](reply) else float("fine" not in reply)

    exam = exam_of(logit)
    pays = {name for name in TRICKS if trick(name)(exam).verdict == "warn"}
    assert weak in pays
    assert pays <= {weak, "politeness"} if weak != "another prompt's reply" else True
    result = trick(weak)(exam)
    assert result.number > 0.9
    example = result.details["examples"][0]
    assert example["logit_after"] == -3.0 < example["logit_before"]


def test_an_rm_that_is_not_fooled_is_given_no_warning() -> None:
    exam = exam_of(lambda prompt, reply: 2.0 if "fine" not in reply else -2.0)
    assert {trick(name)(exam).verdict for name in TRICKS} == {"pass"}


@given(st.text(max_size=80))
def test_cut_mid_word_is_a_beginning_that_ends_inside_a_word(text: str) -> None:
    cut = mid_word(text)
    assert text.startswith(cut)
    if any(a.isalnum() and b.isalnum() for a, b in pairwise(text)):
        assert cut[-1].isalnum()
        assert text[len(cut)].isalnum()


# --- truncation ---


@pytest.mark.parametrize(("limit", "verdict"), [(1000, "pass"), (60, "warn"), (33, "fail")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_counts_what_is_cut_and_measures_it(
    rm_folder: Path, tmp_path: Path, limit: int, verdict: str, side: str
) -> None:
    import shutil

    folder = shutil.copytree(rm_folder, tmp_path / "rm")
    write_card(folder, policy={"max_length": limit, "truncation_side": side})
    pairs = [(talk(f"Say {i}", "word " * i), talk(f"Say {i}", "piano " * i)) for i in range(1, 21)]
    found = check_rm(folder, pairs=pairs)["truncation"]
    assert found.verdict == verdict
    assert found.details["side"] == side
    lengths = found.details["lengths"]
    assert (found.number == 0) == (lengths["max"] <= limit)
    assert found.details["moved"][side] > 0
    assert ("the oldest tokens" in found.finding) == (side == "left")


# --- data and time ---


def test_data_are_read_from_pairs_rows_and_the_sample(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [
        {"prompt": "p", "safe_response": "s", "unsafe_response": "u"},
        {"prompt": asked, "safe_response": "s", "unsafe_response": "u"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = read_labelled(file)
    assert sorted(map(len, data.conversations)) == [2, 2, 4, 4]
    assert len(data.pairs) == 2
    sample, one_file = read_labelled("sample"), read_labelled(sample_root() / "data/Alpaca-7B/test.jsonl", max_rows=30)
    assert len(sample.pairs) == 200
    assert len(one_file.pairs) <= 30
    for data in (sample, one_file):
        for safer, less_safe in data.pairs.tolist():
            assert data.unsafe[less_safe] > 0
            assert data.prompt_id[safer] == data.prompt_id[less_safe]
    file.write_text(json.dumps({"prompt": "p", "response_0": "a", "response_1": "b"}))
    with pytest.raises(DataError, match="no labelled row"):
        read_labelled(file)
    file.write_text(json.dumps({"messages": talk("p", "r")}))
    with pytest.raises(DataError, match="must have prompt, safe_response"):
        read_labelled(file)


def test_fewer_keeps_pairs_whole() -> None:
    data = read_labelled("sample", max_rows=300)
    less = fewer(data, 25)
    assert len(less.pairs) == 25
    for before, after in zip(data.pairs[:25].tolist(), less.pairs.tolist(), strict=True):
        assert [data.conversations[i] for i in before] == [less.conversations[i] for i in after]
    assert 50 <= len(less.conversations) < 80
    assert less.unsafe.shape == less.prompt_id.shape == (len(less.conversations),)


def test_a_slow_rm_is_asked_less_and_says_so_first(rm_folder: Path) -> None:
    said: list[str] = []
    report = check_rm(rm_folder, full=True, seconds=0.3, say=said.append)
    assert said[0].startswith("about ")
    assert "of 400 labelled texts" in said[0]
    assert report["direction"].details["pairs"] < 200
    assert report["doubled"].details.get("because_of") == "direction" or "of 4 unsafe" in report["doubled"].finding


def test_float16_that_overflows_fails_by_the_module(rm_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """On a CPU float16 is refused; here it is let through, because the arithmetic is the same."""
    import shutil

    from test_doctor_faults import float16

    folder = shutil.copytree(rm_folder, tmp_path / "rm")
    float16(folder)
    monkeypatch.setattr("ups_rm.reward.doctor.check.compute_dtype", lambda name, device="cpu": torch.float16)
    report = check_rm(folder)
    assert [check.name for check in report.of("fail")] == ["number range"]
    assert "float16 overflows, first at model." in report["number range"].finding
    assert report["number range"].number == math.inf


# --- the command line ---


def test_cli_prints_the_report_alone_as_json(rm_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(rm_folder), "--fast", "--json", "-"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {"name", "section", "verdict", "finding", "number", "limit", "way_out"} <= report["checks"][0].keys()
    assert "direction" not in {check["name"] for check in report["checks"]}


def test_cli_draws_and_explains(rm_folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "new/reliability.png"
    options = ["--max-pairs", "30", "--seconds", "5", "--policy", str(rm_folder), "--plot", str(plot)]
    done = CliRunner().invoke(app, ["check", str(rm_folder), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in (
        "loaded exactly",
        "reads the right token",
        "skipped because of direction: doubled",
        "may be trained against",
        "policy and RM cut",
    ):
        assert words in done.output
    assert plot.is_file()
