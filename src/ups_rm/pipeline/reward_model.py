"""Stages that make the RM from labelled rows: features, head, merge; or adapters and head together, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RunError
from ups_rm.models import resolve_model
from ups_rm.pipeline.context import Run, source_of
from ups_rm.recipe import Recipe, RewardTraining, as_list
from ups_rm.stages import Stage

if TYPE_CHECKING:
    from ups_rm.data.rows import Row
    from ups_rm.reward.head_objective import HeadSettings

DEGENERATE_ROWS = 400
"""Of each source, when `reward_training.degenerate` asks for them."""
RM_FOLDER = Path("merge/merged_model/Naive-RM-saferlhf")
HELPFULNESS_FOLDER = Path("merge/merged_model/Helpfulness-RM")
"""Of `reward_training.target=helpfulness`: beside the RM for safety that the recipe names."""


def make_rm(this: Run) -> None:
    """Backbone, features and heads (or adapters), merge; the recipe then names the RM folder."""
    from ups_rm.data.degenerate import degenerate_rows
    from ups_rm.evaluation.refusal import is_refusal
    from ups_rm.reward.feature_set import FeatureSet
    from ups_rm.reward.features import extract_features
    from ups_rm.reward.head_files import HELPFULNESS
    from ups_rm.reward.helpful_head import train_heads
    from ups_rm.reward.merge import merge
    from ups_rm.reward.tables import print_heads

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
        degenerate = DEGENERATE_ROWS if settings.degenerate else 0

        def features() -> None:
            for name, source in sources.items():
                rows = labelled_rows(this.recipe, source, held_out=held_out, benign_only=name == "benign")
                rows += degenerate_rows(rows, degenerate, refuses=is_refusal)
                extract_features(
                    backbone,
                    rows,
                    files[name],
                    max_length=settings.max_length,
                    pooling=settings.pooling,
                    sources=[Path(source).name],
                )

        this.do(
            Stage(
                name="features",
                inputs=[backbone, *(source_of(source) for source in sources.values())],
                settings={
                    "max_length": settings.max_length,
                    "pooling": settings.pooling,
                    "sources": sources,
                    "held_out": sorted(held_out),
                    "degenerate": degenerate,
                },
                out=work,
                outputs=list(files.values()),
                action=features,
                keeps_partial=True,
            )
        )
        options, target = head_settings(settings), settings.target
        second = [head_folder / HELPFULNESS] if target == "both" else []
        this.do(
            Stage(
                name="head",
                inputs=list(files.values()),
                settings={"head": str(options), **_target(settings)},
                out=head_folder,
                outputs=[head_folder / "head.safetensors", head_folder / "head.json", *second],
                action=lambda: print_heads(
                    train_heads(
                        [FeatureSet.read(file) for file in files.values()],
                        head_folder,
                        options,
                        target=target,  # type: ignore[arg-type]
                    )
                ),
            )
        )
    out = HELPFULNESS_FOLDER if settings.target == "helpfulness" else RM_FOLDER
    this.do(
        Stage(
            name="merge",
            inputs=[backbone, head_folder],
            settings={},
            out=out,
            outputs=[out / "config.json", out / "rm_card.json"],
            action=lambda: merge(backbone, head_folder, out, overwrite=True),
        )
    )
    models = this.recipe.reward_model
    (models.helpfulness if settings.target == "helpfulness" else models.model).path = str(out)


def _target(settings: RewardTraining) -> dict[str, str]:
    """The target as a stage's setting; left out for `safety`, so that heads made before there were others stay."""
    return {} if settings.target == "safety" else {"target": settings.target}


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
    from ups_rm.reward.head_objective import HeadSettings, parse_dims

    names = ("lr", "weight_decay", "dropout", "max_epochs", "helpful", "degenerate")
    given = {name: getattr(settings, name) for name in names}
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
        limits: dict[str, Any] = {"max_length": settings.max_length, "pooling": settings.pooling}
        names = [Path(source).name for source in sources.values()]
        limits["target"] = settings.target
        train_lora(backbone, rows, out, head, lora, **limits, sources=names, overwrite=True)

    this.do(
        Stage(
            name="lora",
            inputs=[backbone, *(source_of(source) for source in sources.values())],
            settings={
                "head": str(head),
                "lora": str(lora),
                "held_out": sorted(held_out),
                "length": settings.max_length,
                "pooling": settings.pooling,
                **_target(settings),
            },
            out=out,
            outputs=[out / "backbone", out / "head"],
            action=train,
        )
    )
