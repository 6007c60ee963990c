"""What a trained head says, as a table on the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from ups_rm.console import console
from ups_rm.reward.head import HeadReport
from ups_rm.reward.head_metrics import Quality
from ups_rm.reward.helpful_head import HeadsReport, HelpfulQuality, HelpfulReport


def print_heads(report: HeadsReport) -> None:
    """Each head that was trained, as `print_head` and `print_helpfulness` show it."""
    if report.safety is not None:
        print_head(report.safety)
    if report.helpfulness is not None:
        print_helpfulness(report.helpfulness)


def print_helpfulness(report: HelpfulReport) -> None:
    """Pairwise accuracy of a head for helpfulness, and what it is to be held against."""
    table = Table(
        title=f"helpfulness head after epoch {report.best_epoch} of {report.epochs}, T = {report.temperature:.2f}"
    )
    names = (
        "",
        "prompts",
        "pairs",
        "better has the higher logit [95%]",
        "longer reply",
        "safety head",
        "not the safer",
    )
    for name in names:
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)

    def add(name: str, one: HelpfulQuality) -> None:
        low, high = one.pairwise_ci95
        accuracy = f"{one.pairwise_accuracy:.3f} [{low:.3f}, {high:.3f}]" if one.pairs else "-"
        differ = f"{one.safer_is_worse:.3f} ({one.worse_pairs} pairs)" if one.worse_pairs else "-"
        others = (one.longer_is_better, one.safety_head)
        shown = ("-" if math.isnan(x) else f"{x:.3f}" for x in others)
        table.add_row(name, f"{one.prompts:,}", f"{one.pairs:,}", accuracy, *shown, differ)

    add("held out", report.quality)
    for name, one in report.extra.items():
        add(name, one)
    console.print(table)


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
