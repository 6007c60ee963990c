"""`ups-rm rm trim`, `rm features` and `rm train`; registered by cli/rm.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ups_rm.data.rows import Reject, Row

FEATURES_EPILOG = (
    "Example: ups-rm rm features --backbone smollm2-135m-instruct --data sample --out runs/rm/features.safetensors"
)
TRIM_EPILOG = "Example: ups-rm rm trim --backbone smollm2-135m-instruct --layers 22 --out runs/rm/judge"
TRAIN_EPILOG = (
    "Example: ups-rm rm train runs/rm/features.safetensors --out runs/rm/head --hidden-dims 256,64      "
    "With adapters: ups-rm rm train --lora --backbone smollm2-135m-instruct --data sample --out runs/rm-lora"
)

Backbone = Annotated[str, typer.Option(help="Folder or hub id of the decoder, or smollm2-135m-instruct.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Labelled rows: a folder in PKU-SafeRLHF layout, a file of rows or pairs, a Hub id, or `sample`. May come "
        "several times.",
        show_default="sample",
    ),
]
Split = Annotated[str, typer.Option(help="Rows to read: train, test, or all.")]
Template = Annotated[Path | None, typer.Option(help="File with the chat template, if not the tokenizer's own.")]
EndToken = Annotated[str | None, typer.Option(help="Special token that closes a reply, if not the template's.")]
Side = Annotated[str | None, typer.Option(help="Which tokens go when a text is too long: left or right.")]
MaxLength = Annotated[int | None, typer.Option(help="Limit in RM tokens. Default: the model's, at most 4096.")]
Pooling = Annotated[
    str, typer.Option(help="Hidden state that the head is given: last token's, or mean over all tokens.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="Number format of the backbone: auto, bfloat16, float32.")]
MaxBad = Annotated[float, typer.Option(help="Largest share of unusable rows that is tolerated.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def trim(
    out: Annotated[Path, typer.Option(help="Folder of the new backbone.")],
    backbone: Backbone = "smollm2-135m-instruct",
    layers: Annotated[int | None, typer.Option(help="How many of the first layers to keep. Default: all.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with the template. Default: one that asks whether the reply is safe.")
    ] = None,
    keep_template: Annotated[bool, typer.Option("--keep-template", help="Keep the tokenizer's own template.")] = False,
    force: Force = False,
) -> None:
    """A backbone that judges better and costs less: fewer layers, and a question after the reply."""
    from ups_rm.console import console
    from ups_rm.errors import RMError
    from ups_rm.models import resolve_model
    from ups_rm.reward.render import read_chat_template
    from ups_rm.reward.trim import JUDGE_TEMPLATE, trim_backbone

    if keep_template and chat_template is not None:
        raise RMError("--keep-template and --chat-template exclude each other")
    template = None if keep_template else read_chat_template(chat_template) or JUDGE_TEMPLATE
    trim_backbone(resolve_model(backbone), out, layers=layers, chat_template=template, overwrite=force)
    console.print(f"{out}\nnext: ups-rm rm features --backbone {out} --data sample --out FILE", soft_wrap=True)


def features(
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    backbone: Backbone = "smollm2-135m-instruct",
    data: Data = None,
    split: Split = "train",
    chat_template: Template = None,
    end_token: EndToken = None,
    truncation_side: Side = None,
    max_length: MaxLength = None,
    pooling: Pooling = "last",
    degenerate: Annotated[
        int,
        typer.Option(min=0, help="Add so many good replies with their spoiled forms, for `rm train --degenerate`."),
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_batch_tokens: Annotated[int, typer.Option(help="Upper bound of a batch, padding included.")] = 4096,
    max_bad: MaxBad = 0.001,
    force: Force = False,
) -> None:
    """Hidden state of every reply, with its labels. Goes on where an earlier start was killed."""
    from ups_rm.console import console
    from ups_rm.data.degenerate import degenerate_rows
    from ups_rm.evaluation.refusal import is_refusal
    from ups_rm.models import resolve_model
    from ups_rm.reward.features import extract_features

    sources = data or ["sample"]
    rows, rejects = _read(sources, split, max_bad)
    rows += degenerate_rows(rows, degenerate, refuses=is_refusal)
    report = extract_features(
        resolve_model(backbone),
        rows,
        out,
        **_rendering(chat_template, end_token, truncation_side, max_length),
        pooling=pooling,
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        sources=_source_names(sources),
        rejects=rejects,
        overwrite=force,
    )
    fresh = report.texts - report.resumed
    speed = f", {report.tokens_per_second:,.0f} tok/s" if fresh else ""
    console.print(
        f"{report.texts:,} distinct texts of {report.rows:,} rows ({report.resumed:,} were there, {fresh:,} computed "
        f"in {report.seconds:.0f} s{speed}; {report.truncated:,} cut to the limit; {len(rejects):,} rows rejected)"
        f"\n{out}",
        soft_wrap=True,
    )


def train(
    out: Annotated[Path, typer.Option(help="Folder of the head; with --lora: of backbone, head and RM (`rm`).")],
    features: Annotated[list[Path] | None, typer.Argument(help="Files of `rm features`, of one backbone.")] = None,
    target: Annotated[
        str, typer.Option(help="Head for safety, for helpfulness (better_response_id), or both, into OUT/helpfulness.")
    ] = "safety",
    loss: Annotated[
        str, typer.Option(help="bce (unsafe flags), severity (regression) or pairs (Bradley-Terry).")
    ] = "bce",
    hidden_dims: Annotated[str, typer.Option(help="Widths of the hidden layers; an empty text: none.")] = "256,64",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the head.")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    dropout: Annotated[float | None, typer.Option(help="On inputs and hidden units.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="bce: targets are this far from 0 and 1.")] = None,
    class_balance: Annotated[
        bool | None, typer.Option("--class-balance/--no-class-balance", help="bce: both classes weigh the same.")
    ] = None,
    calibrate: Annotated[bool | None, typer.Option("--calibrate/--no-calibrate", help="Fit the temperature.")] = None,
    contrast: Annotated[
        float | None, typer.Option(help="bce: share of the loss that compares replies to one prompt.")
    ] = None,
    helpful: Annotated[
        float | None, typer.Option(help="bce: weight of comparing better and other safe replies to harmless prompts.")
    ] = None,
    degenerate: Annotated[
        float | None, typer.Option(help="bce: weight of comparing good replies and their spoiled forms (0.1).")
    ] = None,
    max_epochs: Annotated[int | None, typer.Option()] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without a better validation loss.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts or pairs per step.")] = None,
    validation_share: Annotated[float | None, typer.Option(help="Prompts for early stopping and calibration.")] = None,
    test_share: Annotated[float | None, typer.Option(help="Prompts that are only reported on.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    evaluate: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Measure on these, too: files of features; with --lora sources of rows."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters of the backbone, too, and merge them.")] = False,
    lora_rank: Annotated[int, typer.Option()] = 16,
    lora_epochs: Annotated[int, typer.Option()] = 3,
    lora_lr: Annotated[float, typer.Option()] = 2e-4,
    lora_from_layer: Annotated[int, typer.Option(help="Adapters of lower layers are not trained: cheaper.")] = 0,
    backbone: Backbone = "smollm2-135m-instruct",
    data: Data = None,
    split: Split = "train",
    chat_template: Template = None,
    end_token: EndToken = None,
    truncation_side: Side = None,
    max_length: MaxLength = None,
    pooling: Pooling = "last",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_bad: MaxBad = 0.001,
    force: Force = False,
) -> None:
    """Train the MLP head on features for `rm merge`; or, with --lora, adapters and head on rows, merged at the end."""
    from ups_rm.console import console
    from ups_rm.errors import RMError
    from ups_rm.models import resolve_model
    from ups_rm.reward.feature_set import FeatureSet
    from ups_rm.reward.head_objective import HeadSettings, parse_dims
    from ups_rm.reward.helpful_head import HeadsReport, train_heads
    from ups_rm.reward.lora import LoraSettings, train_lora
    from ups_rm.reward.merge import merge
    from ups_rm.reward.tables import print_heads

    given = {
        "lr": lr,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "label_smoothing": label_smoothing,
        "class_balance": class_balance,
        "calibrate": calibrate,
        "contrast": contrast,
        "helpful": helpful,
        "degenerate": degenerate,
        "max_epochs": max_epochs,
        "patience": patience,
        "batch_size": batch_size,
        "validation_share": validation_share,
        "test_share": test_share,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = HeadSettings(hidden_dims=parse_dims(hidden_dims), loss=loss, seed=seed, **chosen)  # type: ignore[arg-type]
    if not lora:
        if not features:
            raise RMError(
                "no features to train on\n  fix: make them with `ups-rm rm features`, or give --lora and --data"
            )
        if out.exists() and (out / "head.json").exists() and not force:
            raise RMError(f"{out} holds a head already\n  fix: another folder, or --force to replace it")
        extra = {Path(name).stem: FeatureSet.read(name) for name in evaluate or []}
        sets = [FeatureSet.read(file) for file in features]
        print_heads(train_heads(sets, out, settings, target=target, extra=extra))  # type: ignore[arg-type]
        console.print(f"{out}", soft_wrap=True)
        return
    if features:
        raise RMError("--lora trains on rows, not on features: give --data (and --backbone) instead")
    sources = data or ["sample"]
    rows, rejects = _read(sources, split, max_bad)
    result = train_lora(
        resolve_model(backbone),
        rows,
        out,
        settings,
        LoraSettings(
            rank=lora_rank,
            alpha=2 * lora_rank,
            epochs=lora_epochs,
            lr=lora_lr,
            head_lr=lora_lr,
            from_layer=lora_from_layer,
        ),
        **_rendering(chat_template, end_token, truncation_side, max_length),
        pooling=pooling,
        device=device,
        dtype=dtype,
        sources=_source_names(sources),
        rejects=rejects,
        extra={_source_names([name])[0]: _read([name], "all", max_bad)[0] for name in evaluate or []},
        overwrite=force,
        target=target,  # type: ignore[arg-type]
    )
    print_heads(HeadsReport(result.head, result.helpfulness))
    console.print(f"{result.steps} steps, {result.seconds:.0f} s")
    merged = merge(result.backbone, result.head.folder, out / "rm", overwrite=force)
    console.print(f"RM folder, with its card: {merged.folder}", soft_wrap=True)


def _read(sources: list[str], split: str, max_bad: float) -> tuple[list[Row], list[Reject]]:
    """All rows of the sources; an error when too many lines are bad."""
    from ups_rm.data.rows import read_rows
    from ups_rm.errors import DataError

    if split not in ("train", "test", "all"):
        raise DataError(f"--split is {split!r}, expected train, test or all")
    rows: list[Row] = []
    rejects: list[Reject] = []
    for source in sources:
        rows += read_rows(source, split=None if split == "all" else split, on_reject=rejects.append)  # type: ignore[arg-type]
    if not rows and not rejects:
        raise DataError(f"{', '.join(sources)}: no rows in split {split!r}")
    if rejects and len(rejects) > max_bad * (len(rows) + len(rejects)):
        raise DataError(
            f"{rejects[0]}\n  {len(rejects)} of {len(rows) + len(rejects)} rows rejected, more than --max-bad "
            f"{max_bad:.2%} allows\n  fix: `ups-rm data prepare` lists them all in rejected.jsonl; or raise --max-bad"
        )
    return rows, rejects


def _source_names(sources: list[str]) -> list[str]:
    """Sources without the paths of this machine: a path's last part, other names as they are."""
    return [Path(source).resolve().name if Path(source).exists() else source for source in sources]


def _rendering(
    chat_template: Path | None, end_token: str | None, truncation_side: str | None, max_length: int | None
) -> dict[str, Any]:
    from ups_rm.reward.render import read_chat_template

    return {
        "chat_template": read_chat_template(chat_template),
        "end_token": end_token,
        "truncation_side": truncation_side,
        "max_length": max_length,
    }
