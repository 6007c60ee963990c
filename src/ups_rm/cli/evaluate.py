"""`ups-rm eval`: is the policy safer, and what did it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ups_rm.cli.run import Overrides, RecipeName

if TYPE_CHECKING:
    from ups_rm.data.prompts import PromptRow
    from ups_rm.recipe import Recipe

EPILOG = (
    "Example: ups-rm eval --before smollm2-135m-instruct --after runs/ups-rm/quickstart/policy "
    "--rm merge/merged_model/Naive-RM-saferlhf --out runs/compare      "
    "Public set: ups-rm eval --before A --after B --prompts xstest=xstest_prompts.csv --limit 50      "
    "Judges: --judge other_rm --judge-url http://127.0.0.1:8000/v1 --judge-model NAME"
)


def evaluate(
    before: Annotated[str, typer.Option(help="Policy to start from: folder, hub id or smollm2-135m-instruct.")],
    after: Annotated[str, typer.Option(help="Trained policy.")],
    out: Annotated[Path, typer.Option(help="Folder for comparison.json and pairs.jsonl; must be new or empty.")] = Path(
        "runs/eval"
    ),
    rm: Annotated[
        str | None,
        typer.Option(
            envvar="REWARD_MODEL_PATH",
            help="RM folder that scores both. Default: the recipe's models, or the RM that `ups-rm run` made here.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="packaged (the default), sample, saferlhf, xstest, simplesafetytests, harmbench, advbench, "
            "strongreject, beavertails, alpacaeval; NAME=FILE for a copy on disk; unsafe=FILE, alarming=FILE, "
            "benign=FILE or a file with the fields prompt and group. May come several times."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each group and set of --prompts at most.", show_default="all")
    ] = None,
    val_data: Annotated[
        list[str] | None,
        typer.Option(envvar="VAL_DATA", help="Prompt parquet instead of --prompts; may come several times."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Another RM that judges too: FOLDER or a reward server's address, then ,KEY=VALUE as in "
            "reward_model.model (such as ,output=reward). May come several times."
        ),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint that judges too.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name at --judge-url.")] = None,
    judge_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the endpoint's key.", show_default="UPS_RM_JUDGE_KEY, if set"),
    ] = None,
    recipe: RecipeName = "quickstart",
    pairs: Annotated[int, typer.Option(help="How many pairs of replies to print.")] = 5,
    overrides: Overrides = None,
) -> None:
    """Compare two policies: safe score with interval, refusals, over-refusal, length, variety, perplexity, KL."""
    import json

    from ups_rm.console import console
    from ups_rm.device import torch_device
    from ups_rm.errors import RunError
    from ups_rm.evaluation.endpoint import EndpointJudge
    from ups_rm.evaluation.judges import open_judges
    from ups_rm.evaluation.tables import group_tables, summary_table
    from ups_rm.local.evaluate import evaluate as run
    from ups_rm.local.scoring import evaluation_scorer
    from ups_rm.pipeline.reward_model import RM_FOLDER
    from ups_rm.recipe import load_recipe

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: nothing is overwritten\n  fix: another --out")
    if prompts and val_data:
        raise RunError("--prompts and --val-data (VAL_DATA) are two answers to one question: give one of them")
    if (judge_url is None) != (judge_model is None):
        raise RunError("--judge-url and --judge-model belong together: give both, or neither")
    given = [f"reward_model.model.path={rm}"] if rm else []
    settings = load_recipe(recipe, [*given, *(overrides or [])], engine=None)
    if not settings.reward_model.entries() and (RM_FOLDER / "config.json").is_file():
        console.print(f"reward model: {RM_FOLDER}, which was made here", soft_wrap=True)
        settings.reward_model.model.path = str(RM_FOLDER)
    own_files = val_data or any(text.lstrip("+").startswith("data.val_files=") for text in overrides or [])
    rows, sets = _rows(settings, prompts, limit, val_data, named_in_recipe=bool(own_files))
    scorer = evaluation_scorer(settings)
    endpoint = EndpointJudge(judge_url, judge_model, key_env=judge_key_env) if judge_url and judge_model else None
    if endpoint is not None:
        endpoint.check()
    judges = open_judges(judge or [], str(torch_device(settings.trainer.device)), endpoint)
    comparison = run(settings, before, after, rows, scorer, judges=judges)
    used = settings.evaluation
    comparison.about.update(
        policies={"before": before, "after": after},
        prompt_sets=sets,
        settings={
            "n": used.n,
            "max_new_tokens": used.max_new_tokens,
            "temperature": used.temperature,
            "seed": used.seed,
            "n_resamples": used.n_resamples,
        },
    )
    summary = comparison.summary()
    out.mkdir(parents=True, exist_ok=True)
    comparison.write_jsonl(out / "pairs.jsonl")
    (out / "comparison.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    comparison.show_pairs(pairs)
    for table in (summary_table(summary, comparison.length_unit), *group_tables(summary)):
        console.print(table)
    console.print(f"{out}", soft_wrap=True)


def _rows(
    settings: Recipe, prompts: list[str] | None, limit: int | None, val_data: list[str] | None, *, named_in_recipe: bool
) -> tuple[list[PromptRow], list[dict[str, Any]]]:
    """The prompts that were asked for, and what the results say of their sets."""
    from ups_rm.data.prompts import read_prompts
    from ups_rm.errors import RunError
    from ups_rm.evaluation.prompt_sets import PACKAGED, load_prompts
    from ups_rm.local.evaluate import held_out_prompts
    from ups_rm.recipe import as_list

    if prompts or not named_in_recipe:
        return load_prompts(prompts or [PACKAGED], limit=limit)
    if limit is not None:
        raise RunError(
            "--limit counts prompts of --prompts\n"
            "  fix: for held-out files evaluation.max_unsafe_prompts and evaluation.max_benign_prompts"
        )
    files = val_data or as_list(settings.data.val_files)
    rows = held_out_prompts(read_prompts(files), settings)
    return rows, [{"set": "held out", "place": ", ".join(map(str, files))}]
