"""Products with a weight, in fp32 on CPUs by oneDNN, and what LoRA adds to them.

torch asks MKL for them, which on the CPUs of other makers than its own is slower: of SmolLM2-135M's layers by a seventh
on two Zen 3 cores, of its head by a third. In other formats torch asks oneDNN itself, but brings the weight into its
layout at every product: `laid_out` does so once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.projection import Projection, can_pack

LAYOUT = "_weight_in_onednns_layout"
"""What a layer's copy is called among its attributes; no parameter and no buffer, so nothing else sees it."""
COPY = 2**30
"""Bytes of copies that are made at most: of a large model they would be the memory that is not there."""


def linear(x: Tensor, layer: Any, known: Tensor | None = None) -> Tensor:
    """layer(x), x (N, I) -> (N, O). Where that is `known`, its gradients alone are computed: of a plain layer or one
    that `is_simple_lora`."""
    if is_simple_lora(layer) and not _has_autocast(x.device.type):
        adapter = adapter_of(layer)
        if adapter is None:
            return linear(x, layer.base_layer, known)
        added: Tensor = Lora.apply(x, layer.base_layer.weight, layer.base_layer.bias, *adapter, known)
        return added
    packed = of_layout(layer, x)
    if known is not None:
        assert is_plain(layer), "gradients of what is known are those of a plain layer"
        out: Tensor = Linear.apply(x, layer.weight, layer.bias, known)
    elif packed is not None:
        out = packed(x)
    elif not is_plain(layer) or not by_onednn(x, layer.weight):
        out = layer(x)
    else:
        out = Linear.apply(x, layer.weight, layer.bias, None)
    return out


def linear_onto(residual: Tensor, x: Tensor, layer: Any, known: Tensor | None = None) -> Tensor:
    """residual + layer(x), x (N, I) and residual (N, O) -> (N, O). `known`: as for `linear`."""
    if known is None:
        return residual + linear(x, layer)
    return known_sum(residual, linear(x, layer, known), known)  # what stands for the product is read by nobody


def known_sum(a: Tensor, b: Tensor, known: Tensor) -> Tensor:
    """a + b, which is known."""
    out: Tensor = KnownSum.apply(a, b, known)
    return out


@contextmanager
def laid_out(layers: torch.nn.Module) -> Iterator[None]:
    """Within, on a CPU that computes in bf16: products of the plain linear layers in `layers`, where no gradient is
    wanted, take a `Projection` of their weight. Weights must not change meanwhile. Not of models whose copy is over
    `COPY`."""
    found: list[Any] = [layer for layer in layers.modules() if is_plain(layer) and _gains(layer)]
    if sum(layer.weight.nbytes for layer in found) > COPY:
        found = []
    try:
        for layer in found:
            # the bias as autocast gives it to torch's own product
            bias = None if layer.bias is None else layer.bias.to(layer.weight.dtype)
            layer.__dict__[LAYOUT] = Projection(layer.weight, bias)
        yield
    finally:
        for layer in found:
            layer.__dict__.pop(LAYOUT, None)


def of_layout(layer: torch.nn.Module, x: Tensor) -> Projection | None:
    """What `laid_out` has made of the layer, where it computes all that is wanted of x."""
    packed: Projection | None = layer.__dict__.get(LAYOUT)
    if packed is None or x.dtype != torch.bfloat16 or len(x) == 0 or torch.is_grad_enabled() or not is_plain(layer):
        return None
    return packed


def _gains(layer: Any) -> bool:
    return layer.weight.dtype == torch.bfloat16 and can_pack(layer.weight) and LAYOUT not in layer.__dict__


def is_plain(layer: Any) -> bool:
    """A linear layer whose weight and bias say all that it does: no adapters, no hooks."""
    return type(layer) is torch.nn.Linear and not has_hooks(layer)


def has_hooks(layer: Any) -> bool:
    """Something else wants to see or change what goes through the layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def is_simple_lora(layer: Any) -> bool:
    """A plain frozen layer with peft's LoRA, of which one adapter at most is active, adds its product and does nothing
    else: no dropout, no variant such as DoRA, no hooks, not merged."""
    if not hasattr(layer, "lora_A"):
        return False
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is not LoraLinear or has_hooks(layer) or not is_plain(layer.base_layer):
        return False
    adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
    return (
        not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        and not layer.merged
        and not layer.lora_variant
        and len(_active(layer)) <= 1
        and all(type(dropout) is torch.nn.Identity for dropout in layer.lora_dropout.values())
        and all(is_plain(adapter) and adapter.bias is None for adapter in adapters)
    )


def adapter_of(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A (r, I), B (O, r) and the scale of what is added in a layer that `is_simple_lora`; None where nothing is."""
    active = [] if layer.disable_adapters else _active(layer)
    return next(((layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in active), None)


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


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


class KnownSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, known: Tensor) -> Tensor:
        return known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad, None


class Linear(torch.autograd.Function):
    """y = x W^T + b: dx = g W, dW = g^T x, db = sum over rows of g. y is not computed where it is `known`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)  # a frozen weight needs no input
        return product(x, weight, bias) if known is None else known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


class Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685), W (O, I) and b (O,) frozen, A (r, I), B (O, r): with
    h = s g B, dx = g W + h A, dA = h^T x, dB = s g^T (x A^T). y is not computed where it is `known`.

    peft computes the second product in the adapters' format, fp32, for which it copies x and adds in fp32; here it is
    computed in x's, as under autocast, and added to the first in place. In bf16 what is less than half a unit in the
    last place of x W^T + b is lost there, as in peft; decoding rounds the whole once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        known: Tensor | None,
    ) -> Tensor:
        low = x @ (scale * a).to(x.dtype).t()  # (N, r)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return product(x, weight, bias).addmm_(low, b.to(x.dtype).t()) if known is None else known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        h = grad @ (ctx.scale * b).to(grad.dtype)  # (N, r)
        d_x = (grad @ weight).addmm_(h, a.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        d_a = (h.t() @ x).to(a.dtype) if ctx.needs_input_grad[3] else None
        d_b = (grad.t() @ low).to(b.dtype) if ctx.needs_input_grad[4] else None
        return d_x, None, None, d_a, d_b, None, None
