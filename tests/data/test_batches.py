"""Which prompts a step sees: a function of the seed, every prompt in its turn, the asked share of harmless ones."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.data.batches import distinct_prompts, prompt_batches, select_prompts, steps_per_epoch
from ups_rm.data.prompts import PromptRow
from ups_rm.errors import RecipeError
from ups_rm.recipe import Data
from ups_rm.types import Message


def rows_of(unsafe: int, benign: int, repeat: int = 1) -> list[PromptRow]:
    texts = [(f"unsafe {i}", "unsafe") for i in range(unsafe)] + [(f"benign {i}", "benign") for i in range(benign)]
    return [
        PromptRow(i, [Message(role="user", content=text)], kind)  # type: ignore[arg-type]
        for i, (text, kind) in enumerate(pair for pair in texts for _ in range(repeat))
    ]


@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_one_permutation_without_its_rest(count: int, size: int, shuffle: bool, seed: int) -> None:
    rows, options = rows_of(count, 0), Data(train_batch_size=size, shuffle=shuffle, seed=seed)
    if size > count:
        with pytest.raises(RecipeError, match=f"only {count} prompts"):
            steps_per_epoch(count, options)
        return
    steps = steps_per_epoch(count, options)
    batches = list(islice(prompt_batches(rows, options), 3 * steps))
    assert all(len(batch) == size for batch in batches)
    for epoch in range(3):
        seen = [row.index for batch in batches[epoch * steps : (epoch + 1) * steps] for row in batch]
        assert len(seen) == len(set(seen)) == steps * size
        if not shuffle:
            assert seen == list(range(steps * size))
    again = list(islice(prompt_batches(rows, options), 3 * steps))
    assert again == batches


def test_epochs_are_shuffled_differently() -> None:
    rows, options = rows_of(30, 0), Data(train_batch_size=30)
    first, second = islice(prompt_batches(rows, options), 2)
    assert [row.index for row in first] != [row.index for row in second]
    other = next(prompt_batches(rows, Data(train_batch_size=30, seed=2)))
    assert [row.index for row in other] != [row.index for row in first]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 10), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_share_of_harmless_prompts_holds_in_every_batch(unsafe: int, benign: int, size: int, share: float) -> None:
    """Both pools are passed through evenly: no prompt is seen twice more often than another of its kind."""
    options = Data(train_batch_size=size, benign_share=share)
    batches = list(islice(prompt_batches(rows_of(unsafe, benign), options), 40))
    wanted = round(size * share)
    for batch in batches:
        assert sum(row.kind == "benign" for row in batch) == wanted
        assert len(batch) == size
    for kind, pool, per_batch in (("benign", benign, wanted), ("unsafe", unsafe, size - wanted)):
        seen = Counter(row.index for batch in batches for row in batch if row.kind == kind)
        if per_batch:
            assert len(seen) == min(pool, 40 * per_batch)
            assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(("unsafe", "benign", "share"), [(4, 0, 0.5), (0, 4, 0.5), (4, 0, 1.0)])
def test_a_share_of_nothing_is_an_error(unsafe: int, benign: int, share: float) -> None:
    with pytest.raises(RecipeError, match="needs both kinds of prompts"):
        next(prompt_batches(rows_of(unsafe, benign), Data(train_batch_size=4, benign_share=share)))


def test_distinct_prompts_keep_the_first_row_of_each() -> None:
    rows = rows_of(3, 2, repeat=3)
    assert [row.index for row in distinct_prompts(rows)] == [0, 3, 6, 9, 12]
    assert select_prompts(rows, Data()) == rows
    chosen = select_prompts(rows, Data(unique_prompts=True, train_max_samples=2))
    assert [row.index for row in chosen] == [0, 3]
    assert len(select_prompts(rows, Data(train_max_samples=4))) == 4
