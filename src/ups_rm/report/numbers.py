"""Numbers as the page carries them: as many digits as can be read, null for what is not finite."""

from __future__ import annotations

import math
from typing import Any


def short(value: Any, digits: int = 5) -> float | int | None:
    """A number with `digits` significant digits; None for nan, infinities and what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def histogram(values: list[int], bins: int = 24) -> dict[str, list[float]] | None:
    """Counts of whole numbers in bins of one width, up to the 99th percentile; what is beyond is in the last bin.

    Returns:
        {"edges": bins + 1 numbers, "counts": bins numbers}, or None without values.
    """
    if not values:
        return None
    ordered = sorted(values)
    top = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    width = max(1, math.ceil((top + 1) / bins))
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, value // width)] += 1
    last = max(place for place, count in enumerate(counts) if count)
    return {"edges": [float(width * i) for i in range(last + 2)], "counts": [float(c) for c in counts[: last + 1]]}
