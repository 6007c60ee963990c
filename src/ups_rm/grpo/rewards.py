"""From one safe score per reply to one reward per response token.

The sign is turned before this module: `safe_score = sigmoid(-logit)` is computed by the scorer, per sequence. Placing
it afterwards on one token keeps every other position exactly 0; a sigmoid *after* placing would put 0.5 everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_on_last_token(safe_score: Tensor, response_mask: Tensor) -> Tensor:
    """token_level_scores: each reply's score on its last generated token, exactly 0 everywhere else.

    A reply without EOS ends where generation stopped, so its score stands on the last generated token. An empty reply
    has no token to carry a score: its row is all zero.

    Args:
        safe_score: one score per sequence, in (0, 1). Shape (B,).
        response_mask: 1 for tokens the policy generated, 0 for padding (either side). Shape (B, R).

    Returns:
        token_level_scores, in the dtype of `safe_score`. Shape (B, R).
    """
    mask = response_mask.bool()
    tokens_from_here_on = mask.long().flip(-1).cumsum(-1).flip(-1)  # (B, R)
    is_last = mask & (tokens_from_here_on == 1)
    return torch.where(is_last, safe_score.unsqueeze(-1), torch.zeros_like(safe_score).unsqueeze(-1))


def penalize(token_level_scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """token_level_rewards = token_level_scores - kl_coef * KL, the KL counted on response tokens only.

    Args:
        token_level_scores: from `place_on_last_token`. Shape (B, R).
        kl: KL estimate per token in nats, from `kl_penalty`; what stands outside the mask is ignored. Shape (B, R).
        response_mask: Shape (B, R).
        kl_coef: verl's `algorithm.kl_ctrl.kl_coef`.

    Returns:
        token_level_rewards. Shape (B, R).

    Source: verl's apply_kl_penalty (trainer/ppo/ray_trainer.py, 0.9.1).
    """
    return token_level_scores - kl_coef * torch.where(response_mask.bool(), kl, torch.zeros_like(kl))


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float) -> Tensor:
    """DAPO's soft punishment of replies that use the last `buffer` tokens of what they may: from 0 to -factor.

    penalty = min(0, -factor * (length - (max_length - buffer)) / buffer)

    Args:
        lengths: response tokens. Shape (B,).
        max_length: `data.max_response_length`. buffer: 1 to max_length tokens.

    Returns:
        What to add to the reward, at most 0. Shape (B,), float32.

    Source: arXiv:2503.14476 eq. 13; checked against verl's DAPORewardManager.
    """
    over = (lengths - (max_length - buffer)).float()
    return torch.clamp(-factor * over / buffer, max=0.0)
