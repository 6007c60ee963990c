"""`ups-rm run`: from rows to a table that says how much safer the policy became.

policy -> prepare -> features -> head -> merge -> check -> GRPO -> before/after. Each is a `Stage` with a stamp beside
its outputs, so a second run does only what is missing, and an interrupted one goes on. What the user already has
(prompts, an RM, a policy) replaces the stages that would make it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.console import console
from ups_rm.data.prompts import Kind
from ups_rm.errors import RMError, RunError
from ups_rm.models import resolve_model
from ups_rm.recipe import Recipe, RewardTraining, as_list
from ups_rm.stages import Stage, run_stage

if TYPE_CHECKING:
    from ups_rm.data.rows import Row
    from ups_rm.reward.head import HeadReport, HeadSettings

RM_FOLDER = Path("merge/merged_model/Naive-RM-saferlhf")
BENIGN_FOLDER = Path("Data/benign_verl")
COSMETIC = ("logger", "project_name", "experiment_name", "resume_mode", "resume_from_path", "default_local_dir",
            "group_log_dir")  # fmt: skip


class Interrupted(Exception):
    """Training was stopped by the user and can be resumed."""


@dataclass
class Run:
    """What the stages share while they run."""

    recipe: Recipe
    fresh: bool
    policy: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.recipe.trainer.default_local_dir)

    @property
    def device(self) -> str:
        from ups_rm.local.policy import pick_device

        return str(pick_device(self.recipe.trainer.device))

    @property
    def number_formats(self) -> dict[str, Any]:
        """What else decides a score or a reply: compute types and device."""
        model, actor = self.recipe.reward_model.model, self.recipe.actor_rollout_ref.actor
        return {
            "rm_dtype": model.dtype,
            "rm_remote_code": model.trust_remote_code,
            "dtype": actor.fsdp_config.dtype,
            "device": self.device,
        }

    def do(self, stage: Stage) -> None:
        self.seconds[stage.name] = run_stage(stage, fresh=self.fresh)


def run(
    recipe: Recipe, *, fresh: bool = False, own_prompts: bool = False, skip_rm_check: bool = False
) -> dict[str, Any]:
    """All stages; returns what stands in `<run folder>/summary.json`.

    Args:
        fresh: do every stage anew and replace what it made before.
        own_prompts: `data.train_files` and `data.val_files` are the user's: no prepare.
        skip_rm_check: train even if the RM fails its check (noted in the summary).

    Raises:
        UpsRmError: of the stage that can't go on. Interrupted: training was stopped; the same call resumes.
    """
    this = Run(recipe, fresh)
    _check_inputs(this, own_prompts)
    this.policy = resolve_model(recipe.actor_rollout_ref.model.path)
    if not own_prompts:
        _prepare(this)
    if not recipe.reward_model.model.path:
        _make_rm(this)
    _check(this, skip_rm_check)
    _train(this)
    _evaluate(this)
    return _finish(this, skip_rm_check)


def _check_inputs(this: Run, own_prompts: bool) -> None:
    """What is wrong with the named inputs is said before anything is downloaded or computed."""
    from ups_rm.data.rows import source_parts

    recipe = this.recipe
    console.print(f"device: {this.device}")
    if not own_prompts:
        source_parts(recipe.prepare.source, split=None)
    if recipe.reward_training.source and not recipe.reward_model.model.path:
        source_parts(recipe.reward_training.source, split=None)
    model = recipe.reward_model.model.path
    if model and not (Path(model).expanduser() / "config.json").is_file():
        raise RMError(
            f"{model} is not an RM folder: it has no config.json (REWARD_MODEL_PATH, reward_model.model.path)"
        )


def _prepare(this: Run) -> None:
    from ups_rm.data.prepare import prepare

    settings = this.recipe.prepare
    train, val = (Path(as_list(files)[0]) for files in (this.recipe.data.train_files, this.recipe.data.val_files))
    if train.parent != val.parent or (train.name, val.name) != ("train.parquet", "val.parquet"):
        raise RunError(
            f"prepare writes train.parquet and val.parquet into one folder, but the recipe names {train} and {val}\n"
            "  fix: set both TRAIN_DATA and VAL_DATA to use files that you have"
        )

    def action() -> None:
        prepare(
            settings.source,
            train.parent,
            subsets=settings.subsets or None,
            train_ratio=settings.train_ratio,
            shuffle=settings.shuffle,
            seed=settings.seed,
            dedup=None if settings.dedup == "none" else settings.dedup,
            group_split=settings.group_split,
            categories=tuple(settings.categories),
            max_rows=None if settings.max_rows < 0 else settings.max_rows,
            max_bad=settings.max_bad,
            progress=True,
        )

    this.do(
        Stage(
            name="prepare",
            inputs=[_source(settings.source)],
            settings={key: value for key, value in asdict(settings).items() if key != "benign_source"},
            out=train.parent,
            outputs=[train, val],
            action=action,
        )
    )
    if settings.benign_source == "none":
        return
    files = [BENIGN_FOLDER / "train.parquet", BENIGN_FOLDER / "val.parquet"]
    this.do(
        Stage(
            name="prepare-benign",
            inputs=[_source(settings.benign_source)],
            settings={},
            out=BENIGN_FOLDER,
            outputs=files,
            action=lambda: prepare_kind(settings.benign_source, BENIGN_FOLDER, "benign"),
        )
    )
    this.recipe.data.train_files = [str(train), str(files[0])]
    this.recipe.data.val_files = [str(val), str(files[1])]


def prepare_kind(source: str, out: Path, kind: Kind) -> None:
    """`prepare`, but only the prompts of one kind (by `extra_info.prompt_source`) are kept."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from ups_rm.data.prepare import prepare
    from ups_rm.errors import DataError

    prepare(source, out)
    for name in ("train.parquet", "val.parquet"):
        table = pq.read_table(out / name)
        info = table["extra_info"].combine_chunks()
        names = [info.type.field(i).name for i in range(info.type.num_fields)]
        if "prompt_source" not in names:
            raise DataError(f"{source}: its rows have no prompt_source, so harmless prompts can't be told apart")
        table = table.filter(pc.ends_with(pc.struct_field(info, "prompt_source"), kind))
        if table.num_rows == 0:
            raise DataError(f"{source}: no row's prompt_source ends in {kind!r}")
        temporary = out / f".{name}.tmp"
        pq.write_table(table, temporary)
        temporary.replace(out / name)


