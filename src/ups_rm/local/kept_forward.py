"""What decoding has computed of every token, kept for the training forward.

On-policy, the update trains on the very tokens that the same weights have just read while they decoded them. What the
layers' products gave then need not be computed again, nor the log-probabilities: the training forward takes them from
here, computes what is cheap (norms, rotation, attention), and its backward is the same as ever. So the policy reads
each token once per step, and what is trained is exactly what was sampled.

It takes no memory of its own at the update: layers keep the same for backward. It is taken earlier, in the rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ups_rm.layers.decoder import KnownLayer

WASTE = 0.75
"""Room that less than this share was needed of is not held on to: what is in it is copied out."""


@dataclass(frozen=True)
class Drawn:
    """Of each reply token: its log-probability at the temperature, and log sum exp(logits / temperature). (B, R)"""

    logprobs: Tensor
    norms: Tensor
    temperature: float


class KeptForward:
    """Empty at first; `FastDecoder.generate` fills it and `SharedPrefixForward` takes it out, layer by layer.

    Tokens stand in the order in which they were computed: the prompts' distinct ones, then position by position those
    of the replies that went on. Letters: N tokens, b replies that go on.

    Args:
        sizes: widths of queries, keys and values.
    """

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        self.rows: list[Tensor] = []
        """Per reply position: the replies whose token there was read, each (b,)."""
        self.layers: list[tuple[Tensor, ...]] = []
        """Room for queries, keys and values side by side, and for the rest of `KnownLayer`, each (room, ...)."""
        self.room = self.filled = self.run = self.of_prompts = 0
        self.drawn: Drawn | None = None

    def begin(self, of_prompts: int, of_replies: int) -> None:
        """So many tokens of prompts are read now, and after them at most so many of replies."""
        self.of_prompts = self.run = of_prompts
        self.room = of_prompts + of_replies

    def go_on(self, rows: Tensor) -> None:
        """The next token of each of these replies is read now. Shape (b,)."""
        self.rows.append(rows)
        self.filled, self.run = self.filled + self.run, len(rows)

    def add(self, layer: int, *parts: Tensor) -> None:
        """Of the tokens that are read now: qkv (N, S + 2 K, D), then attended, gate, up and out of `KnownLayer`."""
        if layer == len(self.layers):
            self.layers.append(tuple(part.new_empty(self.room, part[0].numel()) for part in parts))
        for room, part in zip(self.layers[layer], parts, strict=True):
            room[self.filled : self.filled + self.run] = part.flatten(1)

    def take(self, layer: int) -> KnownLayer:
        """All tokens of a layer, which are given out of hand."""
        parts, self.layers[layer] = self.layers[layer], ()
        count = self.filled + self.run
        qkv, attended, gate, up, out = (
            part[:count] if count >= WASTE * self.room else part[:count].clone() for part in parts
        )
        q, k, v = qkv.split(self.sizes, dim=1)
        return KnownLayer(q, k, v, attended, gate, up, out)

    def at(self, keep: Tensor, temperature: float) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities and norms of the reply tokens `keep` (B, R), each (N,); None at another temperature."""
        if self.drawn is None or self.drawn.temperature != temperature:
            return None
        length = keep.shape[1]
        return self.drawn.logprobs[:, :length][keep], self.drawn.norms[:, :length][keep]

    def ordered(self, cells: Tensor, of_prompts: int, length: int) -> Tensor:
        """The cells (N,) of the replies' tokens among (B, length), in the order in which they stand here.

        Raises:
            ValueError: these are other replies, or prompts of another number of tokens, than what is kept.
        """
        order = torch.cat([cells[:0], *(rows * length + t for t, rows in enumerate(self.rows))])
        if of_prompts != self.of_prompts or not torch.equal(order.sort().values, cells):
            raise ValueError(
                f"{of_prompts} tokens of prompts and {len(cells)} of replies are not the {self.of_prompts} and "
                f"{len(order)} that the rollout has kept"
            )
        return order
