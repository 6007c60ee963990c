"""KL of the policy from the frozen reference, estimated per token from the two log-probabilities of the sampled token.

Let d = log pi(token) - log pi_ref(token), tokens sampled from pi. All in nats. Also verl's two ways of steering
the coefficient of the KL in the reward: fixed, and adaptive towards a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BASE_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_ESTIMATORS = (*_BASE_ESTIMATORS, *(name + "+" for name in _BASE_ESTIMATORS))
"""Every estimator that `kl_penalty` computes, by verl's names."""


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(pi || pi_ref) per token.

    - "kl", "k1": d. Unbiased, can be negative.
    - "abs": |d|. Biased upwards.
    - "mse", "k2": d^2 / 2. Biased, but its gradient is an unbiased estimate of the gradient of the KL.
    - "low_var_kl", "k3": exp(-d) - 1 + d, -d held in [-20, 20] and the result in [-10, 10]. Unbiased, never negative.
    - any of them with "+": the value of that estimator and the gradient of k2 (straight-through), for KL in the loss.

    Args:
        logprobs: log-probability of each sampled token under the policy. Shape (B, R).
        ref_logprobs: the same under the reference. Shape (B, R).
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        The estimate in nats; gradients flow through `logprobs`. Shape (B, R).

    Raises:
        ValueError: for another name. verl's "full" is none either: it needs the logits over the whole vocabulary, and
            verl itself refuses it.

    Source: http://joschu.net/blog/kl-approx.html; checked against verl's kl_penalty.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f'"{estimator}" is not a KL estimator; known: {", ".join(KL_ESTIMATORS)}')
    value = _estimate(logprobs, ref_logprobs, estimator.removesuffix("+"))
    if not estimator.endswith("+"):
        return value
    k2 = 0.5 * (logprobs - ref_logprobs).square()
    return value.detach() + (k2 - k2.detach())


def _estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    difference = logprobs - ref_logprobs
    if estimator in ("kl", "k1"):
        return difference
    if estimator == "abs":
        return difference.abs()
    if estimator in ("mse", "k2"):
        return 0.5 * difference.square()
    negative = torch.clamp(-difference, min=-20, max=20)
    return torch.clamp(torch.exp(negative) - negative - 1, min=-10, max=10)


@dataclass
class FixedKL:
    """A KL coefficient that stays as it is (verl's `algorithm.kl_ctrl.type=fixed`)."""

    value: float

    def update(self, current_kl: float, n_sequences: int) -> None:
        """Leave the coefficient alone."""


@dataclass
class AdaptiveKL:
    """A KL coefficient that is steered so that the KL stays near `target` (verl's `algorithm.kl_ctrl.type=adaptive`).

    value <- value * (1 + clip(current / target - 1, -0.2, 0.2) * n_sequences / horizon), arXiv:1909.08593 section 2.2.
    """

    value: float
    target: float
    horizon: float

    def update(self, current_kl: float, n_sequences: int) -> None:
        """Move the coefficient after a batch of `n_sequences` with mean per-token KL `current_kl` (nats)."""
        error = min(max(current_kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_sequences / self.horizon
