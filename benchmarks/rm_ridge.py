"""Ridge heads in closed form: they train in a second, so many views of the cached states can be compared, and added up.

A view is what a head is given: states of some layers under some poolings side by side, whitened components of them, or
a Gaussian kernel on them. The penalty of each is chosen inside the training prompts (three inner folds by prompt), and
so is the view in the row "chosen", which is what choosing among all of these is worth on prompts that were not seen;
the best row of the table is not. Unlike the MLP a ridge head needs no validation prompts to stop, and trains on them.

N texts, D inputs, n training texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.layer_features import LayerFeatures
from benchmarks.rm_heads import feature_set, folds_of, out_of_fold
from benchmarks.rm_inputs import Finding, Inputs, shown
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.head import split_prompts
from ups_rm.reward.head_metrics import auc
from ups_rm.reward.head_objective import HeadSettings

PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Per training text, for a kernel whose diagonal is 1 on average."""
INNER = 3
Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class View:
    """`kernel(states, training rows)`: between all texts, shape (N, N); its training diagonal is 1 on average."""

    name: str
    states: Tensor  # (N, D)
    kernel: Kernel


def linear(states: Tensor, train: Tensor) -> Tensor:
    """Inner products of standardised states."""
    known = states[train]
    x = (states - known.mean(0)) / known.std(0).clamp(min=1e-6)
    return _scaled(x @ x.T, train)


def whitened(components: int) -> Kernel:
    """Inner products of the first principal components of the training states, each scaled to variance 1."""

    def kernel(states: Tensor, train: Tensor) -> Tensor:
        known = states[train] - states[train].mean(0)
        values, axes = torch.linalg.eigh(known.T @ known / len(known))
        x = (states - states[train].mean(0)) @ (axes[:, -components:] / values[-components:].clamp(min=1e-9).sqrt())
        return _scaled(x @ x.T, train)

    return kernel


