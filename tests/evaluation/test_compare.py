"""Before and after: the summary's keys and figures, the table, the pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ups_rm.console import console
from ups_rm.data.prompts import PromptRow
from ups_rm.errors import DataError
from ups_rm.evaluation import Comparison, compare, distinct_n, paired_bootstrap
from ups_rm.types import Message, Score

NO = "I can't help with that."


def prompts_of(kinds: str, indices: list[int] | None = None) -> list[PromptRow]:
    """`"uub"`: two unsafe prompts and a benign one."""
    return [
        PromptRow(
            index=i if indices is None else indices[i],
            messages=[Message(role="user", content=f"Question [b] {i}?")],
            kind="unsafe" if letter == "u" else "benign",
        )
        for i, letter in enumerate(kinds)
    ]


def scores_of(values: list[float]) -> list[Score]:
    return [Score(logit=-value, safe_score=value, tokens=5, truncated=False) for value in values]


def example() -> Comparison:
    return compare(
        prompts_of("uubb"),
        before=["Sure, do it.", "Yes, go on then.", "Bake it hot.", NO],
        after=[NO, NO, "Bake it slowly.", "Ask her first."],
        scores_before=scores_of([0.2, 0.3, 0.8, 0.9]),
        scores_after=scores_of([0.9, 0.8, 0.8, 0.9]),
        kl=0.02,
    )


def test_the_summary_has_the_agreed_keys_and_figures() -> None:
    summary = example().summary()
    interval = paired_bootstrap([0.2, 0.3, 0.8, 0.9], [0.9, 0.8, 0.8, 0.9])
    assert {key: summary[key] for key in list(summary)[:5]} == {
        "safe_score": {
            "before": pytest.approx(0.55),
            "after": pytest.approx(0.85),
            "diff": pytest.approx(0.3),
            "ci95": [interval.low, interval.high],
            "n": 4,
        },
        "refusal_rate": {"unsafe": {"before": 0.0, "after": 1.0}, "benign": {"before": 0.5, "after": 0.0}},
        "length": {"before": 15 / 4, "after": 16 / 4},
        "distinct_2": {
            "before": distinct_n(["Sure, do it.", "Yes, go on then.", "Bake it hot.", NO], 2),
            "after": distinct_n([NO, NO, "Bake it slowly.", "Ask her first."], 2),
        },
        "kl": 0.02,
    }
    assert list(summary)[5:] == ["groups", "categories", "judges"]
    json.dumps(summary, allow_nan=False)


def test_lengths_are_the_callers_tokens_if_given() -> None:
    comparison = compare(
        prompts_of("u"), ["a b"], ["c"], scores_of([0.1]), scores_of([0.2]), kl=0.0,
        lengths_before=[7], lengths_after=[3],
    )  # fmt: skip
    assert comparison.summary()["length"] == {"before": 7.0, "after": 3.0}
    assert comparison.length_unit == "tokens"
    assert example().length_unit == "words"


def test_several_replies_to_a_prompt_are_one_pair() -> None:
    """Replies to the same prompt are not independent: 2 prompts with 2 replies each are n = 2."""
    comparison = compare(
        prompts_of("uuuu", indices=[5, 5, 6, 6]),
        ["a"] * 4,
        ["b"] * 4,
        scores_of([0.1, 0.3, 0.5, 0.7]),
        scores_of([0.4, 0.4, 0.8, 0.8]),
        kl=0.0,
    )
    summary = comparison.summary()["safe_score"]
    assert summary["n"] == 2
    assert (summary["before"], summary["after"]) == (pytest.approx(0.4), pytest.approx(0.6))
    assert (comparison.safe_score.low, comparison.safe_score.high) == (pytest.approx(0.2), pytest.approx(0.2))


def test_without_benign_prompts_their_rate_is_none_and_the_table_has_a_dash() -> None:
    comparison = compare(prompts_of("u"), ["a"], ["b"], scores_of([0.1]), scores_of([0.2]), kl=0.0)
    assert comparison.summary()["refusal_rate"]["benign"] == {"before": None, "after": None}
    assert comparison.summary()["distinct_2"] == {"before": None, "after": None}
    with console.capture() as capture:
        console.print(comparison.table())
    row = next(line for line in capture.get().splitlines() if "refusals, benign prompts" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["-", "-", "-"]


def test_the_table_shows_change_and_interval() -> None:
    with console.capture() as capture:
        console.print(example().table())
    text = capture.get()
    assert "4 held-out prompts" in text
    assert "+0.300  95% [+0.000, +0.600]" in text
    assert "+100.0 points" in text
    assert "length, words" in text
    assert "0.0200" in text


def test_pairs_are_spread_over_both_kinds_and_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    count = 20
    comparison = compare(
        prompts_of("u" * 15 + "b" * 5),
        ["Sure."] * count,
        [NO] * count,
        scores_of([0.25] * count),
        scores_of([0.75] * count),
        kl=0.0,
    )
    comparison.show_pairs(5)
    shown = capsys.readouterr().out
    assert [int(line.split()[2].rstrip("?")) for line in shown.splitlines() if line.startswith("Question")] == [
        0, 3, 7, 11, 15,
    ]  # fmt: skip
    assert "Question [b] 0?" in shown
    assert "  before 0.25  Sure." in shown
    assert f"  after  0.75  refusal  {NO}" in shown


@pytest.mark.parametrize(("kinds", "count", "rows"), [("u", 5, 1), ("b", 5, 1), ("ub", 5, 2), ("uub", 1, 1)])
def test_pairs_of_few_prompts(kinds: str, count: int, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    values = [0.5] * len(kinds)
    texts = ["x y"] * len(kinds)
    compare(prompts_of(kinds), texts, texts, scores_of(values), scores_of(values), kl=0.0).show_pairs(count)
    assert capsys.readouterr().out.count("Question") == rows


def test_the_jsonl_has_every_pair(tmp_path: Path) -> None:
    file = example().write_jsonl(tmp_path / "deep" / "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(rows) == 4
    assert rows[3]["kind"] == "benign"
    assert rows[3]["messages"] == [{"role": "user", "content": "Question [b] 3?"}]
    assert (rows[3]["group"], rows[3]["categories"]) == ("benign", [])
    assert rows[3]["before"] == {
        "response": NO, "logit": -0.9, "safe_score": 0.9, "length": 5, "refusal": True, "refusal_label": "full_refusal",
        "nll": None, "kl": None, "judges": {}, "helpfulness": None,
    }  # fmt: skip
    assert rows[3]["after"]["refusal"] is False
    assert {path.name for path in file.parent.iterdir()} == {"pairs.jsonl", ".pairs.jsonl.manifest.json"}


def test_lists_that_do_not_match_are_an_error_with_the_numbers() -> None:
    with pytest.raises(DataError, match="2 prompts, 1 and 2 replies, 2 and 2 scores"):
        compare(prompts_of("uu"), ["a"], ["b"] * 2, scores_of([0.1] * 2), scores_of([0.2] * 2), kl=0.0)
    with pytest.raises(DataError, match="0 prompts"):
        compare([], [], [], [], [], kl=0.0)
