"""A linear layer for decoding: its weight laid out once for the many small products to come."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.native import multiplier


def can_pack(weight: Tensor) -> bool:
    """oneDNN has a layout of its own for the weight: on CPUs, fp32 or (where the CPU computes it) bf16."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Projection:
    """x (b, I) -> x W^T + b, and the same added to what is there in one pass over the output.

    `F.linear` brings the weight into oneDNN's layout at every call, which costs more than the product itself while few
    rows are decoded. Laid out beforehand, each weight is read once: for the product of our own in bf16 (`multiplier`),
    which fetches the next part of a weight while it uses this one, or for the operators that torch's inductor compiles
    linear layers to on CPUs; where neither is to be had, plain torch serves. No gradient flows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach().contiguous(), None if bias is None else bias.detach()
        self.kernels = multiplier(self.weight)
        self.by_onednn = self.kernels is None and can_pack(self.weight)
        if self.kernels is not None:
            self.weight = self.kernels.pack(self.weight)
        elif self.by_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernels is not None:
            out: Tensor = self.kernels.times_packed(x.contiguous(), self.weight, self.bias, None, None)
            return out
        if not self.by_onednn:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T + b"""
        if self.kernels is not None:
            out: Tensor = self.kernels.times_packed(x.contiguous(), self.weight, self.bias, residual.contiguous(), None)
            return out
        if not self.by_onednn:
            return residual + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
