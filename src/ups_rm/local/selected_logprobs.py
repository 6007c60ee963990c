"""The log-probability of one token per row out of hidden states, without keeping logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.grid import TOKENS_BY, rounded
from ups_rm.layers.linear import product
from ups_rm.layers.native import usable

LOGITS_AT_ONCE = 2**24
"""Numbers in one chunk of logits, 32 MiB in bf16: larger ones gain nothing."""
ROWS_IN_FP32 = 32
"""Rows of it that are widened to fp32 at a time: they stay in the CPU's cache and in memory that malloc reuses."""


def rows_at_once(vocab_size: int) -> int:
    """Rows in one chunk of logits."""
    return max(TOKENS_BY, LOGITS_AT_ONCE // vocab_size // TOKENS_BY * TOKENS_BY)


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the target, `chunk` rows of logits at a time.

    d logp_t / d logits = onehot(t) - softmax, so with g = d loss / d logp:
    dh = g (W_t - softmax W) / temperature, dW = g (onehot - softmax)^T h / temperature.
    Backward takes all rows of as many tokens of the vocabulary as make the same number of logits: the softmax's norms
    are known by then, and each token's dW is one product over all rows, with nothing of the weight's size to add up.
    Of a frozen weight no logits are made again: forward keeps d logp / d h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden (N, H), weight (V, H), targets (N,) -> logprobs (N,), fp32 or wider. `known`: logprobs and norms, see
        `selected`, which are not computed then."""
        ctx.frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        ctx.temperature, ctx.chunk, ctx.count = temperature, chunk, len(hidden)
        further = rounded(len(hidden)) - len(hidden)  # rows of zeros: their logits are 0, and so is what flows back
        hidden, targets = F.pad(hidden, (0, 0, 0, further)), F.pad(targets, (0, further))
        if known is not None:
            logprobs, norms = (F.pad(part, (0, further)) for part in known)
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            logprobs, norms = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        if known is not None and not ctx.frozen:
            ctx.save_for_backward(hidden, weight, targets, norms)
            return logprobs[: ctx.count]
        d_logprobs = torch.empty_like(hidden) if ctx.frozen else None
        ones = torch.full_like(logprobs, 1 / temperature)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = product(hidden[rows], weight)
            if known is None:
                logprobs[rows], norms[rows] = selected(logits, targets[rows], temperature)
            if d_logprobs is not None:
                to_gradient(logits, targets[rows], norms[rows], ones[rows], temperature)
                d_logprobs[rows] = logits @ weight
        if d_logprobs is None:
            ctx.save_for_backward(hidden, weight, targets, norms)
        else:
            ctx.save_for_backward(d_logprobs[: ctx.count])
        return logprobs[: ctx.count]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        if ctx.frozen:
            (d_logprobs,) = ctx.saved_tensors
            return (d_logprobs * grad[:, None]).to(d_logprobs.dtype), None, None, None, None, None
        hidden, weight, targets, norms = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=norms.dtype)
        d_weight = torch.empty_like(weight)
        slopes = F.pad(grad.to(norms.dtype) / ctx.temperature, (0, len(hidden) - ctx.count))  # (N,)
        parts = -(-len(hidden) // ctx.chunk)  # as many as forward took
        columns = -(-len(weight) // max(1, parts))
        for first in range(0, len(weight), columns):
            block = weight[first : first + columns]  # (C, H)
            logits = product(hidden, block)  # (N, C)
            to_gradient(logits, targets, norms, slopes, ctx.temperature, first)
            d_hidden += logits @ block
            torch.mm(logits.t(), hidden, out=d_weight[first : first + columns])
        return d_hidden[: ctx.count].to(hidden.dtype), d_weight, None, None, None, None


def selected(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N,) -> (logprobs (N,), log sum exp(logits / temperature) (N,)), fp32 or wider."""
    kernels = usable(logits)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.selected_logprobs(logits, targets, temperature)
        return found
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs, norms = (torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(2))
    for start in range(0, len(logits), ROWS_IN_FP32):
        few = slice(start, start + ROWS_IN_FP32)
        part = logits[few].to(wide) / temperature
        chosen = part.gather(1, targets[few, None]).squeeze(1)
        logprobs[few] = part.log_softmax(dim=-1).gather(1, targets[few, None]).squeeze(1)
        norms[few] = chosen - logprobs[few]
    return logprobs, norms


def to_gradient(
    logits: Tensor, targets: Tensor, norms: Tensor, slopes: Tensor, temperature: float, first: int = 0
) -> None:
    """In place, logits (N, C) of the tokens from `first` on become slope (onehot(target) - softmax), with slopes (N,)
    and the norms of `selected`."""
    kernels = usable(logits)
    if kernels is not None:
        kernels.logits_to_gradient(logits, targets, norms, slopes, temperature, first)
        return
    at = (targets - first)[:, None]
    ones = slopes[:, None] * ((at >= 0) & (at < logits.shape[1]))  # other targets have their 1 in other columns
    at = at.clamp(0, logits.shape[1] - 1)
    for start in range(0, len(logits), ROWS_IN_FP32):
        few = slice(start, start + ROWS_IN_FP32)
        part = logits[few].to(norms.dtype, copy=True).div_(temperature)
        part.sub_(norms[few, None]).exp_().mul_(-slopes[few, None])
        logits[few] = part.scatter_add_(1, at[few], ones[few])
