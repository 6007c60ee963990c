"""How good a reward model's logits are: ranking, decisions, calibration. Pure functions of tensors on the CPU.

Everywhere: logit = degree of unsafety, label 1 = unsafe. Overall and by harm category; a category's texts are all
replies to prompts that drew at least one reply flagged with it, so that safe and unsafe stand against each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15
MIN_TEXTS = 10  # a category with fewer labelled texts gets no figures: they would be noise
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Quality:
    """Figures over one group of texts; NaN where there is nothing to compute from.

    auc: chance that an unsafe text has a higher logit than a safe one (ties count half).
    accuracy: share of texts on the right side of logit 0. balanced_accuracy: mean over the two classes.
    ece: expected calibration error of sigmoid(logit), 15 equal bins.
    pairwise_accuracy: share of pairs whose less safe reply has the higher logit (ties half), with a 95% interval by
        bootstrap over prompts (replies to one prompt are not independent).
    """

    texts: int
    unsafe_share: float
    auc: float
    accuracy: float
    balanced_accuracy: float
    ece: float
    pairs: int
    pairwise_accuracy: float
    pairwise_ci95: tuple[float, float] = (math.nan, math.nan)
    by_category: dict[str, Quality] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: NaN becomes None, figures have 4 decimals."""

        def plain(value: Any) -> Any:
            if isinstance(value, Quality):
                return value.as_dict()
            if isinstance(value, dict):
                return {key: plain(one) for key, one in value.items()}
            if isinstance(value, tuple):
                return [plain(one) for one in value]
            if isinstance(value, float):
                return round(value, 4) if math.isfinite(value) else None
            return value

        values = {name: plain(value) for name, value in vars(self).items()}
        if not self.by_category:
            del values["by_category"]
        return values


def auc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve by rank sums, ties counting half. NaN with one class only. Shapes (N,), (N,)."""
    unsafe = labels > 0.5
    n_unsafe, n_safe = int(unsafe.sum()), int((~unsafe).sum())
    if not n_unsafe or not n_safe:
        return math.nan
    _, inverse, counts = torch.unique(logits.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_rank = ends - (counts.double() - 1) / 2  # ranks from 1; equal logits share their mean rank
    rank_sum = mean_rank[inverse][unsafe].sum().item()
    return (rank_sum - n_unsafe * (n_unsafe + 1) / 2) / (n_unsafe * n_safe)


def pair_wins(logits: Tensor, pairs: Tensor) -> Tensor:
    """1 where the less safe reply has the higher logit, 0.5 for a tie, else 0; pairs are (safer, less safe). (K,)."""
    difference = logits[pairs[:, 1]] - logits[pairs[:, 0]]
    return (difference.sign() + 1) / 2


def accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of texts with logit > 0 exactly when unsafe; and the mean of that over the two classes."""
    right = (logits > 0) == (labels > 0.5)
    classes = [right[labels > 0.5], right[labels <= 0.5]]
    balanced = [part.double().mean().item() for part in classes if len(part)]
    if not balanced:
        return math.nan, math.nan
    return right.double().mean().item(), sum(balanced) / len(balanced)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Sum over equal bins of P(unsafe) of (share of texts) * |mean probability - share of unsafe|. NaN if empty."""
    if not len(logits):
        return math.nan
    probability = logits.double().sigmoid()
    place = (probability * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, probability - labels.double())
    return (gaps.abs().sum() / len(logits)).item()


def cluster_interval(
    values: Tensor, groups: Tensor, *, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(values), resampling whole groups (prompts). Shapes (K,), (K,)."""
    if not len(values):
        return math.nan, math.nan
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, values.double())
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(n_resamples, dtype=torch.float64)
    for i in range(n_resamples):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def curves(logits: Tensor, labels: Tensor, *, bins: int = ECE_BINS) -> dict[str, Any]:
    """What the plots of a model card are drawn from: labelled texts only, 0.5 (contradictory) left out. Shapes (N,).

    roc: [false positive rate, true positive rate] at every distinct logit, highest first, at most 200 points.
    reliability: [mean sigmoid(logit), share of unsafe texts, texts] of each bin that is not empty.
    histogram: edges of the logit's bins, texts of each class in them.
    """
    known = labels.isfinite() & (labels != 0.5) & logits.isfinite()
    x, unsafe = logits[known].double(), labels[known] > 0.5
    if not len(x) or not unsafe.any() or unsafe.all():
        return {}
    order = x.argsort(descending=True)
    last_of_its_kind = torch.cat([x[order].diff() != 0, torch.tensor([True])])
    rates = torch.stack([(~unsafe)[order].cumsum(0) / (~unsafe).sum(), unsafe[order].cumsum(0) / unsafe.sum()], dim=1)
    points = torch.cat([torch.zeros(1, 2), rates[last_of_its_kind].float()])
    kept = torch.linspace(0, len(points) - 1, min(200, len(points))).round().long()
    probability = x.sigmoid()
    place = (probability * bins).long().clamp(max=bins - 1)
    reliability = [
        [probability[place == b].mean().item(), unsafe[place == b].double().mean().item(), int((place == b).sum())]
        for b in place.unique().tolist()
    ]
    edges = torch.linspace(x.min().item(), x.max().item() + 1e-6, 31, dtype=torch.float64)
    classes = {name: x[part] for name, part in (("safe", ~unsafe), ("unsafe", unsafe))}
    counts = {name: torch.histogram(part, edges).hist.long().tolist() for name, part in classes.items()}
    return {
        "roc": [[round(value, 4) for value in point] for point in points[kept].tolist()],
        "reliability": [[round(value, 4) for value in one] for one in reliability],
        "histogram": {"edges": [round(edge, 4) for edge in edges.tolist()], **counts},
    }


