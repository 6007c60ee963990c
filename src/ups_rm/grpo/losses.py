"""The clipped policy loss and the ways of turning a loss per token into one number.

A mini batch may be cut into micro batches: give `aggregate` and `policy_loss` the totals of the whole mini batch
(`**batch_totals(mask_of_mini_batch)`) and the *sum* of the micro-batch losses, and so of their gradients, equals
the loss of the uncut mini batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
"""verl's `actor_rollout_ref.actor.loss_agg_mode`."""


class BatchTotals(TypedDict):
    """What a mini batch holds altogether: response tokens, and sequences that have at least one."""

    batch_num_tokens: int
    global_batch_size: int


@dataclass(frozen=True)
class PolicyLoss:
    """The policy loss of one (micro) batch and what its clipping did.

    `loss` carries the gradient; the others are detached scalars, means over this batch's response tokens:
    `clipfrac` share of tokens where the clipped ratio was the larger loss, `ppo_kl` mean of log pi_old - log pi (nats),
    `clipfrac_lower` share held by the dual clip. `num_tokens` counts the response tokens: weight by it when averaging
    over micro batches, and the average does not depend on how they were cut.
    """

    loss: Tensor
    clipfrac: Tensor
    ppo_kl: Tensor
    clipfrac_lower: Tensor
    num_tokens: Tensor


@dataclass(frozen=True)
class TokenLoss:
    """A loss per token, before it is aggregated, and what clipping did there. Shape (B, R) each.

    `loss` carries the gradient. `clipped`: the clip changed this token's loss. `held`: the dual clip did. `log_ratio`:
    log pi - log pi_old, in nats.
    """

    loss: Tensor
    clipped: Tensor
    held: Tensor
    log_ratio: Tensor


