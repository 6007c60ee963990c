"""Forward and backward with the prompt of a group computed once, for Llama- and Qwen-type models.

The n replies to a prompt share every prompt token, and prompts share what they begin with, such as the template's
system prompt. Here a micro batch is G prompts (G, T) and b replies (b, R), whose distinct real tokens stand side by
side in one flat sequence: the linear layers see each once and no padding but up to a round number of rows
(`grid.rounded`), and a reply's queries attend to its group's prompt keys and to its own. Same mathematics as the plain
forward, which is the reference in tests. `lm_head` runs only where a response token is predicted, in chunks, with the
closed-form gradient of log softmax: no logits are stored.

`SharedPrefixForward.of` returns None for an architecture it does not know; the caller then uses the plain forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.layers.decoder import DecoderLayers, is_known
from ups_rm.layers.grid import COLUMNS_BY, Distinct, Grid, rounded
from ups_rm.layers.shared_attention import Replies, SharedAttention
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.selected_logprobs import SelectedLogprobs, rows_at_once


class SharedPrefixForward:
    """See the module. Letters: G prompts, b replies, N real tokens of both."""

    def __init__(self, model: Any) -> None:
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.layers = DecoderLayers(self.causal.model, lambda: self.causal.is_gradient_checkpointing)
        self.chunk = rows_at_once(self.causal.config.vocab_size)

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
        kept: KeptForward | None = None,
    ) -> Tensor:
        """Log-probability of each response token.

        Args:
            prompts, prompt_mask: one row per distinct prompt, left-padded. Shape (G, T).
            responses, response_mask: right-padded. Shape (b, R).
            group: the prompt row that each reply answers. Shape (b,).
            kept: of the rollout that these prompts and replies come from, in the same order: what products gave is
                taken from there, and it is empty afterwards.

        Returns:
            logprobs (b, R) fp32, 0 at padding.
        """
        device, keep, length = prompts.device, response_mask.bool(), responses.shape[1]
        prompts, prompt_mask = (F.pad(part, (-part.shape[1] % COLUMNS_BY, 0)) for part in (prompts, prompt_mask))
        # (b, R'): the last token of a reply predicts nothing, so it is not read
        replies, read = (F.pad(part, (0, (1 - length) % COLUMNS_BY)) for part in (responses[:, :-1], keep[:, 1:]))
        distinct, starts = self._distinct(prompts, prompt_mask)
        cells, again = distinct.cells(starts, device)
        of_replies = read.flatten().nonzero().squeeze(1)
        if kept is not None:
            of_replies = kept.ordered(of_replies, distinct.ids, replies)
        cells = torch.cat([cells, prompts.numel() + of_replies])
        grid = Grid(cells, prompts.numel() + read.numel(), again, rounded(len(cells)))
        ids = torch.cat([prompts.flatten(), replies.flatten()])
        prompt_positions = (prompt_mask.cumsum(1) - 1).clamp_(min=0)
        reply_positions = prompt_mask.sum(1)[group, None] + torch.arange(read.shape[1], device=device)
        positions = torch.cat([prompt_positions.flatten(), reply_positions.flatten()])
        dtype = self.causal.model.embed_tokens.weight.dtype
        attend = SharedAttention(self.layers, grid, prompt_mask.bool(), [Replies(read, group)], dtype)
        known = None if kept is None else kept.take
        x = self.layers(grid.of_tokens(ids), grid.of_tokens(positions), attend, known)  # (N', H)
        in_prompts, in_replies = grid.tokens.split([prompts.numel(), read.numel()])
        last = in_prompts.view(prompts.shape)[:, -1]  # left padding: the last column is real
        before = torch.cat([last[group, None], in_replies.view(read.shape)], dim=1)  # what predicts response token r
        hidden = self.layers.norm(x.index_select(0, before[:, :length][keep]))
        drawn = None if kept is None else kept.logprobs_and_norms(keep, temperature)
        weight = self.causal.lm_head.weight
        flat = SelectedLogprobs.apply(hidden, weight, responses[keep], temperature, self.chunk, drawn)
        return torch.zeros(keep.shape, dtype=torch.float32, device=device).masked_scatter(keep, flat)

    def _distinct(self, prompts: Tensor, prompt_mask: Tensor) -> tuple[Distinct, list[int]]:
        """The tokens of left-padded prompts (G, T), and the cell in which each prompt begins."""
        width = prompts.shape[1]
        lengths = prompt_mask.sum(1).tolist()
        rows = [row[width - length :] for row, length in zip(prompts.tolist(), lengths, strict=True)]
        return Distinct.of(rows), [(g + 1) * width - length for g, length in enumerate(lengths)]
