"""Forward and backward with the prompt of a group computed once, for Llama- and Qwen-type models.

The n replies to a prompt share every prompt token. Here a micro batch is G prompts (G, T) and b replies (b, R) side by
side in one flat sequence of tokens: the linear layers see G*T + b*R tokens instead of b*(T + R), and a reply's queries
attend to its group's prompt keys and to its own. Same mathematics as the plain forward, which is the reference in
tests. `lm_head` runs only where a response token is predicted, in chunks, with the closed-form gradient of
log softmax: no logits are stored.

`SharedPrefixForward.of` returns None for an architecture it does not know; the caller then uses the plain forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ups_rm.local.decode import is_known
from ups_rm.local.elementwise import rms_norm, rotate, silu_mul
from ups_rm.local.selected_logprobs import LOGITS_AT_ONCE, ROWS_IN_FP32, SelectedLogprobs

SCORES_AT_ONCE = 2**22
"""Up to so many attention scores per layer, CPUs take plain products: SDPA's backward is slower there."""


class SharedPrefixForward:
    """See the module. Letters: G prompts, b replies, S heads, K key/value heads, D head size."""

    def __init__(self, model: Any) -> None:
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        config = self.causal.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.chunk = max(ROWS_IN_FP32, LOGITS_AT_ONCE // config.vocab_size)

    @classmethod
    def of(cls, model: Any) -> SharedPrefixForward | None:
        """A forward for the model, or None: unknown architecture, or adapters on the head."""
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        if not is_known(causal) or hasattr(causal.lm_head, "lora_A"):
            return None
        return cls(model)

    def response_logprobs(
        self,
        prompts: Tensor,
        prompt_mask: Tensor,
        responses: Tensor,
        response_mask: Tensor,
        group: Tensor,
        temperature: float,
    ) -> Tensor:
        """Log-probability of each response token.

        Args:
            prompts, prompt_mask: one row per distinct prompt, left-padded. Shape (G, T).
            responses, response_mask: right-padded. Shape (b, R).
            group: the prompt row that each reply answers. Shape (b,).

        Returns:
            logprobs (b, R) fp32, 0 at padding.
        """
        base, device = self.causal.model, prompts.device
        (count, width), (batch, length) = prompts.shape, responses.shape
        lengths = prompt_mask.sum(1)
        prompt_positions = (prompt_mask.cumsum(1) - 1).clamp_(min=0)
        response_positions = lengths[group, None] + torch.arange(length, device=device)
        positions = torch.cat([prompt_positions.flatten(), response_positions.flatten()])[None]
        # a sampled padding token is read like any other, but its row is not trained: as in nn.Embedding
        ids, pad = torch.cat([prompts.flatten(), responses.flatten()]), base.embed_tokens.padding_idx
        x = F.embedding(ids, base.embed_tokens.weight, padding_idx=pad)[None]  # (1, N, H)
        cos, sin = (part[0, :, None] for part in base.rotary_emb(x, positions))  # (N, 1, D)
        masks = self._masks(prompt_mask, length, group, x.dtype)
        shape = (count, width, batch, length)
        for layer in base.layers:
            if self.causal.is_gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, cos, sin, masks, group, shape, use_reentrant=False)
            else:
                x = self._layer(layer, x, cos, sin, masks, group, shape)
        hidden = x[0]
        last_prompt = hidden[: count * width].view(count, width, -1)[:, -1]  # left padding: the last column is real
        replies = hidden[count * width :].view(batch, length, -1)
        hidden = torch.cat([last_prompt[group, None], replies[:, :-1]], dim=1)  # position r predicts response token r
        keep = response_mask.bool()
        hidden = rms_norm(hidden[keep], base.norm.weight, self.eps)
        flat = SelectedLogprobs.apply(hidden, self.causal.lm_head.weight, responses[keep], temperature, self.chunk)
        out = torch.zeros(batch, length, dtype=torch.float32, device=device)
        return out.masked_scatter(keep, flat)

    def _masks(self, prompt_mask: Tensor, length: int, group: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Additive masks: prompts (G, 1, T, T), and replies over [prompt | reply] (b, 1, R, T + R).

        For SDPA their rows stand there once per query head of a key head, made here: every layer shares them, and its
        backward keeps no copy.
        """
        width, device = prompt_mask.shape[1], prompt_mask.device
        hidden = torch.finfo(dtype).min
        seen = prompt_mask.bool()
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # a padded query sees itself, so that no row of the softmax is empty
        prompts = (causal & seen[:, None]) | torch.eye(width, dtype=torch.bool, device=device)
        replies = torch.cat([seen[group, None].expand(-1, length, -1), own.expand(len(group), -1, -1)], dim=-1)
        full = [
            torch.zeros(part.shape, dtype=dtype, device=device).masked_fill_(~part, hidden)
            for part in (prompts, replies)
        ]
        groups = self.heads // self.kv_heads
        shaped = [mask[:, None] if self._by_products(mask) else mask[:, None].repeat(1, 1, groups, 1) for mask in full]
        return shaped[0], shaped[1]

    def _by_products(self, mask: Tensor) -> bool:
        """Attention under this mask is computed by plain products."""
        return mask.device.type == "cpu" and mask.numel() * self.heads <= SCORES_AT_ONCE

    def _layer(
        self,
        layer: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: tuple[Tensor, Tensor],
        group: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight, self.eps)
        heads = (x.shape[1], -1, self.head_dim)
        q, k, v = (part(h)[0].view(heads) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q = rms_norm(q, attention.q_norm.weight, self.eps)
            k = rms_norm(k, attention.k_norm.weight, self.eps)
        a = self._attention(rotate(q, cos, sin), rotate(k, cos, sin), v, masks, group, shape)
        x = x + attention.o_proj(a[None])
        h = rms_norm(x, layer.post_attention_layernorm.weight, self.eps)
        return x + mlp.down_proj(silu_mul(mlp.gate_proj(h), mlp.up_proj(h)))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, Tensor], group: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """q (N, S, D), k and v (N, K, D) -> (N, S * D): prompts among themselves, replies over prompt and self."""
        count, width, batch, length = shape
        split = count * width

        def as_prompts(y: Tensor) -> Tensor:  # (G, heads, T, D)
            return y[:split].view(count, width, -1, self.head_dim).transpose(1, 2)

        def as_replies(y: Tensor) -> Tensor:  # (b, heads, R, D)
            return y[split:].view(batch, length, -1, self.head_dim).transpose(1, 2)

        kp, vp = as_prompts(k), as_prompts(v)
        keys = torch.cat([kp[group], as_replies(k)], dim=2)  # (b, K, T + R, D)
        values = torch.cat([vp[group], as_replies(v)], dim=2)
        both = self._attend(as_prompts(q), kp, vp, masks[0]), self._attend(as_replies(q), keys, values, masks[1])
        return torch.cat([part.transpose(1, 2).reshape(-1, self.heads * self.head_dim) for part in both])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (B, S, L, D) over k and v (B, K, M, D) with a mask of `_masks` -> (B, S, L, D).

        The heads that share a key head stand as further query rows: keys are not copied per head.
        """
        rows, length, groups = len(q), q.shape[2], self.heads // self.kv_heads
        grouped = q.reshape(rows, self.kv_heads, groups * length, self.head_dim)
        if self._by_products(mask):
            scores = torch.matmul(grouped, k.transpose(-1, -2)) * self.head_dim**-0.5
            scores = scores.unflatten(2, (groups, length)) + mask[:, :, None]  # (B, K, groups, L, M)
            out = scores.softmax(dim=-1).flatten(2, 3) @ v
        else:
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        return out.view(rows, self.heads, length, self.head_dim)
