"""What a trained head says, as a table on the terminal."""

from __future__ import annotations

from rich.table import Table

from ups_rm.console import console
from ups_rm.reward.head import HeadReport
from ups_rm.reward.head_metrics import Quality


def print_head(report: HeadReport) -> None:
    """Quality of a head on held-out prompts, by category, and on what else it was measured on."""
    table = Table(title=f"head after epoch {report.best_epoch} of {report.epochs}, T = {report.temperature:.2f}")
    for name in ("", "texts", "unsafe", "AUC", "accuracy", "balanced", "ECE", "pairs", "pairwise accuracy [95%]"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)

    def add(name: str, one: Quality) -> None:
        low, high = one.pairwise_ci95
        pairwise = f"{one.pairwise_accuracy:.3f} [{low:.3f}, {high:.3f}]" if one.pairs else "-"
        figures = (one.unsafe_share, one.auc, one.accuracy, one.balanced_accuracy, one.ece)
        table.add_row(name, f"{one.texts:,}", *(f"{x:.3f}" for x in figures), f"{one.pairs:,}", pairwise)

    prompts = report.prompts
    add(f"held out ({prompts['test'] or prompts['validation']} prompts)", report.quality)
    for name, one in report.quality.by_category.items():
        add(f"  {name}", one)
    for name, one in report.extra.items():
        add(name, one)
    console.print(table)
