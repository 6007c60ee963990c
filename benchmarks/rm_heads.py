"""Heads trained on cached hidden states in several ways, and how well they rank prompts that they did not see.

Used by rm_quality.py. A trainer takes features, the parts to train and to validate on and the settings of the head, and
gives the head's tensors, for raw hidden states, as `rm train` would save them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer_features import LayerFeatures
from ups_rm.reward.feature_set import FeatureInfo, FeatureSet, ordered_pairs
from ups_rm.reward.head import TrainableHead, calibrate, fit, head_logits, split_prompts
from ups_rm.reward.head_metrics import auc, cluster_interval, pair_wins
from ups_rm.reward.head_objective import HeadSettings, Part, part_of
from ups_rm.reward.render import RenderPolicy

FOLDS = 5
N_RESAMPLES = 2000
LINEAR_L2 = 0.003  # on standardised states, each divided by sqrt(H)


@dataclass(frozen=True)
class Figures:
    """Ranking of held-out texts and pairs by one head; intervals 95%, resampling prompts."""

    auc: float
    auc_ci95: tuple[float, float]
    pairwise: float
    pairwise_ci95: tuple[float, float]
    auc_gain_ci95: tuple[float, float] | None = None
    pairwise_gain_ci95: tuple[float, float] | None = None


def feature_set(layers: LayerFeatures, layer: int, *poolings: str) -> FeatureSet:
    """What `rm features` would have written for this layer and pooling."""
    hidden = layers.of(layer, *poolings)
    info = FeatureInfo("", "", hidden.shape[1], "float16", RenderPolicy(), "", (), pooling="+".join(poolings))
    truncated = torch.zeros(len(hidden), dtype=torch.uint8)
    return FeatureSet(hidden=hidden, tokens=layers.tokens, truncated=truncated, info=info, **layers.texts.labels)


def folds_of(features: FeatureSet, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(train, validation, test) prompt ids of each fold; validation is a tenth of what is not tested on."""
    parts = split_prompts(features.prompt_id, (1 / FOLDS,) * (FOLDS - 1), seed)
    folds = []
    for test in parts:
        rest = torch.cat([part for part in parts if part is not test])
        validation, train = split_prompts(rest, (0.1,), seed + 1)
        folds.append((train, validation, test))
    return folds


Trainer = Callable[[FeatureSet, Part, Part, HeadSettings], dict[str, Tensor]]


def plain_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """The head as `rm train` makes it."""
    return fit(features.hidden, train, validation, settings, False)[0].folded()


