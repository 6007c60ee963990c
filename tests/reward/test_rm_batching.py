"""Batches: every sequence once, within the limit, little padding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ups_rm.reward.batching import token_batches

lengths = st.lists(st.integers(min_value=1, max_value=300), max_size=80)


@given(lengths, st.integers(min_value=1, max_value=2000), st.floats(min_value=0, max_value=1), st.integers(1, 1000))
def test_every_index_once_and_padded_size_bounded(lengths, limit, waste, enough):
    batches = token_batches(lengths, limit, max_waste=waste, enough_tokens=enough)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= limit


@given(lengths)
def test_beyond_enough_tokens_padding_is_bounded(lengths):
    for batch in token_batches(lengths, 10**6, max_waste=0.1, enough_tokens=100):
        tokens = sum(lengths[i] for i in batch)
        padded = len(batch) * max(lengths[i] for i in batch)
        last = lengths[batch[-1]]
        assert tokens - last < 100 or 1 - tokens / padded <= 0.1 + 1e-9


@given(lengths)
def test_longest_first(lengths):
    flat = [lengths[i] for batch in token_batches(lengths, 500) for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_equal_lengths_fill_batches_without_padding():
    assert token_batches([5] * 7, 15) == [[0, 1, 2], [3, 4, 5], [6]]


def test_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        token_batches([1], 0)
