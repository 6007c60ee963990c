"""Tables of a comparison for the console, from `Comparison.summary()` or a `summary.json` read from disk."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

TITLES = {
    "unsafe": "unsafe prompts",
    "alarming": "harmless prompts that sound dangerous",
    "benign": "harmless prompts",
}
MEASURES = (  # name in the table, key, digits, per cent
    ("safe score", "safe_score", 3, False),
    ("judged unsafe", "judged_unsafe", 1, True),
    ("refusals", "refusal", 1, True),
    ("helpfulness, logit", "helpfulness", 2, False),
    ("length", "length", 1, False),
    ("distinct-2", "distinct_2", 3, False),
    ("perplexity under the base", "perplexity", 2, False),
    ("language kept", "language_kept", 1, True),
)


def summary_table(summary: dict[str, Any], length_unit: str = "tokens") -> Table:
    """The figures over all prompts."""
    table = _table(f"Before and after, {summary['safe_score']['n']} held-out prompts")
    table.add_row(*_row("safe score", summary["safe_score"], 3))
    table.add_row(*_row("refusals, unsafe prompts", summary["refusal_rate"]["unsafe"], 1, percent=True))
    table.add_row(*_row("refusals, benign prompts", summary["refusal_rate"]["benign"], 1, percent=True))
    table.add_row(*_row(f"length, {length_unit}", summary["length"], 1))
    table.add_row(*_row("distinct-2", summary["distinct_2"], 3))
    table.add_row("KL, nats per token", "", f"{summary['kl']:.4f}", "")
    return table


def group_tables(summary: dict[str, Any]) -> list[Table]:
    """One table per group of prompts, then harm categories and further judges, as far as there are any."""
    tables = []
    for group, figures in summary["groups"].items():
        table = _table(f"{figures['n']} {TITLES[group]}")
        for name, key, digits, percent in MEASURES:
            if key != "helpfulness" or figures.get(key, {}).get("n"):  # only where a model judged it
                table.add_row(*_row(name, figures[key], digits, percent=percent))
        table.add_row("prompts that got safer", "", _share(figures["win_rate"]), _wins(figures["win_rate"]))
        if figures["kl"] is not None:
            table.add_row("KL, nats per token", "", f"{figures['kl']:.4f}", "")
        tables.append(table)
    if summary["categories"]:
        table = _table("Safe score of unsafe prompts by harm category", "category", "prompts")
        for category, figures in summary["categories"].items():
            row = _row(escape(category), figures["safe_score"], 3)
            table.add_row(row[0], str(figures["n"]), *row[1:])
        tables.append(table)
    if summary["judges"]:
        table = _table("What other judges say", "judge", "judged unsafe, in")
        for judge, groups in summary["judges"].items():
            for group, figures in groups.items():
                row = _row(escape(judge), figures["judged_unsafe"], 1, percent=True)
                table.add_row(row[0], group, *row[1:])
        tables.append(table)
    return tables


def _table(title: str, *first: str) -> Table:
    table = Table(title=title)
    for heading in (*(first or ("",)), "before", "after", "change"):
        table.add_column(heading, justify="right" if heading in ("before", "after", "change") else "left")
    return table


def _row(name: str, numbers: dict[str, Any], digits: int, *, percent: bool = False) -> tuple[str, str, str, str]:
    """(name, before, after, change), the change with its interval where there is one."""
    before, after = numbers["before"], numbers["after"]
    if before is None or after is None:
        return name, "-", "-", "-"
    scale, unit, change_unit = (100, "%", " points") if percent else (1, "", "")
    change = f"{scale * (after - before):+.{digits}f}{change_unit}"
    if numbers.get("ci95") and numbers["n"] > 1:  # of one prompt it has no width and says nothing
        low, high = (scale * end for end in numbers["ci95"])
        change += f"  95% [{low:+.{digits}f}, {high:+.{digits}f}]"
    return name, f"{scale * before:.{digits}f}{unit}", f"{scale * after:.{digits}f}{unit}", change


def _share(win_rate: dict[str, Any]) -> str:
    return "-" if win_rate["rate"] is None else f"{win_rate['rate']:.1%}"


def _wins(win_rate: dict[str, Any]) -> str:
    if win_rate["rate"] is None:
        return "-"
    low, high = win_rate["ci95"]
    counts = "{wins} safer, {ties} equal, {losses} less safe".format(**win_rate)
    return f"{counts}  95% [{low:.1%}, {high:.1%}]"
