"""Keys and values of a rollout: a prompt's once for all its replies, each reply's own beside it.

Letters: P groups, m columns (replies per group), K key/value heads, g query heads per key head, D head size, T prompt
tokens, R reply tokens at most, b live rows, L layers.

Rows stand in the cells of a grid of P x m, so that the replies of a group are further query rows of one product with
the prompt's keys: the prompt is read once per group, not once per reply. A row that has ended leaves its cell empty;
when a quarter of the grid could be saved, the grid is made anew without empty groups and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.elementwise import rotate
from ups_rm.layers.native import BLOCK

SHRINK_AT = 0.75
"""The grid is made anew when the new one has at most this share of its cells."""


class GroupCache:
    """See the module.

    On CPUs attention is computed in fp32: its products are too small for bf16 to pay.

    Args:
        keys, values: of the prompts, right-padded. Shape (L, P, K, T, D).
        lengths: of the prompts. Shape (P,).
        columns: replies per group.
        reply_length: most tokens of a reply, R.
        heads: query heads, K * g.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, lengths: Tensor, *, columns: int, reply_length: int, heads: int
    ) -> None:
        layers, groups, kv_heads, _, size = keys.shape
        self.dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
        self.prompt_keys, self.prompt_values = keys.to(self.dtype), values.to(self.dtype)
        shape = (layers, groups, kv_heads, columns, reply_length, size)
        self.keys = torch.zeros(shape, dtype=self.dtype, device=keys.device)
        self.values = torch.zeros_like(self.keys)
        self.heads, self.columns, self.scale = heads, columns, size**-0.5
        self.lengths = lengths
        self._hidden: Tensor | None = None
        self.cells = torch.arange(groups * columns, device=keys.device)
        """The cell of each live row, group * m + column. Shape (b,)."""

    @property
    def groups(self) -> int:
        return self.keys.shape[1]

    def attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, position: int | Tensor) -> Tensor:
        """Write the rows' keys and values at reply position `position` and attend to all up to it.

        Args:
            qkv: queries, keys and values of one token per live row, not rotated yet. Shape (b, K * g + 2 * K, D).
            cos, sin: of the rows' positions. Shape (b, 1, D).

        Returns:
            Shape (b, K * g * D), in qkv's dtype.
        """
        groups, columns, size = self.groups, self.columns, qkv.shape[-1]
        kv_heads = self.keys.shape[2]
        qkv = rotated(qkv, cos, sin, self.heads + kv_heads)
        if len(qkv) < groups * columns:
            grid = qkv.new_zeros(groups * columns, *qkv.shape[1:]).index_copy_(0, self.cells, qkv)
        else:
            grid = qkv
        q, k, v = grid.view(groups, columns, -1, size).transpose(1, 2).split([self.heads, kv_heads, kv_heads], dim=1)
        self._write(layer, k, v, position)
        # (P, K, m, g, D): a group's queries side by side for the prompt, a row's for its own reply
        q = packed(q.unflatten(1, (kv_heads, -1)).transpose(2, 3), self.dtype)
        as_group, as_row = q.view(groups * kv_heads, -1, size), q.view(groups * kv_heads * columns, -1, size)
        keys, values = (part[layer].flatten(0, 1) for part in (self.prompt_keys, self.prompt_values))  # (P K, T, D)
        own_keys, own_values = (part.flatten(0, 2) for part in self._own(layer, position))  # (P K m, seen, D)
        prompt = torch.baddbmm(self._padding(), as_group, keys.transpose(1, 2), alpha=self.scale)  # (P K, m g, T)
        own = self._hide(torch.bmm(as_row, own_keys.transpose(1, 2)).mul_(self.scale), position)  # (P K m, g, seen)
        probs = torch.cat([prompt, own.view(*prompt.shape[:2], -1)], dim=-1).softmax(dim=-1)
        width = prompt.shape[-1]
        out = torch.bmm(probs[..., :width], values)  # (P K, m g, D)
        out = torch.baddbmm(out.view(*as_row.shape), probs[..., width:].reshape(*own.shape), own_values)
        out = out.view(groups, kv_heads, columns, -1, size).transpose(1, 2)
        out = packed(out, qkv.dtype).view(groups * columns, -1)
        return out if grid is qkv else out[self.cells]

    def _write(self, layer: int, k: Tensor, v: Tensor, position: int | Tensor) -> None:
        """k, v (P, K, m, D)"""
        self.keys[layer, :, :, :, position], self.values[layer, :, :, :, position] = k, v

    def _own(self, layer: int, position: int | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the replies, each (P, K, m, seen, D)."""
        return self.keys[layer, :, :, :, : position + 1], self.values[layer, :, :, :, : position + 1]

    def _hide(self, scores: Tensor, position: int | Tensor) -> Tensor:
        """Scores (..., seen) of what `_own` gave, without those of positions that are not written yet."""
        return scores

    def _padding(self) -> Tensor:
        """0 at prompt tokens, the least number at their padding. Shape (P K, 1, T)."""
        if self._hidden is None or len(self._hidden) != self.groups * self.keys.shape[2]:
            width = self.prompt_keys.shape[3]
            padded = torch.arange(width, device=self.lengths.device) >= self.lengths[:, None]  # (P, T)
            hidden = torch.zeros(padded.shape, dtype=self.dtype, device=padded.device)
            hidden = hidden.masked_fill_(padded, torch.finfo(self.dtype).min)
            self._hidden = hidden.repeat_interleave(self.keys.shape[2], 0)[:, None]
        return self._hidden

    def keep(self, alive: Tensor) -> None:
        """Drop the rows that have ended. `alive`: bool (b,)."""
        self.cells = self.cells[alive]
        group = self.cells // self.columns
        counts = torch.bincount(group, minlength=self.groups)
        live, columns = counts.nonzero().squeeze(1), int(counts.max())
        if len(live) * columns > SHRINK_AT * self.groups * self.columns:
            return
        counts = counts[live]
        first = counts.cumsum(0) - counts  # of each group, among the rows
        rank = torch.arange(len(self.cells), device=group.device) - first.repeat_interleave(counts)
        new_group = torch.arange(len(live), device=group.device).repeat_interleave(counts)
        source = torch.zeros(len(live), columns, dtype=torch.long, device=group.device)  # an empty cell copies any
        source[new_group, rank] = self.cells % self.columns
        self.prompt_keys, self.prompt_values = self.prompt_keys[:, live], self.prompt_values[:, live]
        # (L, P, K, m, R, D): the indexed dimensions come out first
        self.keys, self.values = (
            part[:, live[:, None], :, source].permute(2, 0, 3, 1, 4, 5).contiguous()
            for part in (self.keys, self.values)
        )
        self.lengths, self.columns = self.lengths[live], columns
        self.cells = new_group * columns + rank


class StaticCache(GroupCache):
    """The same with shapes that do not change from step to step, as a CUDA graph needs it.

    `position` is a tensor (1,) on the device; every row of the grid is given, live or not.
    """

    def _write(self, layer: int, k: Tensor, v: Tensor, position: int | Tensor) -> None:
        for kept, new in ((self.keys, k), (self.values, v)):
            kept[layer].index_copy_(3, torch.as_tensor(position, device=k.device), new.unsqueeze(3))

    def _own(self, layer: int, position: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def _hide(self, scores: Tensor, position: int | Tensor) -> Tensor:
        later = torch.arange(scores.shape[-1], device=scores.device) > position
        return scores.masked_fill_(later, torch.finfo(scores.dtype).min)


class NativeCache(GroupCache):
    """The same in the model's dtype, for the kernel in C++: keys stand there with a position as a column.

    Args:
        kernels: what `native.kernels()` gave. The others: as for `GroupCache`.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        *,
        columns: int,
        reply_length: int,
        heads: int,
        kernels: Any,
    ) -> None:
        layers, groups, kv_heads, width, size = keys.shape
        self.kernels, self.heads, self.columns, self.lengths = kernels, heads, columns, lengths
        self.prompt_keys = F.pad(keys.transpose(-1, -2), (0, -width % BLOCK)).contiguous()
        self.prompt_values = values
        shape = (layers, groups, kv_heads, columns)
        self.keys = keys.new_zeros(*shape, size, reply_length + -reply_length % BLOCK)
        self.values = keys.new_zeros(*shape, reply_length, size)
        self.cells = torch.arange(groups * columns, device=keys.device)

    def attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, position: int | Tensor) -> Tensor:
        out: Tensor = self.kernels.attend(qkv, cos, sin, *self._held(layer), self.cells, self.lengths, position)
        return out

    def decode_layer(
        self, layer: int, weights: Any, x: Tensor, cos: Tensor, sin: Tensor, position: int | Tensor, kept: list[Tensor]
    ) -> Tensor:
        """All of a layer, x (b, H) -> (b, H); `kept`: room for its parts, as `KeptForward.room_now` gives it."""
        out: Tensor = self.kernels.decode_layer(
            x, weights, cos, sin, self._held(layer), self.cells, self.lengths, position, kept
        )
        return out

    def _held(self, layer: int) -> list[Tensor]:
        return [part[layer] for part in (self.prompt_keys, self.prompt_values, self.keys, self.values)]


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """`rotate` on the first `heads` of (N, heads + K, D)."""
    return torch.cat([rotate(qkv[:, :heads], cos, sin), qkv[:, heads:]], dim=1)


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in the dtype, in one pass."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)
