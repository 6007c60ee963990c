"""`ups-rm run`: the whole way with one command."""

from __future__ import annotations

from typing import Annotated

import typer

from ups_rm.exits import INTERRUPTED, STOPPED_BY_ALARM

EPILOG = (
    "Example: ups-rm run trainer.total_training_steps=20 actor_rollout_ref.rollout.n=8      "
    "Own data: ups-rm run --recipe own_rows --data my_pairs.jsonl      "
    "Own RM and policy: REWARD_MODEL_PATH=my_rm POLICY_MODEL_PATH=my_policy ups-rm run"
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides, in verl's names.")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A packaged recipe or a .yaml file.")]
Policy = Annotated[str | None, typer.Option(envvar="POLICY_MODEL_PATH", help="Folder or hub id of the policy.")]
RewardModel = Annotated[str | None, typer.Option("--rm", envvar="REWARD_MODEL_PATH", help="RM folder.")]
TrainData = Annotated[str | None, typer.Option(envvar="TRAIN_DATA", help="Prompt parquet to train on.")]
ValData = Annotated[str | None, typer.Option(envvar="VAL_DATA", help="Prompt parquet that is held out.")]
Output = Annotated[str | None, typer.Option("--out", envvar="OUTPUT_DIR", help="Run folder.")]
Engine = Annotated[
    str,
    typer.Option(envvar="ENGINE", help="`local`: one device. `verl`: stock verl, 1 GPU to several nodes."),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print alarms, warnings and errors only (on stderr).")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line: steps, alarms, stages, the result.")
]


def run(
    overrides: Overrides = None,
    recipe: RecipeName = "quickstart",
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to train RM and policy on instead of the packaged sample: a folder in PKU-SafeRLHF layout, "
            "a file of rows or of {prompt, safe_response, unsafe_response}, a Hub id. The sample's harmless prompts "
            "are added."
        ),
    ] = None,
    policy: Policy = None,
    rm: RewardModel = None,
    train_data: TrainData = None,
    val_data: ValData = None,
    out: Output = None,
    engine: Engine = "local",
    fresh: Annotated[
        bool, typer.Option("--fresh", envvar="FRESH", help="Do every stage anew, replace what is there.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume the training with other settings; what changed is listed.")
    ] = False,
    skip_rm_check: Annotated[
        bool, typer.Option("--skip-rm-check", help="Train even if the RM fails its check.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prepare, make the RM, check it, train by GRPO, compare before and after. Finished stages are skipped."""
    from ups_rm.console import emit, set_output
    from ups_rm.errors import RunError

    set_output(quiet=quiet, events=as_json)
    check_engine(engine)
    if (train_data is None) != (val_data is None):
        raise RunError("TRAIN_DATA and VAL_DATA belong together: give both, or neither")
    given = named_overrides(policy, rm, train_data, val_data, out)
    given += ["trainer.allow_changes=true"] * allow_changes
    if data is not None:
        given += [f"prepare.source={data}", "prepare.group_split=true"]
        given += ["prepare.benign_source=sample", "reward_training.benign_source=sample"]
    from ups_rm.pipeline import Interrupted, Stopped
    from ups_rm.pipeline import run as run_all
    from ups_rm.recipe import load_recipe

    try:
        summary = run_all(
            load_recipe(recipe, [*given, *(overrides or [])], engine=engine),
            engine=engine,
            fresh=fresh,
            own_prompts=train_data is not None,
            skip_rm_check=skip_rm_check,
        )
    except Interrupted as stop:
        from ups_rm.console import console

        console.print(f"{stop}; the same command resumes it")
        raise typer.Exit(INTERRUPTED) from stop
    except Stopped as stop:
        raise typer.Exit(STOPPED_BY_ALARM) from stop
    emit("summary", **summary)


def named_overrides(
    policy: str | None, rm: str | None, train_data: str | None, val_data: str | None, out: str | None
) -> list[str]:
    """The options and environment variables that users know, as recipe overrides."""
    named = {
        "actor_rollout_ref.model.path": policy,
        "reward_model.model.path": rm,
        "data.train_files": train_data,
        "data.val_files": val_data,
        "trainer.default_local_dir": out,
    }
    return [f"{key}={value}" for key, value in named.items() if value]


def check_engine(engine: str) -> None:
    """One of the two engines.

    Raises:
        RunError: another name.
    """
    from ups_rm.errors import RunError

    if engine not in ("local", "verl"):
        raise RunError(f"ENGINE={engine} is not known; use local or verl")
