"""Statistics and reports as rich tables, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table

from ups_rm.data.check import CheckResult
from ups_rm.data.prepare import PrepareReport
from ups_rm.data.prompts import KINDS
from ups_rm.data.schema import MAX_SEVERITY, SPLITS
from ups_rm.data.stats import PAIR_KINDS, SourceStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def stats_tables(stats: SourceStats) -> Group:
    """Everything in `stats`: one table over all rows, one by subset, one by subset and category."""
    return Group(_overview(stats), _by_subset(stats), *([_by_category(stats)] if stats.category_names() else []))


def _overview(stats: SourceStats) -> Table:
    table = Table(title="Rows read", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for split in SPLITS:
        table.add_row(
            f"{split} rows", f"{stats.split_rows(split):,}", f"{stats.distinct_prompts[split]:,} distinct prompts"
        )
    shared = stats.shared_prompts
    share = shared / stats.distinct_prompts["test"] if stats.distinct_prompts["test"] else 0.0
    table.add_row("prompts in train and test", f"{shared:,}", f"{share:.1%} of the test prompts")
    table.add_row("distinct responses", f"{stats.distinct_responses:,}", "")
    for kind in PAIR_KINDS[:3]:
        table.add_row(kind, f"{stats.pair_count(kind):,}", f"{stats.pair_share(kind):.1%} of labelled rows")
    table.add_row("unlabelled", f"{stats.pair_count('unlabelled'):,}", "a safety flag is null or absent")
    known = stats.better_and_safer_known
    differs = stats.better_differs_from_safer
    table.add_row(
        "better is not safer", f"{differs:,}", f"{differs / known:.1%} of rows with both ids" if known else ""
    )
    table.add_row("sha256 mismatches", f"{stats.sha256_mismatches:,}", f"of {stats.sha256_checked:,} checked")
    odd = stats.contradictions
    table.add_row("contradictions", f"{odd.total:,}", "")
    for name in ("unsafe_with_severity_0", "safe_with_severity", "safe_with_category", "safer_is_the_unsafe_one"):
        table.add_row(f"  {name.replace('_', ' ')}", f"{getattr(odd, name):,}", "")
    table.add_row("  texts labelled both ways", f"{odd.texts_labelled_both_ways:,}", "")
    table.add_row("rejected", f"{stats.rejected:,}", "")
    return table


def _by_subset(stats: SourceStats) -> Table:
    table = Table(title="By subset", title_justify="left")
    table.add_column("")
    for subset in stats.subsets:
        table.add_column(subset, justify="right")
    for split in SPLITS:
        table.add_row(f"{split} rows", *(f"{stats.rows[subset][split]:,}" for subset in stats.subsets))
    for kind in PAIR_KINDS[:3]:
        table.add_row(kind, *(_share(stats, subset, kind) for subset in stats.subsets))
    for level in range(MAX_SEVERITY + 1):
        counts = (f"{stats.severity[subset][level]:,}" for subset in stats.subsets)
        table.add_row(f"responses of severity {level}", *counts)
    return table


def _share(stats: SourceStats, subset: str, kind: str) -> str:
    pairs = stats.pairs[subset]
    labelled = sum(pairs[one] for one in PAIR_KINDS[:3])
    return f"{pairs[kind] / labelled:.1%}" if labelled else ""


def _by_category(stats: SourceStats) -> Table:
    table = Table(title="Responses flagged with a harm", title_justify="left")
    table.add_column("category")
    for subset in stats.subsets:
        table.add_column(subset, justify="right")
    table.add_column("all", justify="right")
    for name in stats.category_names():
        counts = [stats.categories[subset][name] for subset in stats.subsets]
        table.add_row(name, *(f"{count:,}" for count in counts), f"{sum(counts):,}")
    return table


def plot_stats(stats: SourceStats, path: Path) -> None:
    """Draws rows by kind of pair and responses by category, both by subset, into a picture (format by the suffix)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = stats.category_names()
    figure = Figure(figsize=(11, 4 + 0.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    kinds_axes, categories_axes = figure.subplots(2, 1, height_ratios=[1, max(0.3, len(names) / 8)])
    _stacked(
        kinds_axes, list(PAIR_KINDS), stats.subsets, {s: [stats.pairs[s][k] for k in PAIR_KINDS] for s in stats.subsets}
    )
    kinds_axes.set_title("Rows by safety of the two responses")
    _stacked(categories_axes, names, stats.subsets, {s: [stats.categories[s][n] for n in names] for s in stats.subsets})
    categories_axes.set_title("Responses flagged with a harm")
    kinds_axes.legend(title="subset", loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _stacked(axes: Axes, labels: list[str], subsets: list[str], counts: dict[str, list[int]]) -> None:
    """Horizontal bars, one per label, stacked by subset; the first label on top."""
    left = [0] * len(labels)
    for subset in subsets:
        axes.barh(labels, counts[subset], left=left, label=subset)
        left = [before + count for before, count in zip(left, counts[subset], strict=True)]
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def prepare_table(report: PrepareReport) -> Table:
    """What `prepare` wrote."""
    table = Table(title=f"Written to {report.out}", title_justify="left")
    for name in ("file", "rows", "distinct prompts"):
        table.add_column(name, justify="left" if name == "file" else "right")
    table.add_row("train.parquet", f"{report.train_rows:,}", f"{report.train_prompts:,}")
    table.add_row("val.parquet", f"{report.val_rows:,}", f"{report.val_prompts:,}")
    table.add_row("rejected.jsonl", f"{report.rejected:,}", "")
    return table


def print_check(result: CheckResult, console: Console) -> None:
    """One line a file, one line a problem, then the verdict."""
    for file in result.files:
        splits = ", ".join(f"{name} {count:,}" for name, count in sorted(file.splits.items()))
        kinds = ", ".join(f"{name} {file.kinds[name]:,}" for name in KINDS)
        facts = (
            f"{file.rows:,} rows",
            f"{file.distinct_prompts:,} distinct prompts",
            kinds,
            f"split: {splits or 'none'}",
            f"longest prompt {file.longest_prompt_chars:,} characters",
        )
        console.print(f"{file.path}: {'; '.join(facts)}", markup=False, soft_wrap=True)
    for problem in result.problems:
        console.print(str(problem), style="red" if problem.level == "error" else "yellow", markup=False, soft_wrap=True)
    hidden = sum(result.counts.values()) - len(result.problems)
    more = f" ({hidden} more of the same kinds not shown)" if hidden else ""
    verdict = "these files can be trained on" if result.ok else "these files can't be trained on"
    errors, warnings = result.counts["error"], result.counts["warning"]
    console.print(f"{verdict}: {errors} errors, {warnings} warnings{more}", style="bold")