def linear_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """The linear head with the least loss of `rm train` plus a small L2 penalty: what the states hold, linearly."""
    states = features.hidden[train.items]
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6) * states.shape[1] ** 0.5
    states = (states - mean) / scale
    differences = None
    if train.contrast is not None:
        pairs = (features.hidden[train.contrast] - mean) / scale  # (C, 2, H)
        differences = pairs[:, 0] - pairs[:, 1]
    weights = torch.zeros(states.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = states @ weights[:-1] + weights[-1]
        value = F.binary_cross_entropy_with_logits(logits, train.targets, weight=train.weights)
        if differences is not None:
            apart = F.softplus(-(differences @ weights[:-1])).mean()
            value = (1 - settings.contrast) * value + settings.contrast * apart
        value = value + LINEAR_L2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weights.detach()
    slope = found[:-1] / scale
    return {"output_layer.weight": slope[None], "output_layer.bias": found[-1:] - slope @ mean}


def out_of_fold(
    features: FeatureSet,
    settings: HeadSettings,
    *,
    trainer: Trainer = plain_head,
    labels: FeatureSet | None = None,
    share: float = 1.0,
    folds: Iterable[int] = range(FOLDS),
) -> Tensor:
    """Calibrated logit of each text by the head that did not see its prompt; NaN in folds left out. Shape (N,).

    Args:
        labels: the same features with other (noisy) labels to train on.
        share: of the training prompts that are used.
    """
    seen = labels or features
    logits = torch.full((features.texts,), torch.nan)
    every = folds_of(features)
    for fold in folds:
        train, validation, test = every[fold]
        train = train[: round(share * len(train))]
        parts = [part_of(seen, prompts, settings) for prompts in (train, validation)]
        tensors = trainer(seen, *parts, settings)
        temperature = calibrate(tensors, seen, validation, settings)
        held_out = torch.isin(features.prompt_id, test)
        logits[held_out] = head_logits(tensors, features.hidden[held_out], temperature=temperature)
    return logits


def figures(features: FeatureSet, logits: Tensor, baseline: Tensor | None = None) -> Figures:
    """AUC over texts and pairwise accuracy over pairs, of the texts that have a logit; gains over `baseline`."""
    known = logits.isfinite() & (features.unsafe.isfinite()) & (features.unsafe != 0.5)
    pairs, _ = ordered_pairs(features, by_flags=True)
    pairs = pairs[known[pairs].all(dim=1)]
    labels, prompts = features.unsafe[known], features.prompt_id[known]
    areas = bootstrap_auc(logits[known], labels, prompts)
    wins = pair_wins(logits, pairs)
    pair_prompts = features.prompt_id[pairs[:, 0]]
    result = Figures(
        auc=auc(logits[known], labels),
        auc_ci95=interval(areas),
        pairwise=wins.double().mean().item(),
        pairwise_ci95=cluster_interval(wins, pair_prompts),
    )
    if baseline is None:
        return result
    return replace(
        result,
        auc_gain_ci95=interval(areas - bootstrap_auc(baseline[known], labels, prompts)),
        pairwise_gain_ci95=cluster_interval(wins - pair_wins(baseline, pairs), pair_prompts),
    )


def bootstrap_auc(logits: Tensor, labels: Tensor, prompts: Tensor, seed: int = 0) -> Tensor:
    """AUC in resamples of whole prompts, the same resamples for every head. Shape (N_RESAMPLES,)."""
    order = logits.argsort()
    unsafe = (labels[order] > 0.5).double()
    _, group = torch.unique(prompts, return_inverse=True)
    group = group[order]
    count = int(group.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    areas = torch.empty(N_RESAMPLES, dtype=torch.float64)
    for i in range(N_RESAMPLES):
        drawn = torch.randint(count, (count,), generator=generator)
        weight = torch.bincount(drawn, minlength=count)[group].double()  # how often each text was drawn
        safe_below = ((1 - unsafe) * weight).cumsum(0)
        areas[i] = (unsafe * weight * safe_below).sum() / ((unsafe * weight).sum() * safe_below[-1])
    return areas


def interval(values: Tensor) -> tuple[float, float]:
    """The middle 95% of bootstrap values."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def gce_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """A head on generalized cross-entropy, (1 - p^q) / q with p the probability of the label (arXiv:1805.07836).

    Texts that the head finds implausible weigh less (p^q times their cross-entropy's gradient). Pairs of one prompt are
    compared with the same loss.
    """

    def loss(logits: Tensor, q: float = 0.7) -> Tensor:  # logits of the label being right
        return ((1 - logits.sigmoid().pow(q)) / q).mean()

    def of(head: TrainableHead, part: Part, rows: Tensor) -> Tensor:
        signs = torch.where(part.targets[rows] > 0.5, 1.0, -1.0)
        texts = loss(signs * head(features.hidden[part.items[rows]]))
        if part.contrast is None:
            return texts
        pairs = part.contrast[torch.randint(len(part.contrast), (len(rows),))]
        compared = head(features.hidden[pairs.flatten()]).view(-1, 2)
        return (1 - settings.contrast) * texts + settings.contrast * loss(compared[:, 0] - compared[:, 1])

    torch.manual_seed(settings.seed)
    known = features.hidden[train.items]
    head = TrainableHead(known.mean(0), known.std(0).clamp(min=1e-6), settings.hidden_dims, settings.dropout)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best, best_state, since = math.inf, copy.deepcopy(head.state_dict()), 0
    for _ in range(settings.max_epochs):
        head.train()
        for rows in torch.randperm(len(train)).split(settings.batch_size):
            optimizer.zero_grad()
            of(head, train, rows).backward()
            optimizer.step()
        head.eval()
        with torch.no_grad():
            validated = of(head, validation, torch.arange(len(validation))).item()
        since += 1
        if validated < best:
            best, best_state, since = validated, copy.deepcopy(head.state_dict()), 0
        if since >= settings.patience:
            break
    head.load_state_dict(best_state)
    return head.folded()


def trimmed_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """A head on the nine tenths of the training texts whose labels heads of the other prompts find most plausible."""
    prompts = features.prompt_id[train.items]
    first = torch.isin(prompts, prompts.unique()[::2])
    losses = torch.zeros(len(train))
    for own in (first, ~first):
        tensors = plain_head(features, only(train, ~own), validation, settings)
        logits = head_logits(tensors, features.hidden[train.items[own]])
        losses[own] = F.binary_cross_entropy_with_logits(logits, train.targets[own].round(), reduction="none")
    return plain_head(features, only(train, losses <= losses.quantile(0.9)), validation, settings)


def only(part: Part, chosen: Tensor) -> Part:
    """The chosen items of a part, and the pairs among them."""
    items, contrast = part.items[chosen], part.contrast
    if contrast is not None:
        contrast = contrast[torch.isin(contrast, items).all(dim=1)]
    return Part(items, part.targets[chosen], part.weights[chosen], contrast, part.helpful)
