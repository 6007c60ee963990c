"""`ups-rm export`: a checkpoint of the verl engine as a policy folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: ups-rm export runs/ups-rm/full/global_step_150 --out runs/ups-rm/full/policy_150"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder `global_step_N` of the verl engine.")],
    out: Annotated[Path, typer.Option(help="Folder for the policy; must be new or empty.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python files that came with the policy.")
    ] = False,
) -> None:
    """Merge the shards of a checkpoint to a Hugging Face folder (bfloat16), by verl's own merger."""
    from ups_rm.console import console
    from ups_rm.distributed.export import export_policy
    from ups_rm.errors import RunError

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: nothing is overwritten\n  fix: another --out")
    console.print(f"{export_policy(checkpoint, out, trust_remote_code=trust_remote_code)}", soft_wrap=True)
