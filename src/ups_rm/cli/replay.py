"""`ups-rm replay`: a training step whose numbers went wrong, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: ups-rm replay runs/mine/replay/step_000012.pt"


def replay(file: Annotated[Path, typer.Argument(help="What the run has written: RUN/replay/step_N.pt.")]) -> None:
    """Run a step again in which a number was not finite, from the file that the run has kept. Writes nothing."""
    from ups_rm.console import console
    from ups_rm.local.replay import replay as run

    told, same = run(file)
    console.print(told, markup=False, soft_wrap=True)
    console.print("the same as in the run" if same else "not the same as in the run: other machine, RM or data?")
