"""Ridge heads: the closed form is least squares with a penalty, whitening whitens, choosing sees no held-out label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from labelled_rows import make_rows
from tiny import tiny_backbone

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO)


def states_of(seed: int = 0, n: int = 60, d: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 3


def test_the_dual_is_the_ridge_regression_in_the_states() -> None:
    from benchmarks.rm_ridge import linear, predictions

    states, train = states_of().double(), torch.arange(40)
    targets = torch.where(torch.arange(60) % 3 > 0, 1.0, -1.0).double()
    found = predictions(linear(states, train), targets, train, 0.05)
    x = (states - states[train].mean(0)) / states[train].std(0)
    x = x / x[train].square().sum(1).mean().sqrt()
    centre = targets[train].mean()
    slope = torch.linalg.solve(x[train].T @ x[train] + 0.05 * 40 * torch.eye(7), x[train].T @ (targets[train] - centre))
    torch.testing.assert_close(found, x @ slope + centre)


def test_whitened_components_are_uncorrelated_and_alike() -> None:
    from benchmarks.rm_ridge import whitened

    states, train = states_of(1).double(), torch.arange(50)
    kernel = whitened(7)(states, train)
    known = states[train] - states[train].mean(0)
    covariance = known.T @ known / 50
    expected = (states - states[train].mean(0)) @ torch.linalg.solve(covariance, (states - states[train].mean(0)).T)
    torch.testing.assert_close(kernel, expected / expected.diagonal()[train].mean())
    values = torch.linalg.eigvalsh(whitened(3)(states, train)[train][:, train])
    assert (values > 1e-6).sum() == 3
    assert values[-1] == pytest.approx(values[-3].item())


def test_held_out_labels_do_not_change_held_out_predictions(tmp_path: Path) -> None:
    from dataclasses import replace

    from benchmarks.layer_features import layer_features
    from benchmarks.rm_heads import feature_set, folds_of
    from benchmarks.rm_ridge import View, chosen, gaussian, in_stds, linear, ridge_out_of_fold

    layers = layer_features(str(tiny_backbone(tmp_path / "backbone")), make_rows(40), tmp_path / "cache")
    assert layers is not None
    features = feature_set(layers, 2, "mean")
    test = torch.isin(features.prompt_id, folds_of(features)[0][2])
    lies = replace(features, unsafe=torch.where(test, 1 - features.unsafe, features.unsafe))
    found, inner = {}, []
    for kernel in (linear, gaussian):
        view = View(kernel.__name__, layers.of(2, "mean"), kernel)
        found[view.name], areas = ridge_out_of_fold(features, view)
        inner.append(areas)
        told, areas_told = ridge_out_of_fold(lies, view)
        assert torch.equal(found[view.name][test], told[test])
        assert not torch.equal(found[view.name], told)
        assert areas[0] == areas_told[0]
    assert found["linear"].isfinite().all()
    best = chosen(features, found, inner)
    assert torch.equal(best[test], found["linear" if inner[0][0] >= inner[1][0] else "gaussian"][test])
    scaled = in_stds(features, found["linear"])[test]
    assert (scaled.mean().item(), scaled.std().item()) == pytest.approx((0, 1), abs=1e-5)
