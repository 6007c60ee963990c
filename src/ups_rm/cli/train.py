"""`ups-rm train`: the step that moves a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ups_rm.cli.run import (
    AsJson,
    Engine,
    Output,
    Overrides,
    Policy,
    Quiet,
    RecipeName,
    RewardModel,
    TrainData,
    ValData,
)
from ups_rm.exits import INTERRUPTED, STOPPED_BY_ALARM

TRAIN_EPILOG = (
    "Example: ups-rm train --rm merge/merged_model/Naive-RM-saferlhf --out runs/mine "
    "trainer.total_training_steps=20      "
    "First look: ups-rm train --dry-run --rm merge/merged_model/Naive-RM-saferlhf"
)


def train(
    overrides: Overrides = None,
    recipe: RecipeName = "quickstart",
    policy: Policy = None,
    rm: RewardModel = None,
    train_data: TrainData = None,
    val_data: ValData = None,
    out: Output = None,
    engine: Engine = "local",
    resume: Annotated[
        str | None,
        typer.Option(
            help="`auto`: the newest checkpoint in the run folder; `never`; or a checkpoint folder.",
            show_default="auto",
        ),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other settings or inputs; what changed is listed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run, which is removed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe, what is read and written, and the memory needed."),
    ] = False,
    skip_rm_check: Annotated[
        bool, typer.Option("--skip-rm-check", help="Train even if the RM fails its check.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a policy by GRPO against an RM folder."""
    from ups_rm.cli.run import check_engine, named_overrides
    from ups_rm.console import console, emit, set_output
    from ups_rm.recipe import load_recipe

    set_output(quiet=quiet, events=as_json)
    check_engine(engine)
    given = named_overrides(policy, rm, train_data, val_data, out)
    if resume in ("auto", "never"):
        given.append(f"trainer.resume_mode={'auto' if resume == 'auto' else 'disable'}")
    elif resume:
        given += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={resume}"]
    given += ["trainer.allow_changes=true"] * allow_changes + ["trainer.overwrite=true"] * overwrite
    settings = load_recipe(recipe, [*given, *(overrides or [])], engine=engine)
    from ups_rm.distributed import engine as verl_engine

    if dry_run and engine == "verl":
        verl_engine.dry_run(settings)
        return
    if dry_run:
        from ups_rm.local.dry_run import print_dry_run

        print_dry_run(settings)
        return
    from ups_rm.local.preflight import check_before_training
    from ups_rm.local.run_folder import check_folder, finished_run
    from ups_rm.local.trainer import Trainer
    from ups_rm.locks import beside, only_one
    from ups_rm.recipe_hash import MadeWith

    if engine == "verl":
        verl_engine.check_machine(settings)
    folder = Path(settings.trainer.default_local_dir)
    with only_one(beside(folder), what=str(folder), fix="name another run folder (OUTPUT_DIR, --out)"):
        if engine == "local":
            made_with = MadeWith.of(settings)
            check_folder(settings, made_with)
            if done := finished_run(settings, made_with):
                console.print(f"nothing left to do: {done.steps} steps are done: {done.policy}", soft_wrap=True)
                return
        check_before_training(settings, skip=skip_rm_check)
        result = verl_engine.train(settings) if engine == "verl" else Trainer(settings).fit()
    emit("result", folder=folder, policy=result.policy, steps=result.steps, interrupted=result.interrupted,
         stopped_by=result.stopped_by)  # fmt: skip
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.stopped_by:
        raise typer.Exit(STOPPED_BY_ALARM)
    console.print(f"policy after {result.steps} steps: {result.policy}", soft_wrap=True)
