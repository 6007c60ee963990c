"""Products with a weight, in fp32 on CPUs by oneDNN.

torch asks MKL for them, which on the CPUs of other makers than its own is slower: of SmolLM2-135M's layers by a seventh
on two Zen 3 cores, of its head by a third. In other formats torch asks oneDNN itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, layer: Any) -> Tensor:
    """layer(x), x (N, I) -> (N, O)"""
    if not is_plain(layer) or not by_onednn(x, layer.weight):
        out: Tensor = layer(x)
    else:
        out = Linear.apply(x, layer.weight, layer.bias)
    return out


def is_plain(layer: Any) -> bool:
    """A linear layer whose weight and bias say all that it does: no adapters, no hooks."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is torch.nn.Linear and not hooked


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, x (N, I) and weight (O, I) -> (N, O). Under autograd: of its own, as part of a `Function`."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Both are what the operator takes: fp32 on a CPU, and rows to compute; autocast has another format in mind."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in (x, weight)}
    wanted = kinds == {("cpu", torch.float32)} and not torch.is_autocast_enabled("cpu")
    return wanted and torch.backends.mkldnn.is_available() and len(x) > 0


class Linear(torch.autograd.Function):
    """y = x W^T + b: dx = g W, dW = g^T x, db = sum over rows of g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)  # a frozen weight needs no input
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )
