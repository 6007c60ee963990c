"""A decode loop for Llama- and Qwen-type models: prompt computed once per group, preallocated KV cache, no `generate`.

Weights are read from the transformers model itself (LoRA merged in on `refresh`), the rotary table is its own module,
so biases, q/k norms, GQA, tied embeddings and rope scaling follow the configuration. Finished rows leave the batch.
Sampling inverts the CDF with uniforms drawn beforehand per row and position: a row's reply does not depend on which
other rows are in its batch or when they end.

`FastDecoder.of` returns None for an architecture it does not know; the caller then uses `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KNOWN = ("llama", "qwen2", "qwen3")


def is_known(model: Any) -> bool:
    """The model is of a kind whose layers this module and `shared_prefix` compute themselves."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in KNOWN
        and not getattr(config, "sliding_window", None)
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and not hasattr(model.get_input_embeddings(), "lora_embedding_A")  # its weight alone would miss the adapter
    )


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


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability under the tempered, untruncated distribution.

    Args:
        logits: (b, V) fp32; changed in place.
        uniform: (b,) in [0, 1).
    """
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        return token, logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
    logits /= sampling.temperature
    logsumexp = logits.logsumexp(dim=-1, keepdim=True)
    kept = logits
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = kept.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= sampling.top_p  # the token that crosses top_p stays
        kept = torch.full_like(kept, float("-inf")).scatter_(1, order, ordered.masked_fill(outside, float("-inf")))
    cdf = (kept - logsumexp).exp_().cumsum_(dim=-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    token = token.clamp_(max=int(logits.shape[1]) - 1)
    return token, (logits.gather(1, token[:, None]) - logsumexp).squeeze(1)


@dataclass
class _Layer:
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class FastDecoder:
    """See the module. Letters: b rows, S heads, K key/value heads, D head size, H hidden size."""

    def __init__(self, model: Any) -> None:
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        config = self.causal.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.refresh()

    @classmethod
    def of(cls, model: Any) -> FastDecoder | None:
        """A decoder for the model, or None where the architecture is not known."""
        return cls(model) if is_known(model.get_base_model() if hasattr(model, "peft_config") else model) else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights."""
        base = self.causal.model
        self.embed, self.norm, self.rotary = base.embed_tokens.weight, base.norm.weight, base.rotary_emb
        self.head, self.dtype = _weight(self.causal.lm_head), self.embed.dtype
        self.layers = []
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            bias = [part.bias for part in qkv]
            self.layers.append(
                _Layer(
                    qkv=torch.cat([_weight(part) for part in qkv]),
                    qkv_bias=None if bias[0] is None else torch.cat(bias),
                    out=_weight(attention.o_proj),
                    out_bias=attention.o_proj.bias,
                    gate_up=torch.cat([_weight(mlp.gate_proj), _weight(mlp.up_proj)]),
                    down=_weight(mlp.down_proj),
                    norm1=layer.input_layernorm.weight,
                    norm2=layer.post_attention_layernorm.weight,
                    q_norm=getattr(getattr(attention, "q_norm", None), "weight", None),
                    k_norm=getattr(getattr(attention, "k_norm", None), "weight", None),
                )
            )

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)

    def _qkv(self, x: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, t, H) -> q (b, S, t, D), k and v (b, K, t, D), rotated."""
        y = F.linear(self._rms(x, layer.norm1), layer.qkv, layer.qkv_bias)
        y = y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _mlp(self, x: Tensor, layer: _Layer) -> Tensor:
        gate, up = F.linear(self._rms(x, layer.norm2), layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._rms(hidden, self.norm), self.head).float()

    def _prefill(self, prompts: list[list[int]], n: int, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run each prompt once, right-padded; (last hidden (B, H), keys, values (L, B, K, total, D), lengths (B,))."""
        device, count, width = self.embed.device, len(prompts), max(map(len, prompts))
        lengths = torch.tensor([len(row) for row in prompts], device=device)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in prompts], device=device)
        x = F.embedding(ids, self.embed)  # (P, T, H)
        cos, sin = self.rotary(x, torch.arange(width, device=device)[None])
        shape = (len(self.layers), count * n, self.kv_heads, total, self.head_dim)
        keys, values = (
            torch.zeros(shape, dtype=self.dtype, device=device),
            torch.zeros(shape, dtype=self.dtype, device=device),
        )
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos[:, None], sin[:, None])
            # right padding and a causal mask: no real token sees a padded one
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            keys[i, :, :, :width] = k.repeat_interleave(n, 0)
            values[i, :, :, :width] = v.repeat_interleave(n, 0)
            x = x + F.linear(a.transpose(1, 2).flatten(2), layer.out, layer.out_bias)
            x = x + self._mlp(x, layer)
        last = x[torch.arange(count, device=device), lengths - 1]
        return last.repeat_interleave(n, 0), keys, values, lengths.repeat_interleave(n)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        eos_ids: list[int],
        sampling: Sampling,
        uniforms: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """n replies per prompt.

        Args:
            prompts: token ids, no padding.
            uniforms: draws for row i and position t. Shape (P * n, max_new_tokens).

        Returns:
            (tokens, logprobs) per row on the CPU, the end token included, row i answering prompt i // n.
        """
        device, width = self.embed.device, max(map(len, prompts))
        total, batch = width + max_new_tokens, len(prompts) * n
        hidden, keys, values, lengths = self._prefill(prompts, n, total)
        slots = torch.arange(total, device=device)
        seen = ((slots < lengths[:, None]) | (slots >= width))[
            :, None, None
        ]  # (B, 1, 1, total): prompt padding is hidden
        end = torch.tensor(eos_ids, device=device)
        uniforms = uniforms.to(device)
        out = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
        logprobs, count = (
            torch.zeros(batch, max_new_tokens, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )
        rows = torch.arange(batch, device=device)  # the row of `out` that each live sequence writes to
        for t in range(max_new_tokens):
            token, logprob = draw(self._logits(hidden), sampling, uniforms[rows, t])
            out[rows, t], logprobs[rows, t], count[rows] = token, logprob, t + 1
            alive = ~torch.isin(token, end)
            if t == max_new_tokens - 1 or not bool(alive.any()):
                break
            if not bool(alive.all()):
                keys, values, seen, rows = keys[:, alive], values[:, alive], seen[alive], rows[alive]
                lengths, token = lengths[alive], token[alive]
            hidden = self._decode(token, lengths + t, width + t, keys, values, seen)
        out, logprobs = out.cpu(), logprobs.cpu()
        return [(out[i, :k], logprobs[i, :k]) for i, k in enumerate(count.tolist())]

    def _decode(self, token: Tensor, position: Tensor, slot: int, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """One token per row at cache slot `slot`; returns the last hidden state (b, H)."""
        x = F.embedding(token, self.embed)[:, None]  # (b, 1, H)
        cos, sin = self.rotary(x, position[:, None])
        mask, groups = seen[..., : slot + 1], self.heads // self.kv_heads
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos[:, None], sin[:, None])
            keys[i, :, :, slot : slot + 1], values[i, :, :, slot : slot + 1] = k, v
            # the heads that share a key head stand as rows of one query: no copy of the cache
            q = q.view(-1, self.kv_heads, groups, self.head_dim)
            a = F.scaled_dot_product_attention(
                q, keys[i, :, :, : slot + 1], values[i, :, :, : slot + 1], attn_mask=mask
            )
            x = x + F.linear(a.reshape(x.shape[0], 1, -1), layer.out, layer.out_bias)
            x = x + self._mlp(x, layer)
        return x[:, 0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as Llama applies it: halves of the head, not pairs."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _weight(linear: Any) -> Tensor:
    """The weight of a linear layer with its active LoRA adapters merged in."""
    if not hasattr(linear, "lora_A"):
        return linear.weight
    weight = linear.base_layer.weight
    for name in linear.active_adapters:
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name).to(weight.dtype)
    return weight