def ppo_token_loss(
    old_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> TokenLoss:
    """PPO's clipped objective with separate low and high clip, and dual clip for negative advantages.

    rho = exp(clamp(logprobs - old_logprobs, -20, 20));
        L = max(-A * rho, -A * clip(rho, 1 - low, 1 + high)), and where A < 0: L = min(L, -A * c).

    Raises:
        ValueError: clip_ratio_c <= 1.

    Source: arXiv:1707.06347 eq. 7; low and high apart: DAPO, arXiv:2503.14476; c: arXiv:1912.09729. Checked against
    verl's compute_policy_loss_vanilla and TRL's GRPO loss.
    """
    if clip_ratio_c <= 1.0:
        raise ValueError(f"clip_ratio_c must be greater than 1, got {clip_ratio_c}")
    log_ratio = torch.clamp(logprobs - old_logprobs, min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -advantages * clip_ratio_c
    loss = torch.where(advantages < 0, torch.minimum(ceiling, pessimistic), pessimistic)
    return TokenLoss(loss, clipped > unclipped, (pessimistic > ceiling) & (advantages < 0), log_ratio)


def gspo_token_loss(
    old_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> TokenLoss:
    """GSPO: the ratio is that of the whole reply, per token, so that a reply is clipped as one.

    s = exp(mean over the reply's tokens of (logprobs - old_logprobs)), the same value at each of its tokens; its
    gradient at token t is that of logprobs_t. The log is held at or below 10. L = max(-A s, -A clip(s, 1 - low,
    1 + high)); `clip_ratio_c` has no effect. The paper clips far closer (3e-4, 4e-4) and takes seq-mean-token-mean.

    Source: arXiv:2507.18071 eq. 5 and 14 (GSPO-token); checked against verl's compute_policy_loss_gspo.
    """
    log_ratio = logprobs - old_logprobs
    inside = torch.where(response_mask.bool(), log_ratio, torch.zeros_like(log_ratio))
    of_reply = inside.sum(-1, keepdim=True) / response_mask.sum(-1, keepdim=True).clamp_min(1)  # (B, 1)
    ratio = torch.exp(torch.clamp(logprobs - logprobs.detach() + of_reply.detach(), max=10.0))
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    changed = clipped > unclipped
    return TokenLoss(torch.maximum(unclipped, clipped), changed, torch.zeros_like(changed), log_ratio)


def cispo_token_loss(
    old_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> TokenLoss:
    """CISPO: the ratio is clipped as a weight without gradient, so no token loses its gradient by clipping.

    L = -sg(clip(rho, 1 - low, 1 + high)) * A * logprobs; `clip_ratio_c` has no effect. Its value is no objective to
    compare between steps; its gradient is.

    Source: arXiv:2506.13585 eq. 4; checked against verl's compute_policy_loss_cispo.
    """
    log_ratio = torch.clamp(logprobs - old_logprobs, min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    weight = torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high).detach()
    changed = ratio != weight
    return TokenLoss(-weight * advantages * logprobs, changed, torch.zeros_like(changed), log_ratio)


TOKEN_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "vanilla": ppo_token_loss,
    "gspo": gspo_token_loss,
    "cispo": cispo_token_loss,
}
"""By verl's names (`actor_rollout_ref.actor.policy_loss.loss_mode`); shapes as in `policy_loss`."""


def policy_loss(
    old_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    loss_mode: str = "vanilla",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
) -> PolicyLoss:
    """The policy loss of a (micro) batch: one of `TOKEN_LOSSES`, aggregated.

    Args:
        old_logprobs: log-probabilities when the replies were sampled, no gradient. Shape (B, R).
        logprobs: log-probabilities now, with gradient. Shape (B, R).
        advantages: Shape (B, R).
        response_mask: 1 for tokens that count. Shape (B, R).
        loss_mode: a key of `TOKEN_LOSSES`.
        clip_ratio_low, clip_ratio_high: how far the ratio may fall below or rise above 1.
        clip_ratio_c: upper bound of the ratio where A < 0; more than 1. Of `vanilla` only.
        loss_agg_mode, loss_scale_factor, batch_num_tokens, global_batch_size: see `aggregate`.

    Raises:
        ValueError: clip_ratio_c <= 1, or an unknown loss_mode or loss_agg_mode.
    """
    if loss_mode not in TOKEN_LOSSES:
        raise ValueError(f'"{loss_mode}" is not a loss_mode; known: {", ".join(TOKEN_LOSSES)}')
    found = TOKEN_LOSSES[loss_mode](
        old_logprobs,
        logprobs,
        advantages,
        response_mask,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_c=clip_ratio_c,
    )
    loss = aggregate(
        found.loss,
        response_mask,
        loss_agg_mode,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
    )
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            clipfrac=masked_mean(found.clipped.float(), response_mask),
            ppo_kl=masked_mean(-found.log_ratio, response_mask),
            clipfrac_lower=masked_mean(found.held.float(), response_mask),
            num_tokens=response_mask.sum(),
        )


def aggregate(
    loss_mat: Tensor,
    mask: Tensor,
    mode: str,
    *,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """One number from a loss per token. Tokens outside the mask count for nothing, even if nan stands there.

    - "token-mean": sum over all tokens / batch_num_tokens. Long replies weigh more (DAPO, arXiv:2503.14476, eq. 12).
    - "token-sum": sum over all tokens.
    - "seq-mean-token-sum": sum over each reply's tokens, mean over replies.
    - "seq-mean-token-sum-norm": the same / loss_scale_factor, a constant such as the longest allowed reply (Dr. GRPO,
      arXiv:2503.20783).
    - "seq-mean-token-mean": mean over each reply's tokens, mean over replies (the GRPO paper).

    Args:
        loss_mat: Shape (B, R).
        mask: 1 for tokens that count. Shape (B, R).
        mode: one of `LOSS_AGG_MODES`.
        batch_num_tokens: tokens in the whole mini batch; default: in this mask.
        global_batch_size: replies in the whole mini batch; default: rows of this mask with at least one token.
        loss_scale_factor: default R, this mask's width, which changes with padding: give it with micro batches.

    Returns:
        A scalar; 0 if the mask is empty and no totals are given (verl divides 0 by 0 there).

    Raises:
        ValueError: for an unknown mode.

    Source: checked against verl's agg_loss.
    """
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f'"{mode}" is not a loss_agg_mode; known: {", ".join(LOSS_AGG_MODES)}')
    keep = mask.bool()
    per_sequence = torch.where(keep, loss_mat, torch.zeros_like(loss_mat)).sum(-1)  # (B,)
    tokens = keep.sum(-1)  # (B,)
    if mode == "token-sum":
        return per_sequence.sum()
    if mode == "token-mean":
        return per_sequence.sum() / (tokens.sum().clamp_min(1) if batch_num_tokens is None else batch_num_tokens)
    replies = (tokens > 0).sum().clamp_min(1) if global_batch_size is None else global_batch_size
    if mode == "seq-mean-token-mean":
        return (per_sequence / tokens.clamp_min(1)).sum() / replies
    loss = per_sequence.sum() / replies
    if mode == "seq-mean-token-sum-norm":
        loss = loss / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return loss


def batch_totals(response_mask: Tensor) -> BatchTotals:
    """Totals of a mini batch, to hand to every one of its micro batches: `aggregate(..., **batch_totals(mask))`.

    Never less than 1, so that a mini batch of nothing but empty replies has loss 0.

    Args:
        response_mask: of the whole mini batch. Shape (B, R).
    """
    tokens = response_mask.bool().sum(-1)
    return {
        "batch_num_tokens": max(1, int(tokens.sum())),
        "global_batch_size": max(1, int((tokens > 0).sum())),
    }


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values inside the mask, 0 if it is empty. A scalar."""
    keep = mask.bool()
    return torch.where(keep, values, torch.zeros_like(values)).sum() / keep.sum().clamp_min(1)