def fit_temperature(logits: Tensor, labels: Tensor, *, shift: bool = False) -> tuple[float, float]:
    """(T, b) that minimise the cross-entropy of sigmoid((logit + b) / T) against labels in [0, 1].

    Without `shift`, b = 0. T stays within [0.05, 20]; (1, 0) if a class is missing.
    Source: Guo et al., arXiv:1706.04599; with shift: Platt scaling.
    """
    labels = labels.double()
    if not len(labels) or labels.max() <= 0.5 or labels.min() > 0.5:
        return 1.0, 0.0
    x = logits.double()
    spread = x.std().clamp(min=1e-6) if shift else torch.tensor(1.0, dtype=torch.float64)
    # a convex problem in (1/T, b/T); started at the scale of the logits
    parameters = torch.tensor(
        [1 / spread.item(), -x.mean().item() / spread.item() if shift else 0.0], dtype=torch.float64
    )
    parameters.requires_grad_(True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        slope, offset = parameters[0], parameters[1] if shift else torch.zeros((), dtype=torch.float64)
        value = F.binary_cross_entropy_with_logits(slope * x + offset, labels)
        value.backward()
        return value

    optimizer.step(loss)
    slope, offset = parameters.tolist()
    low, high = _TEMPERATURES
    if not math.isfinite(slope) or slope <= 1 / high:  # logits that say nothing, or the opposite
        return (high, 0.0) if not shift else (high, -x.mean().item())
    temperature = min(max(1 / slope, low), high)
    return temperature, offset / slope if shift else 0.0


def class_weights(labels: Tensor) -> Tensor:
    """Weights with mean 1 that give safe and unsafe texts the same total. Soft labels count for both. Shape (N,)."""
    unsafe = labels.mean().clamp(1e-6, 1 - 1e-6)
    return labels * 0.5 / unsafe + (1 - labels) * 0.5 / (1 - unsafe)


def quality(
    logits: Tensor,
    labels: Tensor,
    pairs: Tensor,
    prompt_id: Tensor,
    category_bits: Tensor,
    categories: Sequence[str] = (),
    *,
    seed: int = 0,
) -> Quality:
    """All figures of a group of texts.

    Args:
        logits: shape (N,). labels: share of unsafe labels, NaN for unknown, shape (N,); 0.5 (contradictory) counts as
            unknown here.
        pairs: indices (safer, less safe), shape (K, 2).
        prompt_id, category_bits: shape (N,). categories: name of each bit; no breakdown if empty.
    """
    known = labels.isfinite() & (labels != 0.5)
    wins = pair_wins(logits, pairs)
    right, balanced = accuracy(logits[known], labels[known])
    parts: dict[str, Quality] = {}
    for bit, name in enumerate(categories):
        flagged = (category_bits >> bit) & 1 == 1
        members = torch.isin(prompt_id, prompt_id[flagged].unique())
        if int((members & known).sum()) < MIN_TEXTS:
            continue
        new_index = members.long().cumsum(0) - 1
        kept = pairs[members[pairs].all(dim=1)] if len(pairs) else pairs
        parts[name] = quality(
            logits[members], labels[members], new_index[kept], prompt_id[members], category_bits[members], seed=seed
        )
    return Quality(
        texts=int(known.sum()),
        unsafe_share=labels[known].double().mean().item() if known.any() else math.nan,
        auc=auc(logits[known], labels[known]),
        accuracy=right,
        balanced_accuracy=balanced,
        ece=expected_calibration_error(logits[known], labels[known]),
        pairs=len(pairs),
        pairwise_accuracy=wins.double().mean().item() if len(pairs) else math.nan,
        pairwise_ci95=cluster_interval(wins, prompt_id[pairs[:, 0]], seed=seed) if len(pairs) else (math.nan, math.nan),
        by_category=parts,
    )
