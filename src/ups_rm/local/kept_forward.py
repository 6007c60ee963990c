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

    Tokens stand in the order in which they were computed: the prompts', then position by position those of the replies
    that went on. Letters: N tokens, P prompts, b replies that go on.

    Args:
        sizes: widths of queries, keys and values.
    """

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        self.prompts: list[int] = []
        """Their lengths."""
        self.rows: list[Tensor] = []
        """Per reply position: the replies whose token there was read, each (b,)."""
        self.layers: list[tuple[Tensor, ...]] = []
        """Room for queries, keys and values side by side, and for the rest of `KnownLayer`, each (room, ...)."""
        self.room = self.filled = self.run = 0
        self.drawn: Drawn | None = None

    def begin(self, prompts: list[int], reply_tokens: int) -> None:
        """Prompts of these lengths are read now, and after them at most so many tokens of replies."""
        self.prompts, self.room, self.run = prompts, sum(prompts) + reply_tokens, sum(prompts)

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

    def cells(self, width: int, length: int) -> Tensor:
        """Where each token stands in the cells of left-padded prompts (P, width) and, behind them, replies
        (B, length). Shape (N,)."""
        prompts = [range((p + 1) * width - size, (p + 1) * width) for p, size in enumerate(self.prompts)]
        first, device = len(self.prompts) * width, self.layers[0][0].device
        of_prompts = torch.tensor([cell for prompt in prompts for cell in prompt], device=device)
        return torch.cat([of_prompts, *(first + rows * length + t for t, rows in enumerate(self.rows))])
