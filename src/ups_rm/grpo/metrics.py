"""What one batch of replies says about the training, as a flat dict of numbers to log.

verl's names where verl has one, ours for what shows trouble. Every name is defined, with formula and unit, in
`docs/metrics.md`; a test keeps the two together. Metrics of the replies' *text* (refusals, distinct-n) are in
`ups_rm.evaluation.text`: this module sees tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SATURATED = 0.01
"""A safe score closer than this to an end of its range counts as saturated: the transform is flat there."""
ZERO_STD = 1e-6
"""A group whose scores have a std up to this has nothing to learn from (it is the eps of the advantage)."""
LOW_STD = 0.01
"""A group with a std below this is ranked by differences that may be the RM's noise."""


@torch.no_grad()
def rollout_metrics(
    *,
    token_level_scores: Tensor,
    token_level_rewards: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    prompt_lengths: Tensor,
    group_ids: Tensor,
    returns: Tensor | None = None,
    safe_score: Tensor | None = None,
    logits: Tensor | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
    kl: Tensor | None = None,
    truncated: Tensor | None = None,
    rm_truncated: Tensor | None = None,
    benign: Tensor | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
) -> dict[str, float]:
    """Metrics of one rollout after scoring and advantages.

    Args:
        token_level_scores, token_level_rewards, advantages, response_mask: Shape (B, R).
        prompt_lengths: tokens of each prompt without padding. Shape (B,).
        group_ids: Shape (B,).
        returns: default: the advantages, which is what they are for GRPO. Shape (B, R).
        safe_score: score before placing, so that empty replies count; default: row sums of the scores. Shape (B,).
        logits: of the RM, before the transform that made `safe_score`. Shape (B,).
        score_range: ends of the range of `safe_score`; near them it is saturated.
        kl: KL estimate per token, nats. Shape (B, R).
        truncated: the reply was cut by the length limit before an end token. Shape (B,).
        rm_truncated: the RM did not see the whole conversation. Shape (B,).
        benign: the prompt is harmless; splits the mean score in two. Shape (B,).
        max_prompt_length: default: the longest prompt here. max_response_length: default: R.

    Returns:
        Names of `docs/metrics.md` to floats. As in verl, score and reward statistics leave empty replies out and are
        nan if nothing is left.
    """
    lengths = response_mask.sum(-1).float()  # (B,)
    filled = lengths > 0
    tokens = response_mask.bool()
    sequence_scores = token_level_scores.sum(-1)
    sequence_rewards = token_level_rewards.sum(-1)
    returns = advantages if returns is None else returns
    width = response_mask.shape[-1] if max_response_length is None else max_response_length
    prompt_width = prompt_lengths.max() if max_prompt_length is None else max_prompt_length
    metrics = {
        **_mean_max_min("critic/score", sequence_scores[filled]),
        **_mean_max_min("critic/rewards", sequence_rewards[filled]),
        **_mean_max_min("critic/advantages", advantages[tokens]),
        **_mean_max_min("critic/returns", returns[tokens]),
        **_length_metrics("response_length", lengths, width),
        **_length_metrics("response_length_non_aborted", lengths[filled], width),
        "response/aborted_ratio": _mean(~filled),
        **_length_metrics("prompt_length", prompt_lengths, prompt_width),
        "reward/mean": _mean(sequence_rewards[filled]),
        "reward/std": _std(sequence_rewards[filled]),
        **score_metrics(sequence_scores if safe_score is None else safe_score, group_ids, benign, score_range),
    }
    if logits is not None:
        spreads = _group_stds(logits, group_ids)
        metrics |= {
            "group/logit_std_mean": _mean(spreads),
            "group/logit_zero_std_share": _mean(spreads <= ZERO_STD),
        }
    if kl is not None:
        metrics |= _kl_metrics(kl, response_mask)
    if truncated is not None:
        metrics["response/truncated_share"] = _mean(truncated)
    if rm_truncated is not None:
        metrics["score/rm_truncated_share"] = _mean(rm_truncated)
    return metrics


