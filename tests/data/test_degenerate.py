"""Spoiled replies: what rows are made, from which replies, and that they are the same twice."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ups_rm.data.degenerate import DEGENERATE, MAX_WORDS, SPOILS, Spoil, degenerate_rows
from ups_rm.data.rows import Row, read_rows

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
    made = degenerate_rows(sample, 200)
    assert len(made) == 200 == len({(row.prompt, row.response_1) for row in made})
    for row in made:
        assert (row.prompt, row.response_1) in good
        assert row.response_0 != row.response_1
        assert row.safe == (None, None)
        assert (row.safer_response_id, row.better_response_id, row.file) == (None, 1, DEGENERATE)
    assert {row.prompt_source for row in made} == {row.prompt_source for row in sample}


def test_same_rows_and_seed_same_result(sample: list[Row]) -> None:
    assert degenerate_rows(sample, 50) == degenerate_rows(sample, 50)
    assert degenerate_rows(sample, 50, seed=1) != degenerate_rows(sample, 50)


def test_no_more_than_there_are(sample: list[Row]) -> None:
    made = degenerate_rows(sample[:3], 1000)
    assert 0 < len(made) <= 6
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
