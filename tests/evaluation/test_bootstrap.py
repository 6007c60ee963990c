"""The paired bootstrap against a plain loop, and its coverage."""

from __future__ import annotations

import numpy as np
import pytest

from ups_rm.evaluation import paired_bootstrap


def test_the_interval_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    before, after = [0.1, 0.4, 0.3, 0.8, 0.2], [0.3, 0.5, 0.2, 0.9, 0.9]
    means = []
    for _ in range(20_000):
        rows = rng.integers(0, 5, 5)
        means.append(float(np.mean([after[i] - before[i] for i in rows])))
    ours = paired_bootstrap(before, after, n_resamples=20_000, seed=5)
    assert ours.diff == pytest.approx(0.2)
    assert ours.low == pytest.approx(float(np.quantile(means, 0.025)), abs=0.01)
    assert ours.high == pytest.approx(float(np.quantile(means, 0.975)), abs=0.01)


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments of 60 pairs with a true difference of 0.1: at 95% between 90% and 99% hold it."""
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        before = rng.normal(0, 1, 60)
        interval = paired_bootstrap(before, before + rng.normal(0.1, 0.5, 60), n_resamples=1000, seed=k)
        hits += interval.low <= 0.1 <= interval.high
    assert 180 <= hits <= 198


def test_pairing_counts() -> None:
    """The same two sets of scores: paired up, a steady gain is sure; shuffled apart, it is not."""
    rng = np.random.default_rng(2)
    before = rng.uniform(0, 1, 40)
    after = before + 0.05
    assert paired_bootstrap(before, after).excludes_zero
    assert not paired_bootstrap(before, rng.permutation(after)).excludes_zero


def test_same_seed_same_interval_whatever_the_chunks() -> None:
    rng = np.random.default_rng(3)
    before, after = rng.uniform(0, 1, 3000), rng.uniform(0, 1, 3000)
    assert paired_bootstrap(before, after, seed=1) == paired_bootstrap(before, after, seed=1)
    assert paired_bootstrap(before, after, seed=1).low != paired_bootstrap(before, after, seed=2).low


def test_one_pair_and_no_pair() -> None:
    one = paired_bootstrap([0.25], [0.75])
    assert (one.diff, one.low, one.high, one.n) == (0.5, 0.5, 0.5, 1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_bootstrap([0.5], [0.5, 0.6])
