"""The log-probability of one token per row out of hidden states, without keeping logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ups_rm.layers.linear import product
from ups_rm.layers.native import usable

LOGITS_AT_ONCE = 2**24
"""Numbers in one chunk of logits, 32 MiB in bf16: larger ones gain nothing."""
ROWS_IN_FP32 = 32
"""Rows of it that are widened to fp32 at a time: they stay in the CPU's cache and in memory that malloc reuses."""
WEIGHT_ROWS_AT_ONCE = 1024
"""Rows of the weight's gradient that are added up at a time, for the same reason: `+=` widens its right side whole."""


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the target, chunk by chunk.

    d logp_t / d logits = onehot(t) - softmax, so with g = d loss / d logp:
    dh = g (W_t - softmax W) / temperature, dW = g (onehot - softmax)^T h / temperature.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> Tensor:
        """hidden (N, H), weight (V, H), targets (N,) -> logprobs (N,), fp32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        logprobs, norms = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logprobs[rows], norms[rows] = selected(product(hidden[rows], weight), targets[rows], temperature)
        ctx.save_for_backward(hidden, weight, targets, norms)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, norms = ctx.saved_tensors
        d_hidden, wide = torch.empty_like(hidden), norms.dtype
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        increment = torch.empty_like(weight) if d_weight is not None else None
        slopes = grad.to(wide) / ctx.temperature  # (N,)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = product(hidden[rows], weight)
            to_gradient(logits, targets[rows], norms[rows], slopes[rows], ctx.temperature)
            d_hidden[rows] = logits @ weight
            if d_weight is not None and increment is not None:
                torch.mm(logits.t(), hidden[rows], out=increment)
                for total, part in zip(
                    d_weight.split(WEIGHT_ROWS_AT_ONCE), increment.split(WEIGHT_ROWS_AT_ONCE), strict=True
                ):
                    total += part
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


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


def to_gradient(logits: Tensor, targets: Tensor, norms: Tensor, slopes: Tensor, temperature: float) -> None:
    """In place, logits (N, V) become slope (onehot(target) - softmax), with slopes (N,) and the norms of `selected`."""
    kernels = usable(logits)
    if kernels is not None:
        kernels.logits_to_gradient(logits, targets, norms, slopes, temperature)
        return
    for start in range(0, len(logits), ROWS_IN_FP32):
        few = slice(start, start + ROWS_IN_FP32)
        part = logits[few].to(norms.dtype, copy=True).div_(temperature)
        part.sub_(norms[few, None]).exp_().mul_(-slopes[few, None])
        logits[few] = part.scatter_add_(1, targets[few, None], slopes[few, None])
