"""What decoding has computed of every token, kept for the training forward.

On-policy, the update trains on the very tokens that the same weights have just read while they decoded them. What the
layers' products gave then need not be computed again, nor the log-probabilities: the training forward takes them from
here, computes what is cheap (norms, rotation, attention, the narrow products of adapters), and its backward is the same
as ever. So the policy reads each token once per step, and what is trained is exactly what was sampled.

What is kept is most of what layers keep for backward anyway: it is there earlier, from the rollout on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.decoder import KnownLayer
from ups_rm.layers.grid import rounded

LEAST_FILLED = 0.75
"""Room of which less is filled is not held on to: what is in it is copied out."""


@dataclass(frozen=True)
class Drawn:
    """Reply tokens, the log-probability of each at the temperature, and log sum exp(logits / temperature). (B, R)"""

    tokens: Tensor
    logprobs: Tensor
    norms: Tensor
    temperature: float


class KeptForward:
    """Empty at first; `FastDecoder.generate` fills it and `SharedPrefixForward` takes it out, layer by layer.

    Tokens stand in the order in which they were computed: the prompts' distinct ones, then position by position those
    of the replies that went on. Letters: N tokens, b replies that go on, B replies.

    Args:
        sizes: widths of queries, keys and values.
    """

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        self.prompt_ids: list[int] = []
        """Of their distinct tokens."""
        self.rows: list[Tensor] = []
        """Per reply position: the replies whose token there was read, each (b,)."""
        self.drawn: Drawn | None = None
        self.layers: list[tuple[Tensor, ...]] = []
        """Room for queries, keys and values side by side, and for the rest of `KnownLayer`, each (room, ...)."""
        self.room = 0
        """Tokens that there is room for."""
        self.before, self.now = 0, 0
        """Tokens that were read before, and those that are read now."""

    def begin(self, prompt_ids: list[int], most: int) -> None:
        """These tokens are read now, and after them at most so many of replies."""
        self.prompt_ids, self.now, self.room = prompt_ids, len(prompt_ids), rounded(len(prompt_ids) + most)

    def go_on(self, rows: Tensor) -> None:
        """The next token of each of these replies is read now. Shape (b,)."""
        self.rows.append(rows)
        self.before, self.now = self.before + self.now, len(rows)

    def room_now(self, layer: int) -> list[Tensor]:
        """Where a layer's parts of the tokens that are read now belong, each (N, ...): it has had others before."""
        return [room[self.before : self.before + self.now] for room in self.layers[layer]]

    def add(self, layer: int, *parts: Tensor) -> None:
        """Of the tokens that are read now, which are the first rows of each part: qkv (N, S + 2 K, D), then attended,
        gate, up and out of `KnownLayer`."""
        if layer == len(self.layers):
            self.layers.append(tuple(part.new_empty(self.room, part[0].numel()) for part in parts))
        for room, part in zip(self.room_now(layer), parts, strict=True):
            room.copy_(part[: self.now].flatten(1))

    def take(self, layer: int) -> KnownLayer:
        """All tokens of a layer and zeros up to a `rounded` number, which are given out of hand."""
        parts, self.layers[layer] = self.layers[layer], ()
        count = self.before + self.now
        rows = rounded(count)
        for part in parts:
            part[count:rows] = 0
        qkv, attended, gate, up, out = (
            part[:rows] if rows >= LEAST_FILLED * self.room else part[:rows].clone() for part in parts
        )
        q, k, v = qkv.split(self.sizes, dim=1)
        return KnownLayer(q, k, v, attended, gate, up, out)

    def drop(self) -> None:
        """Give everything back: other replies take the place of these."""
        self.layers, self.rows, self.drawn = [], [], None

    def ordered(self, cells: Tensor, prompt_ids: list[int], replies: Tensor) -> Tensor:
        """The cells (N,) of `replies` (B, R) that are read, in the order in which their tokens stand here.

        Raises:
            ValueError: prompts or replies are not those of which this is kept.
        """
        length = replies.shape[1]
        order = torch.cat([cells[:0], *(rows * length + t for t, rows in enumerate(self.rows))])
        drawn = replies if self.drawn is None else F.pad(self.drawn.tokens, (0, length))[:, :length]
        same_cells = prompt_ids == self.prompt_ids and torch.equal(order.sort().values, cells)
        if not same_cells or not torch.equal(replies.flatten()[cells], drawn.flatten()[cells]):
            raise ValueError("these are not the prompts and replies of which a rollout has kept the forward")
        return order

    def logprobs_and_norms(self, keep: Tensor, temperature: float) -> tuple[Tensor, Tensor] | None:
        """Of the reply tokens `keep` (B, R), each (N,); None at another temperature than they were drawn at."""
        if self.drawn is None or self.drawn.temperature != temperature:
            return None
        length = keep.shape[1]
        return self.drawn.logprobs[:, :length][keep], self.drawn.norms[:, :length][keep]