def timing_metrics(
    seconds: Mapping[str, float], *, num_prompt_tokens: int, num_response_tokens: int
) -> dict[str, float]:
    """Seconds per stage, and milliseconds per token for the stages whose work grows with tokens (verl's names).

    Args:
        seconds: stage -> seconds; "gen" is charged to response tokens, "ref", "values", "adv", "update_critic" and
            "update_actor" to prompt and response tokens, every other stage to none.
    """
    tokens = dict.fromkeys(
        ("ref", "values", "adv", "update_critic", "update_actor"), num_prompt_tokens + num_response_tokens
    )
    tokens["gen"] = num_response_tokens
    return {
        **{f"timing_s/{stage}": spent for stage, spent in seconds.items()},
        **{
            f"timing_per_token_ms/{stage}": 1000 * seconds[stage] / tokens[stage] if tokens[stage] else 0.0
            for stage in seconds.keys() & tokens.keys()
        },
    }


def throughput_metrics(*, total_num_tokens: int, seconds: float, n_devices: int = 1) -> dict[str, float]:
    """Tokens of one step (prompt and response), its seconds, and tokens per second and device (verl's names)."""
    return {
        "perf/total_num_tokens": float(total_num_tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": total_num_tokens / (seconds * n_devices),
    }


@torch.no_grad()
def model_metrics(model_logits: Sequence[Mapping[str, float]], group_ids: Tensor) -> dict[str, float]:
    """What each of several reward models says, before normalisation and weights.

    Args:
        model_logits: name of each model -> its unsafety logit, one mapping per reply; empty where there is one model.
        group_ids: Shape (B,).
    """
    metrics: dict[str, float] = {}
    for name in model_logits[0] if model_logits else ():
        logits = torch.tensor([of_reply[name] for of_reply in model_logits], device=group_ids.device)
        metrics[f"score/{name}/logit_mean"] = _mean(logits)
        metrics[f"score/{name}/logit_std"] = float(logits.std(correction=0))
        metrics[f"score/{name}/group_std_mean"] = _mean(_group_stds(logits, group_ids))
    return metrics


def _group_stds(values: Tensor, group_ids: Tensor) -> Tensor:
    """Unbiased std of each group of two or more, those that are nan left out."""
    groups = [values[group_ids == group] for group in torch.unique(group_ids)]
    spreads = torch.stack([group.float().std() for group in groups if len(group) > 1] or [torch.tensor(torch.nan)])
    return spreads[~spreads.isnan()]


def score_metrics(
    safe_score: Tensor,
    group_ids: Tensor,
    benign: Tensor | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Spread of the scores over the batch and within groups; arguments and names as in `rollout_metrics`."""
    low, high = score_range
    saturated = (safe_score < low + SATURATED) | (safe_score > high - SATURATED)
    known = _group_stds(safe_score, group_ids)
    metrics = {
        "score/std": _std(safe_score),
        "score/saturated_share": _mean(saturated),
        "group/std_mean": _mean(known),
        "group/zero_std_share": _mean(known <= ZERO_STD),
        "group/low_std_share": _mean(known < LOW_STD),
    }
    if benign is not None:
        metrics["score/mean_unsafe_prompts"] = _mean(safe_score[~benign.bool()])
        metrics["score/mean_benign_prompts"] = _mean(safe_score[benign.bool()])
    return metrics


def _kl_metrics(kl: Tensor, response_mask: Tensor) -> dict[str, float]:
    """verl's `actor/reward_kl_penalty` is the mean over each reply's tokens, then over all replies, empty ones as 0."""
    tokens = response_mask.bool()
    kl = torch.where(tokens, kl, torch.zeros_like(kl))
    per_sequence = kl.sum(-1)
    return {
        "kl/mean": _mean(kl[tokens]),
        "kl/seq_mean": _mean(per_sequence),
        "kl/seq_max": float(per_sequence.max()) if per_sequence.numel() else float("nan"),
        "actor/reward_kl_penalty": _mean(per_sequence / tokens.sum(-1).clamp_min(1)),
    }


def _mean_max_min(name: str, values: Tensor) -> dict[str, float]:
    empty = values.numel() == 0
    return {
        f"{name}/mean": _mean(values),
        f"{name}/max": float("nan") if empty else float(values.max()),
        f"{name}/min": float("nan") if empty else float(values.min()),
    }


def _length_metrics(name: str, lengths: Tensor, limit: Tensor | int) -> dict[str, float]:
    return {**_mean_max_min(name, lengths), f"{name}/clip_ratio": _mean(lengths == limit)}


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def _std(values: Tensor) -> float:
    """Unbiased; nan for fewer than two values (torch would warn)."""
    return float(values.float().std()) if values.numel() > 1 else float("nan")
