"""GRPO as pure tensor functions: rewards, KL estimators, advantages, losses, metrics.

Tensors in, tensors or numbers out: no models, no files, no configuration objects, and no import from the rest of the
package, so that each formula can be read and tested alone. Every function is checked against verl 0.9.1 and a plain
Python loop (and the losses against TRL) in `tests/oracles`.

Dimension letters: P prompts in the batch, n replies per prompt, B = P * n sequences, R response tokens. A mask has
1 (or True) for tokens the policy generated and 0 for padding. All logarithms are natural: KL and entropy are in nats.
"""

from ups_rm.grpo.advantages import ADVANTAGES, PER_REPLY, estimate_advantages, group_advantages
from ups_rm.grpo.kl import KL_ESTIMATORS, AdaptiveKL, FixedKL, kl_penalty
from ups_rm.grpo.losses import (
    LOSS_AGG_MODES,
    TOKEN_LOSSES,
    PolicyLoss,
    aggregate,
    batch_totals,
    masked_mean,
    policy_loss,
)
from ups_rm.grpo.metrics import model_metrics, rollout_metrics, score_metrics, throughput_metrics, timing_metrics
from ups_rm.grpo.objectives import ORDERS, Combined, Component, Lagrange, combine
from ups_rm.grpo.rewards import overlong_penalty, penalize, place_on_last_token

__all__ = [
    "ADVANTAGES",
    "KL_ESTIMATORS",
    "LOSS_AGG_MODES",
    "ORDERS",
    "PER_REPLY",
    "TOKEN_LOSSES",
    "AdaptiveKL",
    "Combined",
    "Component",
    "FixedKL",
    "Lagrange",
    "PolicyLoss",
    "aggregate",
    "batch_totals",
    "combine",
    "estimate_advantages",
    "group_advantages",
    "kl_penalty",
    "masked_mean",
    "model_metrics",
    "overlong_penalty",
    "penalize",
    "place_on_last_token",
    "policy_loss",
    "rollout_metrics",
    "score_metrics",
    "throughput_metrics",
    "timing_metrics",
]
