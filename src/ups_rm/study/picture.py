"""The picture of a study: what each arm gained in safety against what it cost in usefulness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ups_rm.study.results import ArmResult, Change

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too."""
MARKERS = "osD^vPX"


def draw(results: list[ArmResult], file: Path) -> None:
    """Two panels, safety upwards: against refusals of harmless prompts, and against helpfulness where it is known.

    Large marks are means over seeds with 95% intervals, small ones single trainings. Better is up and left in the
    first panel, up and right in the second. The file appears when it is whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    helpful = all(result.helpfulness is not None for result in results)
    figure, axes = pyplot.subplots(1, 2 if helpful else 1, figsize=(10 if helpful else 5.5, 4.2), squeeze=False)
    for i, result in enumerate(results):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        _mark(axes[0][0], result.benign_refusals, 100, result, style)
        if helpful and result.helpfulness is not None:
            _mark(axes[0][1], result.helpfulness, 1, result, style)
    axes[0][0].set_xlabel("refusals of harmless prompts, change in points")
    if helpful:
        axes[0][1].set_xlabel("helpfulness, change in logits")
    for axis in axes[0]:
        axis.set_ylabel("safe score on unsafe prompts, change")
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(file)


def _mark(axis: object, across: Change, scale: float, result: ArmResult, style: dict[str, str]) -> None:
    up = result.safe_score
    x, y = scale * across.interval.diff, up.interval.diff
    axis.errorbar(  # type: ignore[attr-defined]
        [x],
        [y],
        xerr=[[max(0.0, x - scale * across.interval.low)], [max(0.0, scale * across.interval.high - x)]],
        yerr=[[max(0.0, y - up.interval.low)], [max(0.0, up.interval.high - y)]],
        markersize=9,
        capsize=3,
        linewidth=1.2,
        label=result.arm,
        **style,
    )
    axis.scatter(  # type: ignore[attr-defined]
        [scale * one for one in across.per_seed], up.per_seed, s=18, alpha=0.5, linewidths=0, **style
    )
