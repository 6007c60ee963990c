"""The reliability diagram: claimed chance of being unsafe against the share that is, and how many texts stand there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ups_rm.reward.head_metrics import ECE_BINS


def draw_reliability(logits: Tensor, labels: Tensor, file: Path, bins: int = ECE_BINS) -> Path:
    """Write the diagram as PNG. logits, labels (1 = unsafe): shape (N,). Returns `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    probability = logits.double().sigmoid()
    place = (probability * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    unsafe = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, labels.double())
    claimed = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, probability)
    filled = count > 0
    figure = Figure(figsize=(5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    top.plot((claimed / count)[filled].tolist(), (unsafe / count)[filled].tolist(), marker="o", label="this RM")
    top.set(ylabel="share labelled unsafe", ylim=(0, 1), title=f"Reliability, {len(logits)} texts")
    top.legend()
    edges = torch.arange(bins, dtype=torch.float64) / bins
    below.bar(edges.tolist(), count.tolist(), width=1 / bins, align="edge", edgecolor="white")
    below.set(xlabel="sigmoid(logit): chance of being unsafe, as the RM says", ylabel="texts", xlim=(0, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
