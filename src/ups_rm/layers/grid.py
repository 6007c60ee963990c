"""Real tokens side by side, and the padded rows that attention sees them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TOKENS_BY, COLUMNS_BY = 32, 16


def rounded(count: int, by: int = TOKENS_BY) -> int:
    """Up to the next of few sizes: oneDNN makes a kernel for each size of a product and keeps it for good, in the
    middle of the memory that tensors come and go in; what is filled up costs less than making it."""
    return count + -count % by


class Grid:
    """C cells of padded rows, N tokens that stand in them: linear layers run over the N, attention over the C.

    Args:
        cells: a cell of each token. Shape (N,).
        count: of cells, C.
        again: further cells, and the token that stands there too. Shapes (E,) and (E,).
        rows: N' that linear layers run over, the tokens and what fills up; N if not given.
    """

    def __init__(self, cells: Tensor, count: int, again: tuple[Tensor, Tensor], rows: int | None = None) -> None:
        self.cells, (self.more_cells, self.more_tokens) = cells, again
        self.rows = len(cells) if rows is None else rows
        self.tokens = torch.zeros(count, dtype=torch.long, device=cells.device)  # (C,): of each cell, at padding any
        self.tokens[cells] = torch.arange(len(cells), device=cells.device)
        self.tokens[self.more_cells] = self.more_tokens

    @cached_property
    def often(self) -> tuple[Tensor, Tensor]:
        """The tokens that stand in several cells, and which of them each of `more_cells` holds."""
        return self.more_tokens.unique(return_inverse=True)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Each token's number out of x (C,), and the first one's again in the rows that fill up. (N',)"""
        out = x[self.cells]
        return torch.cat([out, out[:1].expand(self.rows - len(out))])

    def pad(self, x: Tensor) -> Tensor:
        """(N', ...) -> (C, ...), 0 at padding: not another token, which may be NaN and would get through masks."""
        out: Tensor = Pad.apply(x, self)
        return out

    def pack(self, x: Tensor) -> Tensor:
        """(C, ...) -> (N', ...), 0 in the rows that fill up"""
        out: Tensor = Pack.apply(x, self)
        return out


@dataclass(frozen=True)
class Distinct:
    """Rows of tokens, of which those that follow on the same tokens count as one.

    Attributes:
        tokens: of each row, the numbers of its tokens, which count from 0 in the order of the rows.
        ids: of each distinct token.
    """

    tokens: list[list[int]]
    ids: list[int]

    @classmethod
    def of(cls, rows: list[list[int]]) -> Distinct:
        numbers: dict[tuple[int, int], int] = {}  # of a token after another
        tokens: list[list[int]] = []
        for row in rows:
            tokens.append([])
            before = -1
            for token in row:
                before = numbers.setdefault((before, token), len(numbers))
                tokens[-1].append(before)
        return cls(tokens, [token for _, token in numbers])

    def cells(self, starts: list[int], device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What `Grid` takes, where row i begins in cell starts[i]."""
        rows = zip(starts, self.tokens, strict=True)
        return cells_of([pair for start, row in rows for pair in enumerate(row, start)], device)


def cells_of(pairs: list[tuple[int, int]], device: str | torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `Grid` takes, of pairs of a cell and the token that stands in it."""
    first: dict[int, int] = {}
    more: list[tuple[int, int]] = []
    for cell, token in pairs:
        if token in first:
            more.append((cell, token))
        else:
            first[token] = cell
    again = torch.tensor(more, dtype=torch.long, device=device).view(-1, 2)
    cells = torch.tensor([first[token] for token in range(len(first))], dtype=torch.long, device=device)
    return cells, (again[:, 0], again[:, 1])


class Pad(torch.autograd.Function):
    """A copy of rows and back: autograd's own gradient of an index adds up one row after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        out = x.new_zeros(len(grid.tokens), *x.shape[1:]).index_copy_(0, grid.cells, x[: len(grid.cells)])
        if len(grid.more_cells) > 0:
            out.index_copy_(0, grid.more_cells, x.index_select(0, grid.more_tokens))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grid = ctx.grid
        out = _selected(grad, grid)
        if len(grid.more_cells) > 0:  # sums in fp32 or wider
            shared, place = grid.often
            sums = out.index_select(0, shared).to(torch.promote_types(grad.dtype, torch.float32))
            sums.index_add_(0, place, grad.index_select(0, grid.more_cells).to(sums.dtype))
            out.index_copy_(0, shared, sums.to(grad.dtype))
        return out, None


class Pack(torch.autograd.Function):
    """The way back; the gradient at padding is 0, and where a token stands again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return _selected(x, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grid = ctx.grid
        out = grad.new_zeros(len(grid.tokens), *grad.shape[1:])
        return out.index_copy_(0, grid.cells, grad[: len(grid.cells)]), None


def _selected(x: Tensor, grid: Grid) -> Tensor:
    """x (C, ...) at each token's cell, and zeros. (N', ...)"""
    out = x.new_empty(grid.rows, *x.shape[1:])
    torch.index_select(x, 0, grid.cells, out=out[: len(grid.cells)])
    out[len(grid.cells) :] = 0
    return out
