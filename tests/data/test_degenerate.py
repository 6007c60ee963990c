"""Spoiled replies: what rows are made, from which replies, and that they are the same twice."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ups_rm.data.degenerate import DEGENERATE, MAX_WORDS, REFUSALS, SPOILS, Spoil, degenerate_rows
from ups_rm.data.prompts import kind_of
from ups_rm.data.rows import Row, read_rows
from ups_rm.evaluation.refusal import is_refusal

WORDS = [f"w{i}" for i in range(100)]
OTHER = [f"o{i}" for i in range(100)]


@pytest.fixture(scope="module")
def sample() -> list[Row]:
    return list(read_rows("sample", split="train"))


def test_rows_set_a_good_reply_against_its_spoiled_form(sample: list[Row]) -> None:
    good = {
        (row.prompt, " ".join(reply.split()[:MAX_WORDS]))
        for row in sample
        for reply, safe in zip(row.responses, row.safe, strict=True)
        if safe
    }
    made = degenerate_rows(sample, 200, refuses=is_refusal)
    assert len({(row.prompt, row.response_1) for row in made}) == 200 < len(made) < 400
    assert [row.line for row in made] == list(range(1, len(made) + 1))
    for row in made:
        assert (row.prompt, row.response_1) in good
        assert row.response_0 != row.response_1
        assert row.safe == (None, None)
        assert (row.safer_response_id, row.better_response_id, row.file) == (None, 1, DEGENERATE)
    assert {row.prompt_source for row in made} == {row.prompt_source for row in sample}


def test_same_rows_and_seed_same_result(sample: list[Row]) -> None:
    assert degenerate_rows(sample, 50) == degenerate_rows(sample, 50)
    assert degenerate_rows(sample, 50, seed=1) != degenerate_rows(sample, 50)


def test_harmless_prompts_and_only_these_are_set_against_a_refusal(sample: list[Row]) -> None:
    benign = [row for row in sample if kind_of(row.prompt_source) == "benign"]
    unsafe = [row for row in sample if kind_of(row.prompt_source) == "unsafe"]
    assert len(degenerate_rows(unsafe, 100, refuses=is_refusal)) == 100
    made = degenerate_rows(benign, 100, refuses=is_refusal)
    against = [row for row in made if is_refusal(row.response_0) and not is_refusal(row.response_1)]
    stock = [row for row in against if row.response_0.startswith(REFUSALS)]
    assert len(against) > 80
    assert 15 < len(stock) < 60


def test_no_more_than_there_are(sample: list[Row]) -> None:
    made = degenerate_rows(sample[:3], 1000)
    assert 0 < len(made) <= 12
    assert degenerate_rows([], 10) == degenerate_rows(sample, 0) == []


@pytest.mark.parametrize("spoil", SPOILS)
def test_spoiled_replies_are_about_as_long_as_good_ones(spoil: Spoil) -> None:
    for seed in range(200):
        words = spoil(random.Random(seed), WORDS, OTHER)
        assert 3 < len(words) <= 20 + 16 * 6
        assert words != WORDS[: len(words)]


def test_a_loop_repeats_itself() -> None:
    looped = SPOILS[0]
    for seed in range(200):
        assert max(Counter(looped(random.Random(seed), WORDS, OTHER)).values()) >= 4
