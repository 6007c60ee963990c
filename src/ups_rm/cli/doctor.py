"""`ups-rm doctor`: one table that says whether this machine can run the recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from ups_rm.cli.run import Overrides, Policy, RecipeName, RewardModel, named_overrides
from ups_rm.exits import CHECK_FAILED

EPILOG = (
    "Example: ups-rm doctor      "
    "Full scale: ups-rm doctor --engine verl trainer.n_gpus_per_node=8      "
    "For a script: ups-rm doctor --json"
)
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "cyan"}


def doctor(
    overrides: Overrides = None,
    recipe: RecipeName = "quickstart",
    policy: Policy = None,
    rm: RewardModel = None,
    engine: Annotated[str, typer.Option(envvar="ENGINE", help="`local` or `verl`.")] = "local",
    json_out: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say whether this machine can run the recipe: driver, CUDA, memory, disk, ports, NCCL, versions, models.

    Exit code 1 if something fails. What can't be seen from here is said to be unknown.
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ups_rm.console import console
    from ups_rm.errors import RunError
    from ups_rm.machine.checks import check_machine
    from ups_rm.machine.facts import look
    from ups_rm.recipe import load_recipe

    if engine not in ("local", "verl"):
        raise RunError(f"ENGINE={engine} is not known; use local or verl")
    given = [*named_overrides(policy, rm, None, None, None), *(overrides or [])]
    settings = load_recipe(recipe, given, engine=engine)
    wanted = ("ups-rm", "verl[vllm]") if engine == "verl" else ("ups-rm",)
    services = [entry for entry in settings.reward_model.asked() if entry.url]
    facts = look([Path(settings.trainer.default_local_dir)], wanted, services)
    findings = check_machine(facts, settings, engine)
    failed = any(finding.verdict == "fail" for finding in findings)
    if json_out:
        found = {"engine": engine, "ok": not failed, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(found | {"facts": asdict(facts)}, indent=1))
    else:
        table = Table(box=box.SIMPLE_HEAD, title=f"engine {engine}", title_justify="left")
        for heading in ("", "", "seen", "way out"):
            table.add_column(heading, overflow="fold")  # keys and paths are shown whole
        for finding in findings:
            mark = Text(finding.verdict, style=COLOURS[finding.verdict])
            table.add_row(Text(finding.what), mark, Text(finding.seen), Text(finding.fix))
        console.print(table)
        console.print("this machine can't run the recipe as it is" if failed else "nothing here stands in the way")
    if failed:
        raise typer.Exit(CHECK_FAILED)