def _make_rm(this: Run) -> None:
    from ups_rm.reward.feature_set import FeatureSet
    from ups_rm.reward.features import extract_features
    from ups_rm.reward.head import train_head
    from ups_rm.reward.merge import merge

    settings = this.recipe.reward_training
    backbone = _backbone(this)
    sources = {"rows": settings.source or this.recipe.prepare.source}
    if settings.benign_source != "none":
        sources["benign"] = settings.benign_source
    head_folder, work = Path("merge/head"), Path("merge/features")
    if settings.lora:
        _train_lora(this, backbone, sources)
        backbone, head_folder = str(Path("merge/lora/backbone")), Path("merge/lora/head")
    else:
        files = {name: work / f"{name}.safetensors" for name in sources}

        held_out = held_out_texts(this.recipe)

        def features() -> None:
            for name, source in sources.items():
                rows = labelled_rows(this.recipe, source, held_out=held_out, benign_only=name == "benign")
                extract_features(
                    backbone, rows, files[name], max_length=settings.max_length, sources=[Path(source).name]
                )

        this.do(
            Stage(
                name="features",
                inputs=[backbone, *(_source(source) for source in sources.values())],
                settings={"max_length": settings.max_length, "sources": sources, "held_out": sorted(held_out)},
                out=work,
                outputs=list(files.values()),
                action=features,
                keeps_partial=True,
            )
        )
        options = head_settings(settings)
        this.do(
            Stage(
                name="head",
                inputs=list(files.values()),
                settings={"head": str(options)},
                out=head_folder,
                outputs=[head_folder / "head.safetensors", head_folder / "head.json"],
                action=lambda: _report_head(
                    train_head([FeatureSet.read(file) for file in files.values()], head_folder, options)
                ),
            )
        )
    this.do(
        Stage(
            name="merge",
            inputs=[backbone, head_folder],
            settings={},
            out=RM_FOLDER,
            outputs=[RM_FOLDER / "config.json", RM_FOLDER / "rm_card.json"],
            action=lambda: merge(backbone, head_folder, RM_FOLDER, overwrite=True),
        )
    )
    this.recipe.reward_model.model.path = str(RM_FOLDER)


