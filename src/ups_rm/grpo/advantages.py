"""How much better a reply was than the other replies to its prompt.

Each function takes token-level rewards (B, R), the response mask (B, R) and the group of each sequence (B,), and gives
advantages (B, R) that are 0 outside the mask. `ADVANTAGES` holds them by verl's names (`algorithm.adv_estimator`).
verl's `gae` needs a critic, `remax` a greedy baseline rollout: they are not here; several
rewards (`gdpo`) are in objectives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

AdvantageFunction = Callable[..., Tensor]


@torch.no_grad()
def group_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    *,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """GRPO outcome advantages: a reply's reward against the other replies to its prompt.

    A_i = (r_i - mean(r_group)) / (std(r_group) + eps), one value per sequence, repeated over its response tokens.
    std is the unbiased one. A group of one has mean 0 and std 1, so A = r / (1 + eps) (as verl does). A group whose
    rewards are all equal gets 0. With scale_by_std=False: A_i = r_i - mean(r_group), as in Dr. GRPO (arXiv:2503.20783).

    Args:
        token_level_rewards: reward per response token, usually non-zero at one token only. Shape (B, R).
        response_mask: 1 for tokens the policy generated, 0 for padding. Shape (B, R).
        group_ids: index of the prompt that each reply answers, any order. Shape (B,).

    Returns:
        Advantages, 0 where response_mask is 0. Shape (B, R).

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2; checked against verl's compute_grpo_outcome_advantage.
    """
    rewards = token_level_rewards.sum(-1)  # (B,)
    advantages = rewards.clone()
    for members in _groups(group_ids):
        group = rewards[members]
        if len(group) > 1:
            advantages[members] = group - group.mean()
        if scale_by_std:
            std = group.std() if len(group) > 1 else torch.ones_like(group[0])
            advantages[members] /= std + eps
    return advantages.unsqueeze(-1) * response_mask


@torch.no_grad()
def pass_at_k_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    *,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Only the best reply of a group is rewarded, with its lead over the second best, over the group's std.

    Raises:
        ValueError: if a group has fewer than two replies, as in verl.

    Shapes as in `group_advantages`. Source: arXiv:2503.19595; checked against verl's grpo_passk.
    """
    rewards = token_level_rewards.sum(-1)
    advantages = torch.zeros_like(rewards)
    for members in _groups(group_ids):
        group = rewards[members]
        if len(group) < 2:
            raise ValueError(
                f"grpo_passk needs at least 2 replies per prompt, group {int(group_ids[members[0]])} has 1"
            )
        best, second = torch.topk(group, 2).values
        lead = (best - second) / (group.std() + eps) if scale_by_std else best - second
        advantages[members[torch.topk(group, 2).indices[0]]] = lead
    return advantages.unsqueeze(-1) * response_mask


@torch.no_grad()
def leave_one_out_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, *, keep_single: bool = True
) -> Tensor:
    """RLOO: A_i = r_i - mean of the *other* rewards of the group.

    A group of one has A = r with keep_single (verl's rloo) and A = 0 without (verl's rloo_vectorized).
    Shapes as in `group_advantages`. Source: arXiv:2402.14740.
    """
    rewards = token_level_rewards.sum(-1)
    advantages = rewards.clone()
    for members in _groups(group_ids):
        group, n = rewards[members], len(members)
        if n > 1:
            advantages[members] = (group - group.mean()) * n / (n - 1)
        elif not keep_single:
            advantages[members] = 0
    return advantages.unsqueeze(-1) * response_mask


@torch.no_grad()
def length_weighted_advantages(token_level_rewards: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor:
    """OPO: A_i = r_i - sum(length * r) / sum(length) over the group; a group of one has A = r.

    Departs from verl in one place: a group of several replies that are all empty gets 0, where verl gets nan (0 / 0).
    Shapes as in `group_advantages`. Source: arXiv:2505.23585; checked against verl's opo.
    """
    rewards = token_level_rewards.sum(-1)
    lengths = response_mask.sum(-1).to(rewards.dtype)
    advantages = rewards.clone()
    for members in _groups(group_ids):
        if len(members) > 1:
            group, weights = rewards[members], lengths[members]
            advantages[members] = group - (weights * group).sum() / weights.sum().clamp_min(1)
    return advantages.unsqueeze(-1) * response_mask


@torch.no_grad()
def whitened_group_advantages(token_level_rewards: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor:
    """REINFORCE++ with a group baseline: r_i - mean(r_group), then whitened over all response tokens of the batch.

    Shapes as in `group_advantages`. Source: arXiv:2501.03262; checked against verl's reinforce_plus_plus_baseline.
    """
    centred = group_advantages(token_level_rewards, response_mask, group_ids, scale_by_std=False)
    return _whiten(centred, response_mask)


@torch.no_grad()
def whitened_return_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++: discounted sum of the rewards from each token on, whitened over all response tokens of the batch.

    The only estimator here in which tokens of one reply differ; groups play no part.
    Shapes as in `group_advantages`. Source: arXiv:2501.03262; checked against verl's reinforce_plus_plus.
    """
    mask = response_mask.to(token_level_rewards.dtype)
    returns = torch.zeros_like(token_level_rewards)
    running = token_level_rewards.new_zeros(token_level_rewards.shape[0])
    for t in reversed(range(token_level_rewards.shape[1])):
        here = token_level_rewards[:, t] + gamma * running
        returns[:, t] = here * mask[:, t]
        running = here * mask[:, t] + running * (1 - mask[:, t])
    return _whiten(returns, response_mask)


def _groups(group_ids: Tensor) -> Iterator[Tensor]:
    """Yield, group by group, the rows that belong to it, in their order."""
    for group in torch.unique(group_ids):
        yield torch.nonzero(group_ids == group).squeeze(-1)


def _whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / sqrt(unbiased variance + 1e-8) over the masked tokens; 0 outside the mask."""
    mask = mask.to(values.dtype)
    count = mask.sum()
    mean = (values * mask).sum() / count.clamp_min(1)
    variance = ((values - mean).square() * mask).sum() / (count - 1).clamp_min(1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


ADVANTAGES: Mapping[str, AdvantageFunction] = {
    "grpo": group_advantages,
    "grpo_vectorized": group_advantages,
    "grpo_passk": pass_at_k_advantages,
    "rloo": leave_one_out_advantages,
    "rloo_vectorized": partial(leave_one_out_advantages, keep_single=False),
    "opo": length_weighted_advantages,
    "reinforce_plus_plus": whitened_return_advantages,
    "reinforce_plus_plus_baseline": whitened_group_advantages,
}
"""verl's `algorithm.adv_estimator` names that work with one score per reply and no critic."""

SCALED = ("grpo", "grpo_vectorized", "grpo_passk")
"""Those that `scale_by_std` (verl's `norm_adv_by_std_in_grpo`) concerns."""

PER_REPLY = tuple(name for name in ADVANTAGES if name != "reinforce_plus_plus")
"""Those that give all tokens of a reply one advantage, as the group log takes it."""


def estimate_advantages(
    name: str, token_level_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, *, scale_by_std: bool = True
) -> Tensor:
    """Advantages by verl's name of the estimator; shapes as in `group_advantages`.

    Args:
        name: a key of `ADVANTAGES`.
        scale_by_std: for `SCALED`; the others know no such choice.
    """
    options = {"scale_by_std": scale_by_std} if name in SCALED else {}
    return ADVANTAGES[name](token_level_rewards, response_mask, group_ids, **options)