def gaussian(states: Tensor, train: Tensor) -> Tensor:
    """exp(-|x - y|^2 / median), of standardised states."""
    known = states[train]
    x = (states - known.mean(0)) / known.std(0).clamp(min=1e-6)
    squares = x.square().sum(1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    return torch.exp(-distances / distances[train][:, train].median())


def _scaled(kernel: Tensor, train: Tensor) -> Tensor:
    return kernel / kernel.diagonal()[train].mean()


def predictions(kernel: Tensor, targets: Tensor, train: Tensor, penalty: float) -> Tensor:
    """Least squares on targets of -1 and 1 with an L2 penalty, for all texts. Shape (N,)."""
    own = kernel[train][:, train]
    centre = targets[train].mean()
    system = own + penalty * len(train) * torch.eye(len(train), dtype=own.dtype)
    weights = torch.cholesky_solve((targets[train] - centre)[:, None], torch.linalg.cholesky(system))
    return (kernel[:, train] @ weights)[:, 0] + centre


def ridge_out_of_fold(features: FeatureSet, view: View) -> tuple[Tensor, Tensor]:
    """Prediction of each text by the head that did not see its prompt, (N,), and the inner AUC in each fold, (5,)."""
    labels = features.unsafe
    known = labels.isfinite() & (labels != 0.5)
    targets = torch.where(labels > 0.5, 1.0, -1.0).float()
    found, inner_areas = torch.full((features.texts,), torch.nan), []
    for train_prompts, validation_prompts, test_prompts in folds_of(features):
        prompts = torch.cat([train_prompts, validation_prompts])
        train = (torch.isin(features.prompt_id, prompts) & known).nonzero()[:, 0]
        kernel = view.kernel(view.states, train)
        areas = torch.zeros(len(PENALTIES))
        for held in split_prompts(prompts, (1 / INNER,) * (INNER - 1), 7):
            outside = torch.isin(features.prompt_id[train], held)
            rows, rest = train[outside], train[~outside]
            for i, penalty in enumerate(PENALTIES):
                areas[i] += auc(predictions(kernel, targets, rest, penalty)[rows], labels[rows]) / INNER
        best = int(areas.argmax())
        test = torch.isin(features.prompt_id, test_prompts)
        found[test] = predictions(kernel, targets, train, PENALTIES[best])[test]
        inner_areas.append(float(areas[best]))
    return found, torch.tensor(inner_areas)


def views_of(layers: LayerFeatures, middle: int) -> list[View]:
    """What is compared."""
    deepest = layers.states["mean"].shape[1]
    at = [layer for layer in range(middle - 4, middle + 5, 2) if 0 < layer <= deepest]

    def beside(*parts: tuple[int, str]) -> Tensor:
        return torch.cat([layers.of(layer, pooling) for layer, pooling in parts], dim=1)

    one = layers.of(middle, "mean")
    every = beside(*((layer, pooling) for layer in at for pooling in ("last", "mean", "reply")))
    return [
        *(View(f"mean, layer {layer}", layers.of(layer, "mean"), linear) for layer in at),
        *(View(f"last token, layer {layer}", layers.of(layer, "last"), linear) for layer in at[2:]),
        *(View(f"reply's mean, layer {layer}", layers.of(layer, "reply"), linear) for layer in at[1:4]),
        View(f"mean and last, layer {middle}", layers.of(middle, "mean", "last"), linear),
        View(f"mean and reply's mean, layer {middle}", layers.of(middle, "mean", "reply"), linear),
        View(f"means of layers {at}", beside(*((layer, "mean") for layer in at)), linear),
        View(f"reply's means of layers {at}", beside(*((layer, "reply") for layer in at)), linear),
        View(f"mean and last of layers {at}", beside(*((a, p) for a in at for p in ("mean", "last"))), linear),
        View(f"mean, last, reply's mean of layers {at}", every, linear),
        *(View(f"{k} whitened components of the mean, layer {middle}", one, whitened(k)) for k in (32, 64, 128, 256)),
        View(f"Gaussian kernel on the mean, layer {middle}", one, gaussian),
        View(f"Gaussian kernel on mean, last, reply's mean of layers {at}", every, gaussian),
    ]


def ridge_part(inputs: Inputs) -> Iterator[Finding]:
    """Every view, ensembles of them, the nested choice, and sums with the MLP; gains over the best MLP head."""
    layers, middle = inputs.layers("real"), inputs.layer
    one = feature_set(layers, middle, "mean")
    settings = HeadSettings(contrast=0.0)
    mlp = out_of_fold(one, settings)
    yield {"head": f"MLP, mean, layer {middle}, no contrast (baseline)", **shown(one, mlp)}
    found: dict[str, Tensor] = {}
    inner: list[Tensor] = []
    for view in views_of(layers, middle):
        found[view.name], areas = ridge_out_of_fold(one, view)
        inner.append(areas)
        yield {"head": f"ridge, {view.name}", **shown(one, found[view.name], mlp)}
    yield {"head": "ridge, view chosen inside the training prompts", **shown(one, chosen(one, found, inner), mlp)}

    def average(*parts: Tensor) -> Finding:
        return shown(one, torch.stack([in_stds(one, part) for part in parts]).mean(0), mlp)

    of_means = [logits for name, logits in found.items() if name.startswith("mean, layer")]
    yield {"head": "ridge, average over the layers' means", **average(*of_means)}
    yield {"head": "ridge, average over all views", **average(*found.values())}
    yield {"head": "MLP and the average over all ridge views", **average(mlp, torch.stack([*found.values()]).mean(0))}
    more = [out_of_fold(one, replace(settings, seed=seed)) for seed in range(1, inputs.seeds)]
    yield {"head": f"MLP, average of {inputs.seeds} seeds", **average(mlp, *more)}
    others = [
        out_of_fold(feature_set(layers, layer, "mean"), settings) for layer in (middle - 4, middle - 2, middle + 2)
    ]
    yield {"head": "MLP, average over four layers' means", **average(mlp, *others)}
    reply = out_of_fold(feature_set(layers, middle, "reply"), settings)
    everything = average(mlp, *more, *others, reply, *found.values())
    yield {"head": "average of all these heads", **everything}


def chosen(features: FeatureSet, found: dict[str, Tensor], inner: Sequence[Tensor]) -> Tensor:
    """In each fold the predictions of the view with the greatest inner AUC. Shape (N,)."""
    logits = torch.full((features.texts,), torch.nan)
    views = list(found.values())
    for fold, (_, _, test_prompts) in enumerate(folds_of(features)):
        test = torch.isin(features.prompt_id, test_prompts)
        best = max(range(len(views)), key=lambda i: float(inner[i][fold]))
        logits[test] = views[best][test]
    return logits


def in_stds(features: FeatureSet, logits: Tensor) -> Tensor:
    """Logits less their mean, over their std, by fold: heads of other scales can be averaged. Labels are not seen."""
    scaled = torch.full_like(logits, torch.nan)
    for _, _, test_prompts in folds_of(features):
        test = torch.isin(features.prompt_id, test_prompts)
        scaled[test] = (logits[test] - logits[test].mean()) / logits[test].std()
    return scaled
