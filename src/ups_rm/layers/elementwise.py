"""RMSNorm, rotary embedding and the gated SiLU, each with its gradient.

Every function has its form in torch, which is the reference, and calls the C++ kernel where there is one for the tensor
(`native.usable`). In both forms autograd keeps the inputs alone, not the intermediates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.linear import is_plain, known_sum, linear, of_layout, product
from ups_rm.layers.native import usable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), fp32 inside. x (..., H), weight (H,) -> (..., H) in x's dtype."""
    out: Tensor = RMSNorm.apply(x, weight, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as Llama applies it: halves of the head, not pairs. x (N, heads, D), cos and sin (N, 1, D)
    in x's dtype or fp32 -> (N, heads, D) in x's dtype."""
    out: Tensor = Rotate.apply(x, cos, sin)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    out: Tensor = SiluMul.apply(gate, up)
    return out


def masked_softmax(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale scores + mask) over keys. scores (B, K, G * L, M), mask (B, 1, L, M), the same for each of the
    K * G heads -> as scores. The kernel rounds once; torch's form rounds scaled and masked scores to their dtype."""
    out: Tensor = MaskedSoftmax.apply(scores, mask, scale)
    return out


def silu_mul_linear(gate: Tensor, up: Tensor, layer: Any, known: Tensor | None = None) -> Tensor:
    """layer(silu(gate) * up), gate and up (N, I). `known`: as for `linear`."""
    packed = of_layout(layer, gate)
    if packed is not None and known is None:
        return packed(_gated(gate, up))
    if not is_plain(layer) or layer.bias is not None:  # adapters and hooks read the product themselves
        return linear(silu_mul(gate, up), layer, known)
    out: Tensor = SiluMulLinear.apply(gate, up, layer.weight, known)
    return out


def silu_mul_linear_onto(residual: Tensor, gate: Tensor, up: Tensor, layer: Any, known: Tensor | None = None) -> Tensor:
    """residual + layer(silu(gate) * up), gate and up (N, I), residual (N, O) -> (N, O). `known`: as for
    `linear_onto`."""
    out = silu_mul_linear(gate, up, layer, known)
    return residual + out if known is None else known_sum(residual, out, known)


class RMSNorm(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps) and z = s x: dw = sum over rows of g z, dx = s (g w - z mean(g w z))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        kernels = usable(x, weight)
        if kernels is not None:
            out: Tensor = kernels.rms_norm(x.contiguous(), weight, eps)
            return out
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernels = usable(grad, x, weight)
        if kernels is not None:
            d_x, d_weight = kernels.rms_norm_backward(grad.contiguous(), x.contiguous(), weight, ctx.eps)
            return d_x, d_weight.to(weight.dtype), None
        wide = torch.promote_types(x.dtype, torch.float32)
        g, z = grad.to(wide), x.to(wide)
        s = (torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(ctx.eps)).rsqrt_()
        z = z * s
        gz = g * z
        inner = (gz @ weight.to(wide)).div_(x.shape[-1]).unsqueeze(-1)  # mean(g w z)
        d_weight = gz.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_x = (g * weight.to(wide)).addcmul_(z, inner, value=-1).mul_(s)
        return d_x.to(x.dtype), d_weight, None


class Rotate(torch.autograd.Function):
    """The gradient is turned back: both halves of cos and of sin are the same numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    kernels = usable(x) if {cos.dtype, sin.dtype} <= {x.dtype, torch.float32} else None
    if kernels is not None:
        out: Tensor = kernels.rotate(x.contiguous(), cos.contiguous(), sin.contiguous(), sign)
        return out
    half = x.shape[-1] // 2
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * (sign * sin)).to(x.dtype)


class SiluMul(torch.autograd.Function):
    """See `_gated` and `_gated_backward`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        d_gate, d_up, _ = _gated_backward(grad, *ctx.saved_tensors)
        return d_gate, d_up


class SiluMulLinear(torch.autograd.Function):
    """(silu(gate) * up) W^T, or what is `known` in its place. The product of gate and up, a fifth of what a layer would
    keep, is made again for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return product(_gated(gate, up), weight) if known is None else known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate, up, weight = ctx.saved_tensors
        d_gate, d_up, gated = _gated_backward(grad @ weight, gate, up)
        return d_gate, d_up, grad.t() @ gated if ctx.needs_input_grad[2] else None, None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    kernels = usable(gate, up)
    if kernels is not None:
        out: Tensor = kernels.silu_mul(gate.contiguous(), up.contiguous())
        return out
    return F.silu(gate) * up


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With s = sigmoid(gate): d_gate = g up s (1 + gate (1 - s)), d_up = g gate s; and the product, gate s up."""
    kernels = usable(grad, gate, up)
    if kernels is not None:
        d_gate, d_up, again = kernels.silu_mul_backward(grad.contiguous(), gate.contiguous(), up.contiguous())
        return d_gate, d_up, again
    s = torch.sigmoid(gate)
    silu = gate * s
    return grad * up * (s + silu * (1 - s)), grad * silu, silu * up


class MaskedSoftmax(torch.autograd.Function):
    """With p the softmax: d_scores = scale p (g - sum over keys of g p)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, scale: float) -> Tensor:
        kernels = usable(scores, mask)
        if kernels is not None:
            out: Tensor = kernels.masked_softmax(scores.contiguous(), mask.contiguous(), scale)
        else:
            wide = (scores * scale).unflatten(2, (-1, mask.shape[2])) + mask[:, :, None]  # (B, K, G, L, M)
            out = wide.softmax(dim=-1).flatten(2, 3)
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        d_scores = torch.ops.aten._softmax_backward_data(grad, out, -1, out.dtype)
        return d_scores.mul_(ctx.scale), None, None
