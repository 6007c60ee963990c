"""How a token is drawn from the policy's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.native import usable

CHUNK = 256
"""Tokens whose probabilities are summed before the one chunk that holds the draw is searched."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 is greedy; top_k -1 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0

    def uniforms(self, rows: int, length: int) -> Tensor:
        """Uniform draws in [0, 1), one per row and position, from the seed alone. Shape (rows, length)."""
        return torch.rand(rows, length, generator=torch.Generator().manual_seed(self.seed))


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row, its log-probability under the tempered, untruncated distribution, and that distribution's
    norm, log sum exp(logits / temperature). Each (b,).

    Args:
        logits: (b, V); may be changed in place.
        uniform: (b,) in [0, 1).
    """
    truncated = 0 < sampling.top_k < logits.shape[1] or sampling.top_p < 1
    native = usable(logits) if sampling.temperature > 0 and not truncated else None
    if native is not None:
        token, logprob, norm = native.draw(logits.contiguous(), uniform.contiguous(), sampling.temperature)
        return token, logprob, norm
    logits = logits.float()
    if sampling.temperature == 0:
        token, norm = logits.argmax(dim=-1), logits.logsumexp(dim=-1)
        return token, logits.gather(1, token[:, None]).squeeze(1) - norm, norm
    if sampling.temperature != 1:
        logits /= sampling.temperature
    greatest = logits.amax(dim=-1, keepdim=True)
    if not truncated:
        weights = (logits - greatest).exp_()  # (b, V): exp once, for the draw and for the log-probability
        token, total = invert_cdf(weights, uniform)
        below = (logits.gather(1, token[:, None]) - greatest).squeeze(1)
        return token, below - total.log(), greatest.squeeze(1) + total.log()
    norm = logits.logsumexp(dim=-1)
    kept = logits
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = kept.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= sampling.top_p  # the token that crosses top_p stays
        kept = torch.full_like(kept, float("-inf")).scatter_(1, order, ordered.masked_fill(outside, float("-inf")))
    token, _ = invert_cdf((kept - greatest).exp_(), uniform)
    return token, logits.gather(1, token[:, None]).squeeze(1) - norm, norm


def invert_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds `uniform` times the total, and the total.

    Sums of whole chunks are searched first: a running sum over the vocabulary would be most of a draw's time.

    Args:
        weights: (b, V) fp32, not negative.
        uniform: (b,) in [0, 1).

    Returns:
        token (b,), a token of weight 0 never; total (b,) fp32.
    """
    size = weights.shape[1]
    whole = size - size % CHUNK
    sums = weights[:, :whole].unflatten(1, (-1, CHUNK)).sum(dim=-1)  # (b, C)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    upto = sums.cumsum(dim=-1)
    total = upto[:, -1]
    target = uniform * total
    # rounding may carry a target to the total itself: the last chunk (token) of positive weight then holds it
    chunk = torch.searchsorted(upto, target[:, None], right=True).minimum(_last(sums))  # (b, 1)
    before = F.pad(upto, (1, 0)).gather(1, chunk)  # not above the target: no token before the chunk's first can hold it
    tokens = chunk * CHUNK + torch.arange(CHUNK, device=weights.device)  # (b, CHUNK)
    inside = weights.gather(1, tokens.clamp(max=size - 1)).masked_fill_(tokens >= size, 0.0)
    within = torch.searchsorted(inside.cumsum(dim=-1) + before, target[:, None], right=True).minimum(_last(inside))
    return (chunk * CHUNK + within).squeeze(1), total


def _last(weights: Tensor) -> Tensor:
    """The last column of positive weight. Shape (b, 1)."""
    columns = torch.arange(weights.shape[1], device=weights.device)
    return torch.where(weights > 0, columns, 0).amax(dim=-1, keepdim=True)
