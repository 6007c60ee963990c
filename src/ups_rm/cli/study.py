"""`ups-rm study`: one recipe trained in several ways, with several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ups_rm.exits import INTERRUPTED, STOPPED_BY_ALARM

EPILOG = (
    "Example: ups-rm study study_constrained      Shorter: ups-rm study my_study.yaml trainer.total_training_steps=10"
)


def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="A packaged study or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides of all arms.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; runs/NAME where not given.")] = None,
) -> None:
    """Train every arm of a study with every seed, and compare them: one table, one picture.

    The file names a `recipe`, `overrides` of all arms, the `arms` with their own `key=value`, and `seeds`. Finished
    trainings are skipped, an interrupted one goes on; arms and seeds can be added later.
    """
    from ups_rm.console import console
    from ups_rm.pipeline import Interrupted, Stopped
    from ups_rm.study import read_study, run_study

    wanted = read_study(name)
    try:
        run_study(wanted, out or Path("runs") / wanted.name, overrides=tuple(overrides or ()))
    except Interrupted as stop:
        console.print(f"{stop}; the same command resumes it")
        raise typer.Exit(INTERRUPTED) from stop
    except Stopped as stop:
        raise typer.Exit(STOPPED_BY_ALARM) from stop
