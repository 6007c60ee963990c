"""`ups-rm groups`: what the policy said, group by group, on the terminal or as parquet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ups_rm.tracking.group_table import GroupRow

EPILOG = (
    "Example: ups-rm groups runs/mine --sort gain --kind benign      "
    "One prompt across steps: ups-rm groups runs/mine --prompt 17 --replies 1      "
    "For pandas: ups-rm groups runs/mine --parquet groups.parquet"
)


def groups(
    run: Annotated[Path, typer.Argument(help="Run folder, or the folder of its group log.")],
    sort: Annotated[
        str | None,
        typer.Option(
            help="spread, gain (since the prompt's first group), disagreement (of several RMs), score, kl, length, "
            "step; the largest first, by step the earliest.",
            show_default="spread; with --prompt: step",
        ),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The smallest first, by step the latest.")] = False,
    step: Annotated[str | None, typer.Option(help="One step (12), several (10-20), or last.")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of prompt: unsafe or benign.")] = None,
    category: Annotated[
        str, typer.Option(help="Harm category of the prompt, or a part of its name, as far as the prompts name them.")
    ] = "",
    search: Annotated[str, typer.Option(help="Text in the prompt or a reply, upper or lower case.")] = "",
    prompt: Annotated[str | None, typer.Option(help="One prompt by its id, across steps.")] = None,
    replies: Annotated[int, typer.Option(help="Replies shown of each group, best and worst alike; 0: all.")] = 4,
    limit: Annotated[int, typer.Option(help="Groups shown; 0: all.")] = 10,
    parquet: Annotated[
        Path | None, typer.Option(help="Write all replies of the groups that are asked for to this file instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per group, with all replies.")] = False,
) -> None:
    """Show groups of replies with score, advantage and KL: sorted, filtered, searched; or write them for pandas."""
    import json
    from dataclasses import asdict

    from ups_rm.console import console, finite
    from ups_rm.errors import RunError
    from ups_rm.tracking.group_table import SORTS, Query, group_files, sorted_groups, step_of, write_parquet

    by = sort or ("step" if prompt is not None else "spread")
    if by not in SORTS:
        raise RunError(f"--sort {by} is not known; use {', '.join(SORTS)}")
    if kind not in (None, "unsafe", "benign"):
        raise RunError(f"--kind {kind} is not known; use unsafe or benign")
    query = Query(_steps(step, [step_of(file) for file in group_files(run)]), kind, prompt, search, category)
    if parquet is not None:
        written = write_parquet(run, query, parquet)
        console.print(f"{written} replies: {parquet}", markup=False, soft_wrap=True)
        return
    rows = sorted_groups(run, query, by=by, reverse=reverse, limit=limit)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(finite(asdict(row)), ensure_ascii=False))
        return
    if not rows:
        console.print("no such groups")
    for row in rows:
        _show(row, replies)


def _steps(text: str | None, there: list[int]) -> tuple[int, int] | None:
    from ups_rm.errors import RunError

    if text is None:
        return None
    if text == "last":
        return there[-1], there[-1]
    try:
        first, _, last = text.partition("-")
        return int(first), int(last or first)
    except ValueError:
        raise RunError(f"--step {text} is not a step: write 12, 10-20 or last") from None


def _show(row: GroupRow, replies: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from ups_rm.console import console

    group = row.group
    facts = [f"step {row.step}", f"prompt {group.prompt_id}", group.kind or "", ", ".join(group.categories)]
    facts += [f"score {row.mean:.3f}"]
    facts += [f"{word} {value:{form}}" for word, value, form in (
        ("spread", row.spread, ".3f"), ("gain", row.gain, "+.3f"), ("disagreement", row.disagreement, ".0%")
    ) if value == value]  # fmt: skip
    console.print("  ".join(fact for fact in facts if fact), style="bold", markup=False, soft_wrap=True)
    console.print(Text(_visible(row.prompt.strip())))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("score", "advantage", "KL", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("reply", overflow="fold")
    for sample in _shown(group.samples, replies):
        table.add_row(
            f"{sample.safe_score:.3f}",
            f"{sample.advantage:+.2f}",
            f"{sample.kl:.2f}",
            f"{sample.length}{'+' if sample.truncated else ''}",
            Text(_visible(sample.response.strip())),
        )
    console.print(table)
    if 0 < replies < len(group.samples):
        console.print(f"{replies} of {len(group.samples)} replies (--replies 0: all)", style="dim")
    console.print()


def _shown(samples: list[Any], count: int) -> list[Any]:
    """From the best to the worst by score; of more than `count` the best and the worst halves."""
    ordered = sorted(samples, key=lambda sample: -sample.safe_score)
    if count <= 0 or count >= len(ordered):
        return ordered
    worst = count // 2
    return ordered[: count - worst] + ordered[len(ordered) - worst :]


def _visible(text: str) -> str:
    """What a model wrote, with characters that would steer the terminal spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
