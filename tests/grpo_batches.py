"""Batches for the tests of grpo/: drawn by hypothesis, and the edge cases by name.

Values are float64, so that agreement with an oracle to 1e-6 is about the formula and not about the order of additions;
tests that need float32 say so. Replies have any length from 0 to the full width, scores may tie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What GRPO works on; shapes (B,) and (B, R)."""

    mask: Tensor
    group_ids: Tensor
    safe_score: Tensor
    token_level_scores: Tensor
    token_level_rewards: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    prompt_lengths: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        floats = {name: value.to(dtype) for name, value in vars(self).items() if value.is_floating_point()}
        return replace(self, **floats)


def make_batch(lengths: list[int], group_ids: list[int], width: int, *, seed: int = 0, ties: bool = False) -> Batch:
    """A batch with these reply lengths (0..width) and groups; scores on the last token, KL on every token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)).long()
    safe_score = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    if ties:
        safe_score = (safe_score * 2).round() / 2  # 0, 0.5 or 1: groups without any variance are frequent
    scores = torch.zeros(shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        if length:
            scores[row, length - 1] = safe_score[row]
    old = -normal().abs()
    rewards = scores if ties else scores - 0.1 * normal() * mask
    return Batch(
        mask=mask,
        group_ids=torch.tensor(group_ids),
        safe_score=safe_score,
        token_level_scores=scores,
        token_level_rewards=rewards,
        advantages=normal() * mask,
        old_logprobs=old,
        logprobs=old + 0.7 * normal(),
        ref_logprobs=old + 0.7 * normal(),
        prompt_lengths=torch.randint(1, 9, (len(lengths),), generator=generator),
    )


@st.composite
def batches(draw: st.DrawFn, min_group: int = 1) -> Batch:
    sizes = draw(st.lists(st.integers(min_group, 5), min_size=1, max_size=5))
    group_ids = draw(st.permutations([7 * g for g, size in enumerate(sizes) for _ in range(size)]))
    width = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, width), min_size=len(group_ids), max_size=len(group_ids)))
    return make_batch(lengths, list(group_ids), width, seed=draw(st.integers(0, 2**31)), ties=draw(st.booleans()))


def _with_hole() -> Batch:
    """A tool's answer inside the reply: the mask is 0 in the middle."""
    batch = make_batch([5, 4, 5, 3], [0, 0, 1, 1], 5)
    mask = batch.mask.clone()
    mask[0, 1:3] = 0
    keep = mask.bool()
    return replace(
        batch, mask=mask, token_level_rewards=batch.token_level_rewards * keep, advantages=batch.advantages * keep
    )


def _far_apart() -> Batch:
    """Policies that have drifted: ratios far beyond every clip, and beyond the clamp at exp(20)."""
    batch = make_batch([4, 4, 3, 2], [0, 0, 1, 1], 4, seed=3)
    return replace(batch, logprobs=batch.old_logprobs + 40 * (batch.logprobs - batch.old_logprobs))


EDGE_CASES: dict[str, Batch] = {
    "one reply in all": make_batch([3], [4], 5),
    "single-sample groups": make_batch([3, 2, 4], [0, 1, 2], 5, seed=1),
    "zero-variance group": replace(
        make_batch([3, 2, 4, 1], [0, 0, 0, 0], 4),
        token_level_rewards=make_batch([3, 2, 4, 1], [0, 0, 0, 0], 4, ties=True).token_level_scores.sign() * 0.3,
    ),
    "empty response": make_batch([3, 0, 4, 2], [0, 0, 1, 1], 4, seed=2),
    "no EOS, cut at the limit": make_batch([4, 4, 4, 4], [0, 0, 1, 1], 4, seed=4),
    "padded rows": make_batch([0, 0, 4, 2, 0, 0], [0, 0, 1, 1, 2, 2], 4, seed=5),
    "one token wide": make_batch([1, 1, 0, 1], [3, 3, 1, 1], 1, seed=6),
    "hole in the mask": _with_hole(),
    "far from the old policy": _far_apart(),
}
