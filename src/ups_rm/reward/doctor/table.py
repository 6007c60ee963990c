"""The report as a table on the terminal, by section, with the ways out below."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ups_rm.console import console
from ups_rm.reward.doctor.report import Check, CheckReport

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def print_report(report: CheckReport) -> None:
    """The checks as a table, examples of tricks that pay, and the way out of each check that did not pass."""
    title = f"{report.folder} in {report.dtype}" if report.dtype else str(report.folder)
    table = Table(title=escape(title), title_justify="left")
    for column in ("check", "verdict", "number", "limit", "finding"):
        table.add_column(column, justify="right" if column in ("number", "limit") else "left")
    section = ""
    for one in report.checks:
        if "because_of" in one.details and one.number is None:
            continue
        if one.section != section:
            section = one.section
            table.add_row(f"[bold]{section}[/]", end_section=False)
        number, limit = (_short(value) for value in (one.number, one.limit))
        colour = COLOURS[one.verdict]
        table.add_row(f" {one.name}", f"[{colour}]{one.verdict}[/]", number, limit, escape(one.finding))
    console.print(table)
    for one in report.of("warn", "fail", "skip"):
        _print_way_out(one)
    blocked: dict[str, list[str]] = {}
    for one in report.of("skip"):
        if "because_of" in one.details and one.number is None:
            blocked.setdefault(one.details["because_of"], []).append(one.name)
    for cause, names in blocked.items():
        console.print(f"skipped because of {cause}: {', '.join(names)}", markup=False, soft_wrap=True)
    warned, verdict = len(report.of("warn")), "may" if report.ok else "must not"
    note = f" ({warned} warning{'s' if warned > 1 else ''}: look)" if warned and report.ok else ""
    console.print(f"this RM {verdict} be trained against{note}")


def _print_way_out(check: Check) -> None:
    if check.way_out:
        console.print(f"{check.name}: {check.way_out}", markup=False, soft_wrap=True)
    for example in check.details.get("examples", []):
        console.print(
            f"  {example['prompt']!r}: {example['reply']!r} ({example['logit_before']:+.2f})\n"
            f"  -> {example['tricked']!r} ({example['logit_after']:+.2f})",
            markup=False,
            soft_wrap=True,
        )


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"