def _backbone(this: Run) -> str:
    """The backbone as the recipe names it, trimmed or given the judge's question where it asks for that."""
    from ups_rm.reward.trim import JUDGE_TEMPLATE, trim_backbone

    settings, out = this.recipe.reward_training, Path("merge/backbone")
    source = resolve_model(settings.backbone)
    if settings.layers is None and not settings.judge:
        return source
    template = JUDGE_TEMPLATE if settings.judge else None
    this.do(
        Stage(
            name="backbone",
            inputs=[source],
            settings={"layers": settings.layers, "chat_template": template},
            out=out,
            outputs=[out / "config.json", out / "model.safetensors"],
            action=lambda: trim_backbone(source, out, layers=settings.layers, chat_template=template, overwrite=True),
        )
    )
    return str(out)


def labelled_rows(recipe: Recipe, source: str, *, held_out: set[str], benign_only: bool = False) -> list[Row]:
    """Train rows of a source without those whose prompt is held out; with `benign_only` the harmless prompts' alone.

    Raises:
        RunError: no row is left, or more bad rows than `prepare.max_bad` allows.
    """
    from ups_rm.data.prompts import kind_of
    from ups_rm.data.rows import Reject, read_rows

    settings, rejects = recipe.prepare, list[Reject]()
    subsets = (settings.subsets or None) if source == settings.source else None
    rows = list(read_rows(source, split="train", subsets=subsets, on_reject=rejects.append))
    if len(rejects) > settings.max_bad * (len(rows) + len(rejects)):
        raise RunError(f"{rejects[0]}\n  {len(rejects)} bad rows, more than prepare.max_bad={settings.max_bad} allows")
    rows = [row for row in rows if row.prompt not in held_out]
    rows = [row for row in rows if not benign_only or kind_of(row.prompt_source) == "benign"]
    if not rows:
        raise RunError(f"{source} has no labelled train rows for the RM (reward_training.source, .benign_source)")
    return rows


def held_out_texts(recipe: Recipe) -> set[str]:
    """The user turns of the validation prompts: the RM must not have seen their labels either."""
    from ups_rm.data.prompts import read_prompts

    return {row.messages[-1]["content"] for row in read_prompts(as_list(recipe.data.val_files))}


