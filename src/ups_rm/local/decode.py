"""A decode loop for Llama- and Qwen-type models: what prompts share is computed once, preallocated KV cache.

Weights are read from the transformers model itself and packed on `refresh`, the rotary table is its own module, so
biases, q/k norms, GQA, tied embeddings and rope scaling follow the configuration. LoRA's adapter of a layer is not
merged into its weight, where a small one would round away: its B stands beside it as further columns, and reads what A
makes of the input. Several adapters at once, and those of the head, are merged. Finished rows leave the batch.
Sampling inverts the CDF with uniforms drawn beforehand per row and position: a row's reply does not depend on which
other rows are in its batch or when they end.

`FastDecoder.of` returns None for an architecture it does not know; the caller then uses `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.decoder import is_known
from ups_rm.layers.elementwise import rms_norm, silu_mul
from ups_rm.layers.grid import Distinct, Grid, rounded
from ups_rm.layers.linear import adapter_of, is_plain, is_simple_lora
from ups_rm.layers.native import PANEL, usable
from ups_rm.layers.projection import Projection
from ups_rm.local.graphed import GraphedSteps, recorder
from ups_rm.local.group_cache import GroupCache, NativeCache, StaticCache, rotated
from ups_rm.local.kept_forward import Drawn, KeptForward
from ups_rm.local.sampling import Sampling, draw


@dataclass
class _Layer:
    """`..._low`: LoRA's A, whose output the products after it read beside their input; None without adapters."""

    qkv: Projection
    out: Projection
    gate: Projection
    up: Projection
    down: Projection
    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv_low: Projection | None
    out_low: Projection | None
    mlp_low: Projection | None
    down_low: Projection | None

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        """The present weights of a transformers layer."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        bias = [part.bias for part in qkv]
        of_qkv, qkv_low = _side_by_side(qkv)
        (out,), out_low = _side_by_side([attention.o_proj])
        (gate, up), mlp_low = _side_by_side([mlp.gate_proj, mlp.up_proj])
        (down,), down_low = _side_by_side([mlp.down_proj])
        return cls(
            qkv=Projection(torch.cat(of_qkv), None if bias[0] is None else torch.cat(bias)),
            out=Projection(out, attention.o_proj.bias),
            gate=Projection(gate),
            up=Projection(up),
            down=Projection(down),
            norm1=layer.input_layernorm.weight,
            norm2=layer.post_attention_layernorm.weight,
            q_norm=getattr(getattr(attention, "q_norm", None), "weight", None),
            k_norm=getattr(getattr(attention, "k_norm", None), "weight", None),
            qkv_low=qkv_low,
            out_low=out_low,
            mlp_low=mlp_low,
            down_low=down_low,
        )

    @property
    def low(self) -> list[Projection | None]:
        return [self.qkv_low, self.out_low, self.mlp_low, self.down_low]

    def copies(self, *, packed: bool) -> list[Projection]:
        """See `FastDecoder.copies`: qkv is put together from three, an adapted weight has further columns."""
        read = [
            (self.out, self.out_low),
            (self.gate, self.mlp_low),
            (self.up, self.mlp_low),
            (self.down, self.down_low),
        ]
        own = [part for part, low in read if packed or low is not None]
        return [self.qkv, *own, *(low for low in self.low if low is not None)]

    def whole(self, eps: float) -> Any | None:
        """What the kernel for a whole layer takes, where there is one for it."""
        kernels = self.qkv.kernels
        if self.q_norm is not None or any(part.kernels is None for part in self.copies(packed=True)):
            return None
        assert kernels is not None
        qkv, out, gate, up, down = (part.weight for part in (self.qkv, self.out, self.gate, self.up, self.down))
        norm1, norm2 = self.norm1.to(qkv.dtype), self.norm2.to(qkv.dtype)
        low = [None if part is None else part.weight for part in self.low]
        return kernels.LayerWeights(norm1, qkv, out, norm2, gate, up, down, self.qkv.bias, self.out.bias, eps, *low)


class FastDecoder:
    """See the module. Letters: b rows, N tokens, S heads, K key/value heads, D head size, H hidden size."""

    def __init__(self, model: Any) -> None:
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        config = self.causal.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.kernels = usable(self.causal.model.embed_tokens.weight)
        self.record = recorder(self.causal.model.embed_tokens.weight.device)
        self.layers: list[_Layer] = []
        self.whole: list[Any | None] = []
        """Per layer: see `_Layer.whole`."""
        self.head: Projection | None = None
        self.refresh()

    @classmethod
    def of(cls, model: Any) -> FastDecoder | None:
        """A decoder for the model, or None: its architecture is not known, or adapters do more than to be added."""
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        more = any(hasattr(part, "lora_A") and _does_more(part) for part in causal.modules())
        return cls(model) if is_known(causal) and not more else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights."""
        self.release()
        base = self.causal.model
        self.embed, self.norm, self.rotary = base.embed_tokens.weight, base.norm.weight, base.rotary_emb
        self.head, self.dtype = Projection(_weight(self.causal.lm_head)), self.embed.dtype
        self.layers = [_Layer.of(layer) for layer in base.layers]
        self.whole = [layer.whole(self.eps) for layer in self.layers]

    def release(self) -> None:
        """Give back the weights that were laid out; the next `generate` takes over the model's present ones."""
        self.layers, self.whole, self.head = [], [], None

    def copies(self, *, packed: bool) -> list[Tensor]:
        """Weights that the decoder holds beside the model's own: all projections where they are packed, else those that
        are put together."""
        assert self.head is not None
        head = [self.head] if packed else []
        return [
            part.weight for part in (*head, *(part for layer in self.layers for part in layer.copies(packed=packed)))
        ]

    def kept_forward(self) -> KeptForward | None:
        """What `generate` can fill for the training forward, or None: layers of other kinds are called in it, and
        checkpointed ones keep nothing."""
        blocks = [block for layer in self.causal.model.layers for block in (layer.self_attn, layer.mlp)]
        linear = [part for block in blocks for name, part in block.named_children() if name.endswith("_proj")]
        same = all((is_plain(part) or is_simple_lora(part)) and part.weight.dtype == self.dtype for part in linear)
        if not same or hasattr(self.causal.lm_head, "lora_A") or self.causal.is_gradient_checkpointing:
            return None
        keys = self.kv_heads * self.head_dim
        return KeptForward((self.heads * self.head_dim, keys, keys))

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.to(x.dtype), self.eps)

    def _layer(self, i: int, x: Tensor, attend: Callable[[int, Tensor], Tensor], kept: KeptForward | None) -> Tensor:
        """x (N, H) -> (N, H). `attend`: the layer's number, and queries, keys and values, not rotated
        (N, S + 2 K, D) -> (N, S * D)"""
        layer = self.layers[i]
        qkv = layer.qkv(_beside(self._rms(x, layer.norm1), layer.qkv_low)).view(len(x), -1, self.head_dim)
        attended = layer.out.onto(_beside(attend(i, self._normed(qkv, layer)), layer.out_low), x)
        y = _beside(self._rms(attended, layer.norm2), layer.mlp_low)
        gate, up = layer.gate(y), layer.up(y)
        out = layer.down.onto(_beside(silu_mul(gate, up), layer.down_low), attended)
        if kept is not None:
            kept.add(i, qkv, attended, gate, up, out)
        return out

    def _normed(self, qkv: Tensor, layer: _Layer) -> Tensor:
        """The norms of queries and keys, where the model has them. (N, S + 2 K, D)"""
        if layer.q_norm is None or layer.k_norm is None:
            return qkv
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return torch.cat([self._rms(q, layer.q_norm), self._rms(k, layer.k_norm), v], dim=1)

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(self._rms(hidden, self.norm))

    def _prefill(
        self, prompts: list[list[int]], n: int, reply_length: int, kept: KeptForward | None = None
    ) -> tuple[Tensor, Tensor, GroupCache]:
        """Run each prompt once; last hidden (P, H), lengths (P,), and the cache for n replies each. Products see
        distinct real tokens (N,) and what fills up (`Grid.rows`), attention right-padded rows (P, T)."""
        device, count, width = self.embed.device, len(prompts), max(map(len, prompts))
        lengths = torch.tensor([len(row) for row in prompts], device=device)
        distinct = Distinct.of(prompts)
        cells, again = distinct.cells([i * width for i in range(count)], device)
        grid = Grid(cells, count * width, again, rounded(len(cells)))
        if kept is not None:
            kept.begin(distinct.ids, count * n * (reply_length - 1))
        ids = torch.tensor(distinct.ids, device=device)
        x = F.embedding(F.pad(ids, (0, grid.rows - len(ids))), self.embed)  # (N', H)
        cos, sin = self._rope(F.pad(cells % width, (0, grid.rows - len(ids))))
        shape = (len(self.layers), count, self.kv_heads, width, self.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device=device)
        values = torch.empty_like(keys)

        def attend(i: int, qkv: Tensor) -> Tensor:
            qkv = grid.pad(rotated(qkv, cos, sin, self.heads + self.kv_heads))
            qkv = qkv.view(count, width, -1, self.head_dim).transpose(1, 2)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            keys[i], values[i] = k, v
            # right padding and a causal mask: no real token sees a padded one
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return grid.pack(a.transpose(1, 2).reshape(count * width, -1))

        for i in range(len(self.layers)):
            x = self._layer(i, x, attend, kept)
        last = x[grid.tokens.view(count, width)[torch.arange(count, device=device), lengths - 1]]
        sizes = {"columns": n, "reply_length": reply_length, "heads": self.heads}
        if self.record is not None:
            return last, lengths, StaticCache(keys, values, lengths, **sizes)
        if self.kernels is None:
            return last, lengths, GroupCache(keys, values, lengths, **sizes)
        return last, lengths, NativeCache(keys, values, lengths, kernels=self.kernels, **sizes)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        eos_ids: list[int],
        sampling: Sampling,
        uniforms: Tensor,
        ended: Callable[[int, Tensor], None] | None = None,
        kept: KeptForward | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """n replies per prompt.

        Args:
            prompts: token ids, no padding.
            uniforms: draws for row i and position t. Shape (P * n, max_new_tokens).
            ended: told of each reply that ends while others go on: its row and its tokens, the end token included.
            kept: of `kept_forward`, empty: filled with what is computed of every token that is read.

        Returns:
            (tokens, logprobs) per row on the CPU, the end token included, row i answering prompt i // n.
        """
        if not self.layers:
            self.refresh()
        device, batch = self.embed.device, len(prompts) * n
        last, lengths, cache = self._prefill(prompts, n, max_new_tokens, kept)
        hidden, lengths = last.repeat_interleave(n, 0), lengths.repeat_interleave(n)
        step: Callable[[Tensor, Tensor, int], Tensor] = partial(self._decode, cache, kept=kept)
        if self.record is not None:
            step = GraphedSteps(partial(self._decode, cache), cache, self.record)
        end = torch.tensor(eos_ids, device=device)
        uniforms = uniforms.to(device)
        out = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
        logprobs, norms = (torch.zeros(batch, max_new_tokens, device=device) for _ in range(2))
        count = torch.zeros(batch, dtype=torch.long, device=device)
        rows = torch.arange(batch, device=device)  # the row of `out` that each live sequence writes to
        for t in range(max_new_tokens):
            token, logprobs[rows, t], norms[rows, t] = draw(self._logits(hidden), sampling, uniforms[rows, t])
            out[rows, t], count[rows] = token, t + 1
            alive = ~torch.isin(token, end)
            if t == max_new_tokens - 1 or not bool(alive.any()):
                break
            if not bool(alive.all()):
                if ended is not None:
                    for row in rows[~alive].tolist():
                        ended(row, out[row, : t + 1].cpu())
                cache.keep(alive)
                rows, lengths, token = rows[alive], lengths[alive], token[alive]
            if kept is not None:
                kept.go_on(rows)
            hidden = step(token, lengths + t, t)
        if kept is not None:
            kept.drawn = Drawn(out, logprobs, norms, sampling.temperature)
        out, logprobs = out.cpu(), logprobs.cpu()
        return [(out[i, :k], logprobs[i, :k]) for i, k in enumerate(count.tolist())]

    def _decode(
        self, cache: GroupCache, token: Tensor, position: Tensor, t: int | Tensor, kept: KeptForward | None = None
    ) -> Tensor:
        """Reply token t of every live row, at these positions; returns the last hidden state (b, H)."""
        x = F.embedding(token, self.embed)  # (b, H)
        cos, sin = self._rope(position)

        def attend(i: int, qkv: Tensor) -> Tensor:
            return cache.attend(i, qkv, cos, sin, t)

        for i, whole in enumerate(self.whole):
            if whole is None or not isinstance(cache, NativeCache):
                x = self._layer(i, x, attend, kept)
            else:
                x = cache.decode_layer(i, whole, x, cos, sin, t, [] if kept is None else kept.room_now(i))
        return x

    def _rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions (N,), each (N, 1, D) in the compute dtype."""
        cos, sin = self.rotary(self.embed, position[None])
        return cos[0, :, None], sin[0, :, None]


def _beside(x: Tensor, low: Projection | None) -> Tensor:
    return x if low is None else torch.cat([x, low(x)], dim=-1)


def _side_by_side(parts: list[Any]) -> tuple[list[Tensor], Projection | None]:
    """The weights of linear layers that read one input, each (O, I). Where they have adapters of LoRA, ranks r in all:
    (O, I + r), and the product that makes the further columns of the input. r is filled up to whole panels."""
    adapters = [adapter_of(part) if is_simple_lora(part) else None for part in parts]
    found = [adapter for adapter in adapters if adapter is not None]
    if not found:
        return [_weight(part) for part in parts], None
    total = sum(len(a) for a, _, _ in found)
    room, dtype = total + -total % PANEL, parts[0].weight.dtype
    low = torch.cat([(scale * a).to(dtype) for a, _, scale in found])
    weights, start = [], 0
    for part, adapter in zip(parts, adapters, strict=True):
        weight = _weight(part) if adapter is None else part.base_layer.weight
        further = weight.new_zeros(len(weight), room)
        if adapter is not None:
            b = adapter[1]
            further[:, start : start + b.shape[1]] = b
            start += b.shape[1]
        weights.append(torch.cat([weight, further], dim=1))
    return weights, Projection(F.pad(low, (0, 0, 0, room - total)))


def _does_more(layer: Any) -> bool:
    """An adapter of the layer is a variant, such as DoRA, or has a bias: what it does is not in A and B alone."""
    return bool(layer.lora_variant) or any(layer.lora_bias.values())


def _weight(linear: Any) -> Tensor:
    """The weight of a linear layer; adapters of one that is not `is_simple_lora` are merged in."""
    if not hasattr(linear, "lora_A"):
        return linear.weight
    weight = linear.base_layer.weight
    if linear.disable_adapters or linear.merged:
        return weight
    for name in linear.active_adapters:
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name).to(weight.dtype)
    return weight
