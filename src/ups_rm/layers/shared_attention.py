"""Attention where replies share a prompt: prompts among themselves, replies over their prompt and their own tokens.

Letters: G prompts in T columns, b replies of a block in R, N' rows of the linear layers, S heads, K key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ups_rm.layers.decoder import DecoderLayers
from ups_rm.layers.grid import Grid


@dataclass(frozen=True)
class Replies:
    """A block of replies in padded rows.

    Attributes:
        read: the real tokens, padded on the right. Shape (b, R).
        group: the prompt of each. Shape (b,); None for texts that follow on no prompt.
    """

    read: Tensor
    group: Tensor | None


class SharedAttention:
    """What `DecoderLayers` takes as `attend`.

    Args:
        grid: its cells are those of the prompts, then of the replies, block by block.
        seen: the real tokens of prompts, padded on either side. Shape (G, T).
        dtype: of the masks.
    """

    def __init__(
        self, layers: DecoderLayers, grid: Grid, seen: Tensor, blocks: Sequence[Replies], dtype: torch.dtype
    ) -> None:
        self.layers, self.grid, self.prompts = layers, grid, seen.shape
        self.replies = [(block.read.shape, block.group) for block in blocks if block.read.numel() > 0]
        # a padded query sees itself, so that no row of the softmax is empty
        itself = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
        self.prompt_mask = layers.additive((_causal(seen.shape[1], seen.device) & seen[:, None]) | itself, dtype)
        self.masks = []
        for (rows, length), group in self.replies:
            sees = _causal(length, seen.device).expand(rows, -1, -1)
            if group is not None:
                sees = torch.cat([seen[group, None].expand(-1, length, -1), sees], dim=-1)  # (b, R, T + R)
            self.masks.append(layers.additive(sees, dtype))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N', S, D), k and v (N', K, D) -> (N', S * D)"""
        (prompt_q, *own_q), (prompt_k, *own_k), (prompt_v, *own_v) = map(self._parts, (q, k, v))
        out = []
        if self.prompts.numel() > 0:
            out.append(self.layers.attention(prompt_q, prompt_k, prompt_v, self.prompt_mask).flatten(0, 1))
        for (_, group), mask, q, k, v in zip(self.replies, self.masks, own_q, own_k, own_v, strict=True):
            if group is not None:
                k = torch.cat([prompt_k.index_select(0, group), k], dim=1)  # (b, T + R, K, D)
                v = torch.cat([prompt_v.index_select(0, group), v], dim=1)
            out.append(self.layers.attention(q, k, v, mask).flatten(0, 1))
        return self.grid.pack(torch.cat(out) if len(out) > 1 else out[0])

    def _parts(self, y: Tensor) -> list[Tensor]:
        """(N', heads, D) -> (G, T, heads, D) and a (b, R, heads, D) for each block."""
        shapes = [self.prompts, *(shape for shape, _ in self.replies)]
        parts = self.grid.pad(y).split([shape.numel() for shape in shapes])
        return [part.view(*shape, *y.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
