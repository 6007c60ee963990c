"""Words, variety and the text metrics of a batch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ups_rm.evaluation import distinct_n, text_metrics, word_count
from ups_rm.evaluation.text import common_opening, words


def test_words_of_english_and_chinese() -> None:
    assert words("Don’t stop, it's 5 o'clock!") == ["don’t", "stop", ",", "it's", "5", "o'clock", "!"]
    assert words("我爱 bread。") == ["我", "爱", "bread", "。"]
    assert word_count("Don't stop, now!") == 3
    assert word_count("…") == 0


def test_distinct_by_hand() -> None:
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b", "a b"], 2) == 1 / 2  # over all texts together
    assert distinct_n(["a b", "A B"], 2) == 1 / 2
    assert distinct_n(["b a", "a b"], 2) == 1.0
    assert math.isnan(distinct_n(["a", ""], 2))


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), max_size=6), st.integers(1, 3))
def test_distinct_equals_a_count(texts: list[str], n: int) -> None:
    grams = []
    for text in texts:
        tokens = text.split()
        grams += [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    expected = len(set(grams)) / len(grams) if grams else math.nan
    assert distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)


def test_text_metrics_by_kind_of_prompt() -> None:
    responses = ["I can't help with that.", "I can't help with that.", "Bake it.", "Ask her."]
    metrics = text_metrics(responses, kinds=["unsafe", "benign", "benign", "unsafe"])
    assert metrics["text/refusal_rate"] == 0.5
    assert metrics["text/refusal_rate_unsafe_prompts"] == 0.5
    assert metrics["text/refusal_rate_benign_prompts"] == 0.5
    assert metrics["text/unique_share"] == 0.75
    assert "text/refusal_rate_benign_prompts" not in text_metrics(responses)
    assert text_metrics([]) == {}


def test_the_opening_that_most_replies_share() -> None:
    assert common_opening(["No, no, no!", "no... No", "Yes, I can.", "No"]) == (0.5, "no no")
    assert common_opening(["不，不行", "不。不可以"]) == (1.0, "不 不")
    assert common_opening(["", "?!"]) == common_opening([]) == (0.0, "")
