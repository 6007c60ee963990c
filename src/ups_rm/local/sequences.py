"""Prompts and replies as the forward takes them, and how they are cut into micro batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """B replies to P prompts.

    Attributes:
        prompts, prompt_mask: left-padded prompt ids, one row per reply. Shape (B, T).
        responses, response_mask: right-padded reply ids, the end token included. Shape (B, R).
        group_ids: the prompt that each row answers. Shape (B,).
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    group_ids: Tensor

    def __len__(self) -> int:
        return len(self.group_ids)

    def trimmed(self, rows: Tensor) -> Sequences:
        """The given rows without columns that are all padding; the reply keeps at least one column."""
        width = int(self.prompt_mask[rows].sum(1).max())
        length = max(1, int(self.response_mask[rows].sum(1).max()))
        start = self.prompts.shape[1] - width
        return Sequences(
            self.prompts[rows, start:],
            self.prompt_mask[rows, start:],
            self.responses[rows, :length],
            self.response_mask[rows, :length],
            self.group_ids[rows],
        )

    def unique_prompts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(prompts (G, T), prompt_mask (G, T), group (B,)): one row per distinct group, and each reply's row."""
        distinct, group = torch.unique(self.group_ids, return_inverse=True)
        first = torch.zeros_like(distinct).scatter_(
            0, group.flip(0), torch.arange(len(self), device=group.device).flip(0)
        )
        return self.prompts[first], self.prompt_mask[first], group

    def micro_batches(self, rows: Tensor, size: int) -> list[Tensor]:
        """Row numbers, at most `size` together: groups side by side, neighbours in length."""
        lengths = self.prompt_mask[rows].sum(1)
        group = self.group_ids[rows]
        by_group = group.argsort(stable=True)
        order = by_group[lengths[by_group].argsort(descending=True, stable=True)]
        return list(rows[order].split(size))
