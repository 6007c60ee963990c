"""Figures by group, category and judge, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.console import console
from ups_rm.data.prompts import PromptRow
from ups_rm.evaluation import LogprobSums, Verdict, compare
from ups_rm.evaluation.language import keeps_language, main_script
from ups_rm.evaluation.tables import group_tables
from ups_rm.types import Message, Score

GROUP = {"u": "unsafe", "a": "alarming", "b": "benign"}


def rows_of(letters: str, categories: dict[int, list[str]] | None = None, text: str = "Question?") -> list[PromptRow]:
    return [
        PromptRow(
            i,
            [Message(role="user", content=text)],
            "unsafe" if letter == "u" else "benign",
            {"group": GROUP[letter], "categories": (categories or {}).get(i, [])},
        )
        for i, letter in enumerate(letters)
    ]


def scores_of(values: list[float]) -> list[Score]:
    return [Score(math.log((1 - v) / v), v, 5, False) for v in values]


def summary_of(letters: str, before: list[float], after: list[float], **more):
    texts = [f"Reply {i}." for i in range(len(letters))]
    categories = more.pop("categories", None)
    return compare(
        rows_of(letters, categories), texts, texts, scores_of(before), scores_of(after), kl=0.0, n_resamples=200, **more
    ).summary()


def test_groups_are_counted_apart() -> None:
    summary = summary_of("uuab", [0.2, 0.6, 0.9, 0.8], [0.7, 0.4, 0.9, 0.85])
    unsafe, alarming, benign = (summary["groups"][group] for group in GROUP.values())
    assert unsafe["safe_score"] | {"ci95": 0} == {
        "before": pytest.approx(0.4), "after": pytest.approx(0.55), "diff": pytest.approx(0.15), "ci95": 0, "n": 2
    }  # fmt: skip
    assert (unsafe["judged_unsafe"]["before"], unsafe["judged_unsafe"]["after"]) == (0.5, 0.5)
    assert {key: unsafe["win_rate"][key] for key in ("rate", "wins", "ties", "losses")} == {
        "rate": 0.5, "wins": 1, "ties": 0, "losses": 1
    }  # fmt: skip
    assert alarming["win_rate"] == {"rate": 0.5, "ci95": [0.5, 0.5], "wins": 0, "ties": 1, "losses": 0}
    assert benign["win_rate"] == {"rate": 1.0, "ci95": [1.0, 1.0], "wins": 1, "ties": 0, "losses": 0}
    assert list(summary_of("aa", [0.5, 0.5], [0.5, 0.5])["groups"]) == ["alarming"]


def test_harm_categories_are_of_unsafe_prompts_and_a_prompt_may_have_two() -> None:
    named = {0: ["Violence"], 1: ["Violence", "Drugs"], 2: ["homonym"]}
    categories = summary_of("uua", [0.2, 0.4, 0.9], [0.4, 0.4, 0.1], categories=named)["categories"]
    assert list(categories) == ["Drugs", "Violence"]
    assert (categories["Violence"]["n"], categories["Drugs"]["n"]) == (2, 1)
    assert categories["Violence"]["safe_score"]["diff"] == pytest.approx(0.1)
    assert categories["Drugs"]["safe_score"]["diff"] == 0


def test_perplexity_and_kl_are_per_token_of_the_group() -> None:
    """Two unsafe replies of 2 and 6 tokens with 8 nats together: perplexity e; the benign reply counts apart."""
    sums = LogprobSums(kl=[0.4, 0.4, 3.0], nll_before=[2.0, 6.0, 5.0], nll_after=[4.0, 4.0, 10.0])
    lengths = [2, 6, 5]
    summary = summary_of(
        "uub", [0.5] * 3, [0.5] * 3, logprobs=sums, lengths_before=lengths, lengths_after=lengths
    )  # fmt: skip
    unsafe, benign = summary["groups"]["unsafe"], summary["groups"]["benign"]
    assert unsafe["perplexity"] == {"before": pytest.approx(math.e), "after": pytest.approx(math.e)}
    assert benign["perplexity"] == {"before": pytest.approx(math.e), "after": pytest.approx(math.e**2)}
    assert (unsafe["kl"], benign["kl"]) == (pytest.approx(0.1), pytest.approx(0.6))
    without = summary_of("u", [0.5], [0.5])["groups"]["unsafe"]
    assert (without["perplexity"], without["kl"]) == ({"before": None, "after": None}, None)


def test_a_judge_that_disagrees_shows() -> None:
    """The RM sees every reply get safe; the judge sees none, and could not judge the third prompt."""
    verdicts = (
        [Verdict(0.0, "full_compliance")] * 3,
        [Verdict(0.0, "full_compliance"), Verdict(0.0, "full_refusal"), Verdict(None)],
    )
    judged = summary_of("uuu", [0.1] * 3, [0.9] * 3, judges={"other": verdicts})["judges"]["other"]["unsafe"]
    assert judged["judged_unsafe"] == {"before": 1.0, "after": 1.0, "diff": 0.0, "ci95": [0.0, 0.0], "n": 2}
    assert judged["agrees_with_rm"] == {"before": 1.0, "after": 0.0}
    assert judged["no_verdict"] == {"before": 0, "after": 1}
    assert (judged["refusal"]["before"], judged["refusal"]["after"]) == (0.0, 0.5)


def test_a_judge_without_any_verdict_is_none_and_not_an_error() -> None:
    nothing = [Verdict(None)] * 2
    summary = summary_of("ub", [0.1, 0.1], [0.9, 0.9], judges={"mute": (nothing, nothing)})
    judged = summary["judges"]["mute"]["unsafe"]
    assert judged["safe_score"] == {"before": None, "after": None, "diff": None, "ci95": None, "n": 0}
    assert judged["win_rate"]["rate"] is None
    assert judged["agrees_with_rm"] == {"before": None, "after": None}
    json.dumps(summary, allow_nan=False)
    with console.capture() as shown:
        for table in group_tables(summary):
            console.print(table)
    assert "mute" in shown.get()


def test_the_tables_show_groups_categories_and_judges() -> None:
    verdicts = [Verdict(1.0)] * 4
    summary = summary_of(
        "uuab", [0.2, 0.2, 0.9, 0.9], [0.7, 0.7, 0.9, 0.8], categories={0: ["Fraud [x]"]},
        judges={"second": (verdicts, verdicts)},
    )  # fmt: skip
    with console.capture() as shown:
        for table in group_tables(summary):
            console.print(table)
    text = shown.get()
    for part in ("2 unsafe prompts", "1 harmless prompts that sound dangerous", "1 harmless prompts", "Fraud [x]",
                 "+0.500  95% [+0.500, +0.500]", "2 safer, 0 equal, 0 less safe", "second"):  # fmt: skip
        assert part in text, part
    (category,) = (line for line in text.splitlines() if "Fraud [x]" in line)
    assert "+0.500" in category
    assert "95%" not in category, "the interval of one prompt has no width and says nothing"


@settings(max_examples=25, deadline=None)
@given(
    letters=st.text("uab", min_size=1, max_size=8),
    values=st.lists(st.floats(0.001, 0.999), min_size=8, max_size=8),
)
def test_the_same_replies_differ_by_exactly_nothing(letters: str, values: list[float]) -> None:
    values = values[: len(letters)]
    summary = summary_of(letters, values, values)
    for figures in [*summary["groups"].values(), *summary["categories"].values()]:
        assert figures["win_rate"]["rate"] == 0.5
        for measure in (value for value in figures.values() if isinstance(value, dict) and "diff" in value):
            assert measure["n"] == 0 or (measure["diff"], measure["ci95"]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Boil them for twenty minutes.", "latin"),
        ("煮二十分钟。", "cjk"),
        ("用 Python 写一个排序函数。", "cjk"),
        ("Use the word 你好 to greet her.", "latin"),
        ("二十分ゆでます。", "kana"),
        ("Варите двадцать минут.", "cyrillic"),
        ("اتركها عشرين دقيقة", "arabic"),
        ("20 + 3 = 23 !", None),
        ("", None),
    ],
)
def test_the_script_of_a_text(text: str, script: str | None) -> None:
    assert main_script(text) == script


def test_language_is_kept_or_not_or_unknown() -> None:
    assert keeps_language("土豆要煮多久？", "大约二十分钟。") == 1.0
    assert keeps_language("土豆要煮多久？", "About twenty minutes.") == 0.0
    assert keeps_language("土豆要煮多久？", "20") is None
