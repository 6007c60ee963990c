"""The layers of Llama- and Qwen-type models over tokens side by side, whatever rows they belong to.

Linear layers, norms and rotation see each real token once and no padding; which token sees which is for the caller's
`attend` alone, by `Grid` and a mask. The modules are transformers' own, so biases, q/k norms, GQA, adapters and rope
scaling follow the configuration. Same mathematics as the plain forward, which is the reference in tests.

Letters: N tokens, H hidden size, S heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ups_rm.layers.elementwise import masked_softmax, rms_norm, rotate, silu_mul_linear_onto
from ups_rm.layers.linear import linear, linear_onto

KNOWN = ("llama", "qwen2", "qwen3")
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rope types whose rotation of a token depends on its position alone, not on how long the longest text is."""
SCORES_AT_ONCE = 2**22
"""Up to so many attention scores per layer, CPUs take plain products: SDPA's backward is slower there."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (N, S, D), k and v (N, K, D) -> (N, S * D)"""


@dataclass(frozen=True)
class KnownLayer:
    """What the products of one layer gave when the same weights read the same tokens before: not computed again.

    Attributes:
        q, k, v: before norms and rotation. Shapes (N, S * D), (N, K * D), (N, K * D).
        attended: the residual sum after attention. Shape (N, H).
        gate, up: Shape (N, I).
        out: the residual sum after the layer. Shape (N, H).
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attended: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    out: Tensor | None = None


NOTHING = KnownLayer()


def is_known(model: Any) -> bool:
    """The model, with or without a head, is of a kind whose layers this package computes itself."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in KNOWN
        and not getattr(config, "sliding_window", None)
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and rope.get("rope_type", "default") in FIXED_ROTATIONS
        and not hasattr(model.get_input_embeddings(), "lora_embedding_A")  # its weight alone would miss the adapter
    )


class DecoderLayers:
    """Embedding and layers of a model without its head, such as `LlamaModel`; the final norm is the caller's.

    Args:
        base: a model that `is_known`.
        is_checkpointing: asked at each run with gradients: layers keep their input alone and are run again.
    """

    def __init__(self, base: Any, is_checkpointing: Callable[[], bool] = lambda: False) -> None:
        self.base, self.is_checkpointing = base, is_checkpointing
        config = base.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps

    def __call__(
        self, ids: Tensor, positions: Tensor, attend: Attend, known: Callable[[int], KnownLayer] | None = None
    ) -> Tensor:
        """ids and positions (N,) -> hidden states before the final norm (N, H).

        Args:
            known: asked once for each layer, in their order. Not of checkpointed layers.
        """
        table = self.base.embed_tokens
        # called, not read: a hook may widen what comes out
        x = table(ids)
        cos, sin = (part[0][:, None] for part in self.base.rotary_emb(x[None], positions[None]))  # (N, 1, D)
        again = self.is_checkpointing() and torch.is_grad_enabled()
        for i, layer in enumerate(self.base.layers):
            if again:
                x = checkpoint(self._layer, layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = self._layer(layer, x, cos, sin, attend, NOTHING if known is None else known(i))
        return x

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm. (N, H) -> (N, H)"""
        return rms_norm(hidden, self.base.norm.weight, self.eps)

    def _layer(
        self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, known: KnownLayer = NOTHING
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight, self.eps).to(mlp.gate_proj.weight.dtype)
        heads = (len(x), -1, self.head_dim)
        q, k, v = (
            linear(h, part, given).view(heads)
            for part, given in ((attention.q_proj, known.q), (attention.k_proj, known.k), (attention.v_proj, known.v))
        )
        if hasattr(attention, "q_norm"):
            q, k = (
                rms_norm(part.to(norm.weight.dtype), norm.weight, self.eps).to(v.dtype)
                for part, norm in ((q, attention.q_norm), (k, attention.k_norm))
            )
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = linear_onto(x, attended, attention.o_proj, known.attended)
        h = rms_norm(x, layer.post_attention_layernorm.weight, self.eps).to(mlp.gate_proj.weight.dtype)
        gate, up = linear(h, mlp.gate_proj, known.gate), linear(h, mlp.up_proj, known.up)
        return silu_mul_linear_onto(x, gate, up, mlp.down_proj, known.out)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (B, L, S, D) over k and v (B, M, K, D) with a mask of `additive` -> (B, L, S * D).

        The heads that share a key head stand as further query rows: keys are not copied per head.
        """
        rows, length, groups = len(q), q.shape[1], self.heads // self.kv_heads
        # (B, K, groups * L, D)
        grouped = q.transpose(1, 2).reshape(rows, self.kv_heads, groups * length, self.head_dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, M, D)
        if self.by_products(mask):
            scores = torch.matmul(grouped, k.transpose(-1, -2))  # (B, K, groups * L, M)
            out = masked_softmax(scores, mask, self.head_dim**-0.5) @ v
        else:
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        # unflatten, not view: SDPA's kernels on GPUs give other strides
        return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2)

    def additive(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask as `attention` takes it: seen (B, L, M) bool -> 0 where a query sees a key, else the least number.

        For SDPA its rows stand there once per query head of a key head, made here: every layer shares them, and its
        backward keeps no copy.
        """
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        mask = mask[:, None]  # (B, 1, L, M)
        return mask if self.by_products(mask) else mask.repeat(1, 1, self.heads // self.kv_heads, 1)

    def by_products(self, mask: Tensor) -> bool:
        """Attention under this mask is computed by plain products."""
        return mask.device.type == "cpu" and mask.numel() * self.heads <= SCORES_AT_ONCE
