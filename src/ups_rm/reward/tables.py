"""What a check and a trained head say, as tables on the terminal."""

from __future__ import annotations

from rich.table import Table

from ups_rm.console import console
from ups_rm.reward.check import CheckReport
from ups_rm.reward.head import HeadReport
from ups_rm.reward.head_metrics import Quality

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def print_report(report: CheckReport) -> None:
    """The checks as a table, and the way out of each that did not pass."""
    table = Table(title=f"{report.folder} in {report.dtype}", title_justify="left")
    for column in ("check", "verdict", "number", "limit", "finding"):
        table.add_column(column, justify="right" if column in ("number", "limit") else "left")
    for one in report.checks:
        number, limit = (_short(value) for value in (one.number, one.limit))
        colour = COLOURS[one.verdict]
        table.add_row(one.name, f"[{colour}]{one.verdict}[/]", number, limit, one.finding.replace("[", r"\["))
    console.print(table)
    for one in report.checks:
        if one.way_out:
            console.print(f"{one.name}: {one.way_out}", markup=False, soft_wrap=True)
    verdict = "may be trained against" if report.ok else "must not be trained against"
    console.print(f"this RM {verdict}")


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


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
