"""`ups-rm train` and `ups-rm eval`: the two steps that move a policy and judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ups_rm.cli.run import Engine, Output, Overrides, Policy, RecipeName, RewardModel, TrainData, ValData

TRAIN_EPILOG = (
    "Example: ups-rm train --rm merge/merged_model/Naive-RM-saferlhf --out runs/mine "
    "trainer.total_training_steps=20      "
    "First look: ups-rm train --dry-run --rm merge/merged_model/Naive-RM-saferlhf"
)
EVAL_EPILOG = (
    "Example: ups-rm eval --before smollm2-135m-instruct --after runs/ups-rm/quickstart/policy "
    "--rm merge/merged_model/Naive-RM-saferlhf --val-data Data/pku_saferlhf_verl/val.parquet --out runs/compare"
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe, what is read and written, and the memory needed."),
    ] = False,
    skip_rm_check: Annotated[
        bool, typer.Option("--skip-rm-check", help="Train even if the RM fails its check.")
    ] = False,
) -> None:
    """Train a policy by GRPO against an RM folder."""
    from ups_rm.cli.run import check_engine, named_overrides
    from ups_rm.console import console
    from ups_rm.recipe import load_recipe

    check_engine(engine)
    given = named_overrides(policy, rm, train_data, val_data, out)
    if resume in ("auto", "never"):
        given.append(f"trainer.resume_mode={'auto' if resume == 'auto' else 'disable'}")
    elif resume:
        given += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={resume}"]
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
    from ups_rm.local.trainer import Trainer
    from ups_rm.locks import beside, only_one

    if engine == "verl":
        verl_engine.check_machine(settings)
    folder = Path(settings.trainer.default_local_dir)
    with only_one(beside(folder), what=str(folder), fix="name another run folder (OUTPUT_DIR, --out)"):
        check_before_training(settings, skip=skip_rm_check, fresh=resume == "never")
        result = verl_engine.train(settings) if engine == "verl" else Trainer(settings).fit()
    if result.interrupted:
        raise typer.Exit(130)
    console.print(f"policy after {result.steps} steps: {result.policy}", soft_wrap=True)


def evaluate(
    before: Annotated[str, typer.Option(help="Policy to start from: folder, hub id or smollm2-135m-instruct.")],
    after: Annotated[str, typer.Option(help="Trained policy.")],
    out: Annotated[Path, typer.Option(help="Folder for comparison.json and pairs.jsonl; must be new or empty.")],
    rm: Annotated[
        str | None,
        typer.Option(envvar="REWARD_MODEL_PATH", help="RM folder that scores both. Default: the recipe's models."),
    ] = None,
    val_data: Annotated[
        list[str] | None, typer.Option(envvar="VAL_DATA", help="Prompt parquet; may come several times.")
    ] = None,
    recipe: RecipeName = "quickstart",
    pairs: Annotated[int, typer.Option(help="How many pairs of replies to print.")] = 5,
    overrides: Overrides = None,
) -> None:
    """Compare two policies on held-out prompts: safe score with interval, refusals, length, diversity, KL."""
    import json

    from ups_rm.console import console
    from ups_rm.data.prompts import read_prompts
    from ups_rm.errors import RunError
    from ups_rm.local.evaluate import evaluate as run
    from ups_rm.local.evaluate import held_out_prompts
    from ups_rm.local.scoring import evaluation_scorer
    from ups_rm.recipe import as_list, load_recipe

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: nothing is overwritten\n  fix: another --out")
    given = [f"reward_model.model.path={rm}"] if rm else []
    settings = load_recipe(recipe, [*given, *(overrides or [])], engine=None)
    files = val_data or as_list(settings.data.val_files)
    prompts = held_out_prompts(read_prompts(files), settings)
    comparison = run(settings, before, after, prompts, evaluation_scorer(settings))
    out.mkdir(parents=True, exist_ok=True)
    comparison.write_jsonl(out / "pairs.jsonl")
    (out / "comparison.json").write_text(json.dumps(comparison.summary(), indent=1) + "\n", encoding="utf-8")
    comparison.show_pairs(pairs)
    console.print(comparison.table())
    console.print(f"{out}", soft_wrap=True)
