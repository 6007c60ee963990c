"""How sure a difference of means is: the paired percentile bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean difference `diff` (after - before) over `n` pairs, with its interval [low, high] at `level`."""

    diff: float
    low: float
    high: float
    n: int
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is there at this level, in either direction."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of mean(after - before), pairs drawn with replacement: the prompt is what varies.

    The ends are the (1 - level) / 2 and (1 + level) / 2 quantiles of the resampled means. The same seed gives the same
    interval. One pair gives an interval of no width, which says nothing: look at `n`.

    Raises:
        ValueError: no pairs, or a different number before and after.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; checked against scipy.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"need as many values before as after, and at least one; got {len(before)} and {len(after)}")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    rng = np.random.default_rng(seed)
    n = len(differences)
    means = np.empty(n_resamples)
    chunk = max(1, 2_000_000 // n)  # bounds the memory of the drawn indices
    for start in range(0, n_resamples, chunk):
        stop = min(start + chunk, n_resamples)
        means[start:stop] = differences[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high), n, level)
