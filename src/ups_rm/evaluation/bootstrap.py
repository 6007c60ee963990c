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


def crossed_bootstrap(
    differences: Sequence[Sequence[float]], *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the mean of differences[s][p]: seeds s (trainings) and prompts p are both drawn with replacement.

    Every training answers the same prompts, so the two are crossed: a drawn prompt counts in all drawn trainings. With
    few seeds the interval is rough, and too narrow rather than too wide (of three, 1 in 9 draws is one seed thrice).

    Args:
        differences: as many values for each seed. `n` of the result counts prompts.

    Raises:
        ValueError: no seeds, no prompts, or different numbers of them.

    Source: the pigeonhole bootstrap of Owen (2007), The Annals of Applied Statistics 1(2).
    """
    sizes = {len(row) for row in differences}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"need the same prompts for every seed, and at least one; got {sorted(sizes)}")
    grid = np.asarray(differences, dtype=np.float64)  # (seeds, prompts)
    rng = np.random.default_rng(seed)
    seeds, prompts = grid.shape
    # how often each seed and each prompt is drawn, as shares
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=n_resamples) / seeds  # (N, seeds)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=n_resamples) / prompts  # (N, prompts)
    means = ((of_seeds @ grid) * of_prompts).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(grid.mean()), float(low), float(high), prompts, level)
