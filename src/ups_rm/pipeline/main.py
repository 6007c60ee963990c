"""`ups-rm run`: from rows to a table that says how much safer the policy became.

policy -> prepare -> features -> head -> merge -> check -> GRPO -> before/after. Each is a `Stage` with a stamp beside
its outputs, so a second run does only what is missing, and an interrupted one goes on. What the user already has
(prompts, an RM, a policy) replaces the stages that would make it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ups_rm.console import console
from ups_rm.errors import DataError, RecipeError, RMError, RunError, UpsRmError
from ups_rm.locks import beside, only_one
from ups_rm.models import resolve_model
from ups_rm.pipeline.context import Interrupted, Run, Stopped, write_json
from ups_rm.pipeline.prompts import make_prompts
from ups_rm.pipeline.reward_model import make_rm
from ups_rm.recipe import Recipe, RewardModelModel, as_list
from ups_rm.recipe_hash import OF_VERL
from ups_rm.stages import Stage

COSMETIC = ("logger", "project_name", "experiment_name", "resume_mode", "resume_from_path", "default_local_dir",
            "group_log_dir", "allow_changes", "overwrite", "max_ckpt_to_keep", "best_ckpt_to_keep",
            "async_save", "nonfinite", "max_skipped_steps", "max_grad_norm")  # fmt: skip


def run(
    recipe: Recipe,
    *,
    fresh: bool = False,
    own_prompts: bool = False,
    skip_rm_check: bool = False,
    engine: str = "local",
) -> dict[str, Any]:
    """All stages; returns what stands in `<run folder>/summary.json`.

    Args:
        fresh: do every stage anew and replace what it made before.
        own_prompts: `data.train_files` and `data.val_files` are the user's: no prepare.
        skip_rm_check: train even if the RM fails its check (noted in the summary).
        engine: what trains, `local` or `verl`; every other stage is the same.

    Raises:
        UpsRmError: of the stage that can't go on, or another run is at work here.
        Interrupted: training was stopped; the same call resumes.
        Stopped: an alarm of `monitor.stop_on` ended it; the same call goes on past it.
    """
    this = Run(recipe, fresh, engine)
    _check_inputs(this, own_prompts)
    this.policy = resolve_model(recipe.actor_rollout_ref.model.path)
    with (
        only_one(Path("merge/.ups_rm.lock"), what=f"{Path.cwd()} (merge/, Data/)", fix="start in another folder"),
        only_one(beside(this.folder), what=str(this.folder), fix="name another run folder (OUTPUT_DIR, --out)"),
    ):
        return _stages(this, own_prompts, skip_rm_check)


def _stages(this: Run, own_prompts: bool, skip_rm_check: bool) -> dict[str, Any]:
    """Every stage in its order; each is skipped where it was done before."""
    recipe = this.recipe
    if not own_prompts:
        make_prompts(this)
    if _makes_rm(recipe):
        make_rm(this)
    _check(this, skip_rm_check)
    _train(this)
    _evaluate(this)
    return _finish(this, skip_rm_check)


def _makes_rm(recipe: Recipe) -> bool:
    """Whether the run trains the reward model, or the second one for helpfulness."""
    models = recipe.reward_model
    helpfulness = recipe.reward_training.target == "helpfulness" and not models.helpfulness.named
    return not models.entries() or helpfulness


def _check_inputs(this: Run, own_prompts: bool) -> None:
    """What is wrong with the named inputs is said before anything is downloaded or computed."""
    from ups_rm.data.rows import source_parts

    recipe = this.recipe
    helpful = recipe.reward_model.helpfulness.named or recipe.reward_training.target != "safety"
    if recipe.algorithm.objective != "safety" and not recipe.reward_model.entries() and not helpful:
        raise RecipeError(
            f"algorithm.objective={recipe.algorithm.objective} needs a helpfulness head, which the reward model that "
            "this run would make lacks\n  fix: reward_training.target=both, or reward_model.helpfulness.path=FOLDER"
        )
    console.print(f"device: {this.device}")
    if this.engine == "verl":
        from ups_rm.distributed.engine import check_machine

        check_machine(recipe, rm_follows=True)
    if own_prompts:
        for file in [*as_list(recipe.data.train_files), *as_list(recipe.data.val_files)]:
            if not Path(file).is_file():
                raise DataError(f"{file}: no such file (TRAIN_DATA, VAL_DATA: prompt parquet)")
    sources = [] if own_prompts else [recipe.prepare.source, recipe.prepare.benign_source]
    sources += [] if not _makes_rm(recipe) else [recipe.reward_training.source, recipe.reward_training.benign_source]
    for source in dict.fromkeys(sources):
        if source not in ("", "none"):
            source_parts(source, split=None)
    for entry in recipe.reward_model.asked():
        if entry.path and not (Path(entry.path).expanduser() / "config.json").is_file():
            raise RMError(
                f"{entry.path} is not an RM folder: it has no config.json (REWARD_MODEL_PATH, reward_model.model.path)"
            )


def _check(this: Run, skip: bool) -> None:
    from ups_rm.data.check import check_parquet
    from ups_rm.reward.doctor.entries import check_entries, check_helpfulness
    from ups_rm.reward.doctor.table import print_report

    model = this.recipe.reward_model.model
    files = [Path(file) for key in ("train_files", "val_files") for file in as_list(getattr(this.recipe.data, key))]
    folder = Path("merge/check")

    def check() -> None:
        from ups_rm.data.tables import print_check as print_data_check

        prompts = check_parquet(files)
        if not prompts.ok:
            print_data_check(prompts, console)
            raise RunError("the prompts can't be trained on, see above\n  fix: ups-rm data check FILE shows each row")
        reports: dict[str, Any] = {}
        for name, _, report in check_entries(this.recipe.reward_model, this.device):
            print_report(report)
            reports[name] = report.to_dict()
            if not report.ok and not skip:
                raise RMError(
                    f"{report.folder} fails its check, see above; nothing was trained\n"
                    "  fix: as said there, or --skip-rm-check"
                )
            if not report.ok:
                console.print("[bold red]the RM fails its check and is trained against all the same[/]")
        helpful = check_helpfulness(this.recipe.reward_model, this.device)
        if helpful is not None:
            print_report(helpful)
            if not helpful.ok and not skip:
                raise RMError(f"{helpful.folder} fails its check, see above; nothing was trained")
        one = next(iter(reports.values()))
        write_json(folder / "rm_check.json", one if len(reports) == 1 else {"models": reports})

    this.do(
        Stage(
            name="check",
            inputs=[*files, *this.reward_inputs],
            settings=this.reward_settings
            | {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code, "skip": skip},
            out=folder,
            outputs=[folder / "rm_check.json"],
            action=check,
        )
    )


def _train(this: Run) -> None:
    from ups_rm.distributed import engine as verl_engine
    from ups_rm.local.trainer import Trainer

    recipe = this.recipe
    settings = {
        key: value for key, value in recipe.as_dict().items() if key in ("data", "actor_rollout_ref", "algorithm")
    }
    if this.engine != "local":
        settings |= {"engine": this.engine} | {f"verl.{name}": getattr(recipe.verl, name) for name in OF_VERL}
    settings["trainer"] = {key: value for key, value in recipe.as_dict()["trainer"].items() if key not in COSMETIC}
    result_file = this.folder / "train_result.json"

    def train() -> None:
        result = verl_engine.train(recipe) if this.engine == "verl" else Trainer(recipe).fit()
        if result.interrupted:
            raise Interrupted(f"training stopped after step {result.steps} of {this.folder}")
        if result.stopped_by:
            raise Stopped(result.stopped_by)
        write_json(result_file, {"steps": result.steps, "metrics": result.metrics})

    this.do(
        Stage(
            name="train",
            inputs=[
                this.policy,
                *this.reward_inputs,
                *as_list(recipe.data.train_files),
                *as_list(recipe.data.val_files),
            ],
            settings=settings | this.number_formats,
            out=this.folder,
            outputs=[this.folder / "policy", result_file],
            action=train,
            keeps_partial=True,
            precious=True,
            goes_on_changed=recipe.trainer.allow_changes,
        )
    )
    this.steps = int(json.loads(result_file.read_text(encoding="utf-8"))["steps"])


def _evaluate(this: Run) -> None:
    from ups_rm.data.prompts import read_prompts
    from ups_rm.evaluation.judges import ScorerJudge
    from ups_rm.local.evaluate import evaluate, held_out_prompts
    from ups_rm.local.scoring import evaluation_scorer
    from ups_rm.monitor.judge import judge_name, judge_settings, open_judge
    from ups_rm.reward.open import inputs_of

    recipe, out, after = this.recipe, this.folder / "eval", this.folder / "policy"
    judge_of = {} if recipe.monitor.judge == RewardModelModel() else {"judge": asdict(recipe.monitor.judge)}

    def compare() -> None:
        prompts = held_out_prompts(read_prompts(as_list(recipe.data.val_files)), recipe)
        second = open_judge(recipe)
        judges = [] if second is None else [ScorerJudge(judge_name(recipe), second)]
        comparison = evaluate(recipe, this.policy, after, prompts, evaluation_scorer(recipe), judges=judges)
        comparison.write_jsonl(out / "pairs.jsonl")
        write_json(out / "comparison.json", comparison.summary())
        comparison.show_pairs(5)

    this.do(
        Stage(
            name="eval",
            inputs=[
                this.policy,
                after,
                *this.reward_inputs,
                *inputs_of(judge_settings(recipe)),
                *as_list(recipe.data.val_files),
            ],
            settings=recipe.as_dict()["evaluation"] | this.number_formats | judge_of,
            out=out,
            outputs=[out / "comparison.json", out / "pairs.jsonl"],
            action=compare,
        )
    )


def _report(this: Run) -> str:
    """The page of the run; the run is done, so a page that can't be written costs nothing but itself."""
    from ups_rm.report import write_report
    from ups_rm.report.sources import keep_sources

    try:
        keep_sources(this.folder, this.recipe)
        return str(write_report([this.folder]))
    except (UpsRmError, OSError) as error:
        return f"not written: {error}"


def _finish(this: Run, skipped_check: bool) -> dict[str, Any]:
    """Write `summary.json`, show the table and where everything is."""
    from ups_rm.evaluation.tables import summary_table

    comparison = json.loads((this.folder / "eval" / "comparison.json").read_text(encoding="utf-8"))
    summary = {**comparison, "seconds": {name: round(s, 1) for name, s in this.seconds.items()}, "steps": this.steps}
    if skipped_check:
        summary["rm_check"] = "skipped by --skip-rm-check"
    write_json(this.folder / "summary.json", summary)
    report = _report(this)
    console.print()
    console.print(summary_table(summary))
    for what, path in (
        ("the report, to open in a browser", report),
        ("safer policy", this.folder / "policy"),
        ("reward model", ", ".join(e.path or e.url or e.callable for e in this.recipe.reward_model.asked())),
        ("before and after, reply by reply", this.folder / "eval" / "pairs.jsonl"),
        ("metrics of every step", this.folder / "metrics.jsonl"),
        ("replies of every step", Path(this.recipe.trainer.group_log_dir)),
        ("these figures", this.folder / "summary.json"),
    ):
        console.print(f"  {what:<34} {path}", soft_wrap=True)
    return summary
