"""Which replies of a batch can be learned from: those with a score, in groups that differ.

A reply without a score (the reward model failed on it) is left out of its group: mean and std are those of the others.
A group whose scores are equal says nothing about its replies; dividing by its std would turn rounding into advantages.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def usable_replies(scored: Tensor, group_ids: Tensor) -> Tensor:
    """Replies that have a score and another one in their group to be compared with. Shape (B,), bool.

    A group that had one reply from the start keeps it, as GRPO does.

    Args:
        scored: the reply has a score. Shape (B,), bool.
        group_ids: Shape (B,).
    """
    _, group = torch.unique(group_ids, return_inverse=True)
    replies = torch.bincount(group)
    left = torch.bincount(group[scored], minlength=len(replies))
    alone = (left == 1) & (replies > 1)
    return scored & ~alone[group]


@torch.no_grad()
def flat_groups(scores: Tensor, group_ids: Tensor, usable: Tensor, tolerance: float) -> Tensor:
    """Replies of groups of two or more whose usable scores have an unbiased std up to `tolerance`. Shape (B,), bool.

    The groups that DAPO filters (arXiv:2503.14476, eq. 11: 0 < right answers < n), for scores that are numbers.

    Args:
        scores: values outside `usable` do not matter. Shape (B,).
        group_ids: Shape (B,).
        usable: Shape (B,), bool.
    """
    flat = torch.zeros_like(usable)
    for group in torch.unique(group_ids):
        members = group_ids == group
        of_group = scores[members & usable]
        if len(of_group) > 1 and bool(of_group.double().std() <= tolerance):
            flat |= members
    return flat
