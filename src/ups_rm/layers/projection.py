"""A linear layer for decoding: its weight laid out once for the many small products to come."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(weight: Tensor) -> bool:
    """oneDNN has a layout of its own for the weight: on CPUs, fp32 or (where the CPU computes it) bf16."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Projection:
    """x (b, I) -> x W^T + b, and the same with the product that follows it in one pass over the output.

    `F.linear` brings the weight into oneDNN's layout at every call, which costs more than the product itself while few
    rows are decoded. The packed layout reads each weight once, and fp32 products do not go through MKL. These are the
    operators that torch's inductor compiles linear layers to on CPUs; where they are not to be had, plain torch serves.
    No gradient flows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed = can_pack(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """silu(x W^T + b)"""
        if not self.packed:
            return F.silu(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) * other"""
        if not self.packed:
            return F.linear(x, self.weight, self.bias) * other
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T + b"""
        if not self.packed:
            return residual + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
