"""Tokens side by side: which are one, where they stand, and that no gradient is lost or counted twice."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.layers.grid import Distinct, Grid, rounded

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


@given(ROWS)
def test_tokens_are_one_where_all_up_to_them_are_equal(rows: list[list[int]]) -> None:
    distinct = Distinct.of(rows)
    prefixes = [[tuple(row[: j + 1]) for j in range(len(row))] for row in rows]
    found: dict[tuple[int, ...], int] = {}
    for row, tokens in zip(prefixes, distinct.tokens, strict=True):
        for prefix, token in zip(row, tokens, strict=True):
            assert found.setdefault(prefix, token) == token
            assert distinct.ids[token] == prefix[-1]
    assert sorted(found.values()) == list(range(len(distinct.ids)))


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 3))
def test_cells_show_their_token_and_give_their_gradient_to_it(rows: list[list[int]], padding: int) -> None:
    """Against an index into the tokens, cell by cell."""
    width = max(map(len, rows)) + padding
    starts = [i * width for i in range(len(rows))]
    distinct = Distinct.of(rows)
    cells, again = distinct.cells(starts, torch.device("cpu"))
    grid = Grid(cells, len(rows) * width, again)
    x = torch.randn(len(distinct.ids), 2, dtype=torch.double, requires_grad=True)
    padded = grid.pad(x)
    expected = torch.zeros(len(rows) * width, 2, dtype=torch.double)
    for start, tokens in zip(starts, distinct.tokens, strict=True):
        assert grid.tokens[start : start + len(tokens)].tolist() == tokens
        expected[start : start + len(tokens)] = x.detach()[tokens]
    assert torch.equal(padded, expected)
    assert torch.equal(grid.pack(padded), x)
    assert torch.autograd.gradcheck(grid.pad, x)
    assert torch.autograd.gradcheck(grid.pack, padded.detach().requires_grad_())


def test_gradients_of_a_token_that_stands_often_add_up_in_fp32() -> None:
    """513 summands of 1: one after the other in bf16 they would end at 256."""
    grid = Grid(torch.tensor([0]), 513, (torch.arange(1, 513), torch.zeros(512, dtype=torch.long)))
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    grid.pad(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad) == float(torch.tensor(513.0).bfloat16()) != 256


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 3), st.integers(0, 5))
def test_rows_that_fill_up_are_zeros_and_take_no_gradient(rows: list[list[int]], padding: int, more: int) -> None:
    """As many linear rows as asked for; whatever stands in the further ones is seen by nobody."""
    width = max(map(len, rows)) + padding
    distinct = Distinct.of(rows)
    cells, again = distinct.cells([i * width for i in range(len(rows))], torch.device("cpu"))
    plain = Grid(cells, len(rows) * width, again)
    grid = Grid(cells, len(rows) * width, again, len(cells) + more)
    x = torch.randn(len(cells), 2, dtype=torch.double)
    filled = torch.cat([x, torch.full((more, 2), torch.nan, dtype=torch.double)]).requires_grad_()
    padded = grid.pad(filled)
    assert torch.equal(padded, plain.pad(x))
    assert torch.equal(grid.pack(padded), torch.cat([x, torch.zeros(more, 2, dtype=torch.double)]))
    (grad,) = torch.autograd.grad(grid.pad(filled).sum(), filled)
    assert torch.equal(grad[len(cells) :], torch.zeros(more, 2, dtype=torch.double))
    assert torch.autograd.gradcheck(grid.pack, padded.detach().requires_grad_())


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_rounded_is_the_next_multiple(count: int, by: int) -> None:
    assert rounded(count, by) % by == 0
    assert count <= rounded(count, by) < count + by
