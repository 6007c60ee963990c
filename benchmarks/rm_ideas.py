"""Cheap ideas on cached features against the best single head: concatenations, regularisers, ensembles, the judge.

Every idea is measured on the same folds as rm_quality.py's heads. The baseline is the MLP head on the mean of the
middle layer without the comparing loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rm_heads import Trainer, feature_set, out_of_fold
from benchmarks.rm_inputs import Finding, Inputs, shown
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.head_objective import HeadSettings, Part

NO_CONTRAST = HeadSettings(contrast=0.0)
WIDE = replace(NO_CONTRAST, hidden_dims=(1024, 256), dropout=0.7, weight_decay=1.0)


def whitened_head(components: int, l2: float) -> Trainer:
    """A logistic head on the first principal components of the training states, each scaled to variance 1."""

    def train(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
        states = features.hidden[train.items]
        mean = states.mean(0)
        _, scale, axes = torch.linalg.svd(states - mean, full_matrices=False)  # (K,), (K, H)
        whiten = axes[:components].T * (len(states) ** 0.5 / scale[:components])  # (H, components)
        inputs = (states - mean) @ whiten
        weights = torch.zeros(components + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = inputs @ weights[:-1] + weights[-1]
            value = F.binary_cross_entropy_with_logits(logits, train.targets, weight=train.weights)
            value = value + l2 / 2 * weights[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        found = weights.detach()
        slope = whiten @ found[:-1]
        return {"output_layer.weight": slope[None], "output_layer.bias": found[-1:] - slope @ mean}

    return train


def ideas_part(inputs: Inputs) -> Iterator[Finding]:
    """One row per idea, with gains over the baseline in the same resamples."""
    layers, middle = inputs.layers("real", template="chat"), inputs.layer
    judge = inputs.layers("real", template="judge")
    one = feature_set(layers, middle, "mean")
    baseline = out_of_fold(one, NO_CONTRAST)

    def row(name: str, logits: Tensor) -> Finding:
        return {"idea": name, **shown(one, logits, baseline)}

    yield {"idea": f"MLP, mean, layer {middle}, no contrast (baseline)", **shown(one, baseline)}

    def beside(*sets: FeatureSet) -> FeatureSet:
        return replace(one, hidden=torch.cat([each.hidden for each in sets], dim=1))

    at = [layer for layer in range(middle - 4, middle + 3, 2) if layer <= layers.states["mean"].shape[1]]
    last, reply = feature_set(layers, middle, "last"), feature_set(layers, middle, "reply")
    for name, features in (
        ("reply's mean", reply),
        ("mean and last token side by side", beside(one, last)),
        ("mean and reply's mean side by side", beside(one, reply)),
        (f"means of layers {at} side by side", beside(*(feature_set(layers, layer, "mean") for layer in at))),
        (f"means of layers {at} added", replace(one, hidden=torch.stack([layers.of(a, "mean") for a in at]).mean(0))),
    ):
        yield row(f"MLP on {name}", out_of_fold(features, NO_CONTRAST))
    yield row("MLP of 1024, 256, dropout 0.7, weight decay 1", out_of_fold(one, WIDE))
    for components in (64, 256):
        for l2 in (0.003, 0.03):
            logits = out_of_fold(one, NO_CONTRAST, trainer=whitened_head(components, l2))
            yield row(f"logistic on {components} whitened components, L2 {l2}", logits)

    def together(*members: Callable[[], Tensor]) -> Tensor:
        return torch.stack([member() for member in members]).mean(0)

    def seeded(features: FeatureSet, seeds: int) -> Tensor:
        return torch.stack([out_of_fold(features, replace(NO_CONTRAST, seed=seed)) for seed in range(seeds)]).mean(0)

    seeds = seeded(one, inputs.seeds)
    yield row(f"heads of {inputs.seeds} seeds, logits averaged", seeds)
    of_layers = together(*(lambda a=a: out_of_fold(feature_set(layers, a, "mean"), NO_CONTRAST) for a in at))  # type: ignore[misc]
    yield row(f"heads on layers {at}, logits averaged", of_layers)
    of_poolings = together(*(lambda f=f: out_of_fold(f, NO_CONTRAST) for f in (one, last, reply)))  # type: ignore[misc]
    yield row("heads on mean, last token, reply's mean, logits averaged", of_poolings)
    judged = {
        (pooling, contrast): out_of_fold(feature_set(judge, middle, pooling), replace(NO_CONTRAST, contrast=contrast))
        for pooling in ("mean", "last", "reply")
        for contrast in (0.0, 0.5)
    }
    for (pooling, contrast), logits in judged.items():
        yield row(f"judge template, MLP on {pooling}, contrast {contrast}", logits)
    of_judge = seeded(feature_set(judge, middle, "mean"), inputs.seeds)
    yield row(f"judge template, mean, {inputs.seeds} seeds averaged", of_judge)
    yield row("chat and judge template, mean, logits averaged", (seeds + of_judge) / 2)
    everything = torch.stack([seeds, of_layers, of_poolings, of_judge, judged["last", 0.0]]).mean(0)
    yield row("all of these ensembles, logits averaged", everything)
