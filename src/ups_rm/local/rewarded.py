"""From scores and log-probabilities to rewards and advantages: everything between the rollout and the update."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ups_rm.grpo import Combined, kl_penalty, penalize, place_on_last_token
from ups_rm.grpo.groups import flat_groups
from ups_rm.local.judged import Judged
from ups_rm.local.step_metrics import check_finite
from ups_rm.objective import Objective
from ups_rm.recipe import Recipe


@dataclass(frozen=True)
class Rewarded:
    """What B replies of up to R tokens are worth.

    Attributes:
        token_level_scores: the safe score on the last token. Shape (B, R).
        kl: estimate per token in nats, 0 where there is no reference. Shape (B, R).
        token_level_rewards: what the advantages are made of; for an objective of several components their weighted
            mean. Shape (B, R).
        advantages: 0 outside the response mask. Shape (B, R).
        flat: the rewards of the reply's group are equal, or its scores where those are masked. Shape (B,), bool.
        learns: the reply is in the loss. Shape (B,), bool.
        combined: of the usable replies, where the objective has several components.
        metrics: of the objective and the overlong penalty.
    """

    token_level_scores: Tensor
    kl: Tensor
    token_level_rewards: Tensor
    advantages: Tensor
    flat: Tensor
    learns: Tensor
    combined: Combined | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def rewarded(
    judged: Judged,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    benign: Tensor,
    *,
    objective: Objective,
    kl_coef: float,
    recipe: Recipe,
) -> Rewarded:
    """Rewards and advantages of a step.

    Args:
        old_logprobs, ref_logprobs: KL is 0 without them. Shape (B, R).
        benign: the prompt is harmless. Shape (B,), bool.
        kl_coef: what a nat costs; 0 where KL is not in the reward.

    Raises:
        NumberError: a reward is not finite. RMError: the objective needs a helpfulness model.
    """
    algorithm, usable, sequences = recipe.algorithm, judged.usable, judged.rollout.sequences
    mask = sequences.response_mask
    token_level_scores = place_on_last_token(judged.safe_score, mask)  # (B, R)
    kl = torch.zeros_like(token_level_scores)
    if old_logprobs is not None and ref_logprobs is not None:
        kl = kl_penalty(old_logprobs, ref_logprobs, algorithm.kl_penalty) * mask
    rewards = penalize(token_level_scores, kl, mask, kl_coef)
    check_finite("the rewards", rewards, mask)
    worth = objective.worth(  # a reply without a score counts in no mean and no std
        [score for score, known in zip(judged.scores, usable.tolist(), strict=True) if known],
        benign[usable],
        token_level_scores.sum(-1)[usable],
        rewards[usable],
        mask[usable],
        sequences.group_ids[usable],
    )
    rewards[usable], advantages = worth.rewards, torch.zeros_like(rewards)
    advantages[usable] = worth.advantages
    if worth.combined is None:
        # nothing but rounding would be divided by the std; with KL in the reward equal scores are not that yet
        flat = flat_groups(rewards.sum(-1), sequences.group_ids, usable, algorithm.zero_std_tolerance)
    else:
        flat = torch.zeros_like(usable)
        flat[usable] = worth.combined.flat
    if algorithm.zero_std_groups != "keep":
        flat = flat | judged.flat
    advantages[flat] = 0.0
    learns = usable if algorithm.zero_std_groups == "keep" else usable & ~flat
    return Rewarded(token_level_scores, kl, rewards, advantages, flat, learns, worth.combined, worth.metrics)
