"""`ups-rm runs`: what was trained here, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: ups-rm runs      As JSON: ups-rm runs runs/ups-rm --json"


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to look in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")] = False,
) -> None:
    """List the runs in a folder with state, steps, score, gain on held-out prompts and alarms; the newest last."""
    import json
    from dataclasses import asdict
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    from ups_rm.console import console, finite
    from ups_rm.errors import RunError
    from ups_rm.monitor.runs import find_runs

    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder\n  fix: ups-rm runs FOLDER, the one that holds the runs")
    found = find_runs(folder)
    if as_json:
        for run in found:
            typer.echo(json.dumps(finite(asdict(run)), default=str))
        return
    if not found:
        console.print(f"no runs in {folder}", markup=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("state", "steps", "score", "KL", "gain [95%]", "last step at"):
        table.add_column(
            escape(heading), justify="right" if heading in ("steps", "score", "KL") else "left", no_wrap=True
        )
    table.add_column("alarms", min_width=8, overflow="fold")
    for run in found:
        total = "" if run.total_steps is None else f"/{run.total_steps}"
        gain = "-" if run.gain is None else f"{run.gain:+.3f}"
        gain += "" if run.ci95 is None else f" [{run.ci95[0]:+.3f}, {run.ci95[1]:+.3f}]"
        table.add_row(
            escape(str(run.folder)),
            run.state,
            f"{run.steps}{total}",
            "-" if run.score is None else f"{run.score:.3f}",
            "-" if run.kl is None else f"{run.kl:.3f}",
            escape(gain),
            datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M"),
            ", ".join(run.alarms) or "-",
        )
    console.print(table)
