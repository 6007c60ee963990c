"""Real tokens side by side, and the padded rows that attention sees them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Grid:
    """C cells of padded rows, N of which hold a token: linear layers run over the N, attention over the C.

    Args:
        cells: the cell of each token, those of all tokens distinct. Shape (N,).
        count: of cells, C.
    """

    def __init__(self, cells: Tensor, count: int) -> None:
        self.cells = cells
        self.tokens = torch.zeros(count, dtype=torch.long, device=cells.device)  # (C,): of each cell, at padding any
        self.tokens[cells] = torch.arange(len(cells), device=cells.device)
        self.full = False

    @classmethod
    def of(cls, real: Tensor, order: Tensor | None = None) -> Grid:
        """The cells that are `real`, in any shape of C cells, one after the other or in the `order` given (N,).

        Raises:
            ValueError: `order` does not hold those cells.
        """
        cells = real.flatten().nonzero().squeeze(1)
        if order is None:
            grid = cls(cells, real.numel())
            grid.full = len(cells) == real.numel()
            return grid
        if not torch.equal(order.sort().values, cells):
            raise ValueError(f"the {len(order)} cells of `order` are not the {len(cells)} that hold a token")
        return cls(order, real.numel())

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (C, ...), 0 at padding: not a neighbour's token, which may be NaN and would get through masks."""
        if self.full:
            return x
        out: Tensor = Pad.apply(x, self.cells, len(self.tokens))
        return out

    def pack(self, x: Tensor) -> Tensor:
        """(C, ...) -> (N, ...)"""
        if self.full:
            return x
        out: Tensor = Pack.apply(x, self.cells)
        return out


class Pad(torch.autograd.Function):
    """A copy of rows and back: autograd's own gradient of an index adds up one row after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(cells)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, cells, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return grad.index_select(0, cells), None, None


class Pack(torch.autograd.Function):
    """The way back; the gradient at padding is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.count = len(x)
        return x.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, cells, grad), None