def head_settings(settings: RewardTraining) -> HeadSettings:
    """`reward_training` as the head's settings; what is not given is the head's own default."""
    from ups_rm.cli.rm_train import parse_dims
    from ups_rm.reward.head import HeadSettings

    given = {name: getattr(settings, name) for name in ("lr", "weight_decay", "dropout", "max_epochs")}
    return HeadSettings(
        hidden_dims=parse_dims(settings.hidden_dims),
        loss=settings.loss,  # type: ignore[arg-type]
        seed=settings.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


def _train_lora(this: Run, backbone: str, sources: dict[str, str]) -> None:
    from ups_rm.reward.lora import LoraSettings, train_lora

    settings, out = this.recipe.reward_training, Path("merge/lora")
    head, lora = head_settings(settings), LoraSettings(rank=settings.lora_rank, epochs=settings.lora_epochs)
    held_out = held_out_texts(this.recipe)

    def train() -> None:
        rows = [
            row
            for name, source in sources.items()
            for row in labelled_rows(this.recipe, source, held_out=held_out, benign_only=name == "benign")
        ]
        train_lora(backbone, rows, out, head, lora, max_length=settings.max_length, overwrite=True)

    this.do(
        Stage(
            name="lora",
            inputs=[backbone, *(_source(source) for source in sources.values())],
            settings={
                "head": str(head),
                "lora": str(lora),
                "held_out": sorted(held_out),
                "length": settings.max_length,
            },
            out=out,
            outputs=[out / "backbone", out / "head"],
            action=train,
        )
    )


def _check(this: Run, skip: bool) -> None:
    from ups_rm.cli.rm import print_report
    from ups_rm.data.check import check_parquet
    from ups_rm.reward.check import check_rm

    model = this.recipe.reward_model.model
    files = [Path(file) for key in ("train_files", "val_files") for file in as_list(getattr(this.recipe.data, key))]
    folder = Path("merge/check")

    def check() -> None:
        from ups_rm.data.tables import print_check as print_data_check

        prompts = check_parquet(files)
        if not prompts.ok:
            print_data_check(prompts, console)
            raise RunError("the prompts can't be trained on, see above\n  fix: ups-rm data check FILE shows each row")
        report = check_rm(model.path, device=this.device, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
        print_report(report)
        _write_json(folder / "rm_check.json", report.to_dict())
        if not report.ok and not skip:
            raise RMError(
                f"{model.path} fails its check, see above; nothing was trained\n"
                "  fix: as said there, or --skip-rm-check"
            )
        if not report.ok:
            console.print("[bold red]the RM fails its check and is trained against all the same (--skip-rm-check)[/]")

    this.do(
        Stage(
            name="check",
            inputs=[*files, model.path],
            settings={"dtype": model.dtype, "trust_remote_code": model.trust_remote_code, "skip": skip},
            out=folder,
            outputs=[folder / "rm_check.json"],
            action=check,
        )
    )


def _train(this: Run) -> None:
    from ups_rm.local.trainer import Trainer

    recipe = this.recipe
    settings = {
        key: value for key, value in recipe.as_dict().items() if key in ("data", "actor_rollout_ref", "algorithm")
    }
    settings["trainer"] = {key: value for key, value in recipe.as_dict()["trainer"].items() if key not in COSMETIC}
    result_file = this.folder / "train_result.json"

    def train() -> None:
        result = Trainer(recipe).fit()
        if result.interrupted:
            raise Interrupted(f"training stopped after step {result.steps} of {this.folder}")
        _write_json(result_file, {"steps": result.steps, "metrics": result.metrics})

    this.do(
        Stage(
            name="train",
            inputs=[
                this.policy,
                recipe.reward_model.model.path,
                *as_list(recipe.data.train_files),
                *as_list(recipe.data.val_files),
            ],
            settings=settings | this.number_formats,
            out=this.folder,
            outputs=[this.folder / "policy", result_file],
            action=train,
            keeps_partial=True,
            precious=True,
        )
    )
    this.steps = int(json.loads(result_file.read_text(encoding="utf-8"))["steps"])


def _evaluate(this: Run) -> None:
    from ups_rm.data.prompts import read_prompts
    from ups_rm.local.evaluate import evaluate, held_out_prompts
    from ups_rm.local.trainer import load_scorer

    recipe, out, after = this.recipe, this.folder / "eval", this.folder / "policy"

    def compare() -> None:
        prompts = held_out_prompts(read_prompts(as_list(recipe.data.val_files)), recipe)
        comparison = evaluate(recipe, this.policy, after, prompts, load_scorer(recipe))
        comparison.write_jsonl(out / "pairs.jsonl")
        _write_json(out / "comparison.json", comparison.summary())
        comparison.show_pairs(5)

    this.do(
        Stage(
            name="eval",
            inputs=[this.policy, after, recipe.reward_model.model.path, *as_list(recipe.data.val_files)],
            settings=recipe.as_dict()["evaluation"] | this.number_formats,
            out=out,
            outputs=[out / "comparison.json", out / "pairs.jsonl"],
            action=compare,
        )
    )


def _finish(this: Run, skipped_check: bool) -> dict[str, Any]:
    """Write `summary.json`, show the table and where everything is."""
    from ups_rm.evaluation.compare import summary_table

    comparison = json.loads((this.folder / "eval" / "comparison.json").read_text(encoding="utf-8"))
    summary = {**comparison, "seconds": {name: round(s, 1) for name, s in this.seconds.items()}, "steps": this.steps}
    if skipped_check:
        summary["rm_check"] = "skipped by --skip-rm-check"
    _write_json(this.folder / "summary.json", summary)
    console.print()
    console.print(summary_table(summary))
    for what, path in (
        ("safer policy", this.folder / "policy"),
        ("reward model", Path(this.recipe.reward_model.model.path)),
        ("before and after, reply by reply", this.folder / "eval" / "pairs.jsonl"),
        ("metrics of every step", this.folder / "metrics.jsonl"),
        ("replies of every step", Path(this.recipe.trainer.group_log_dir)),
        ("these figures", this.folder / "summary.json"),
    ):
        console.print(f"  {what:<34} {path}", soft_wrap=True)
    return summary


def _source(source: str) -> Path | str:
    """What a stage hashes for a source of rows: its files, or the name of a hub id."""
    from ups_rm.data.rows import resolve_source

    return resolve_source(source)


def _report_head(report: HeadReport) -> None:
    from ups_rm.cli.rm_train import print_head

    print_head(report)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
