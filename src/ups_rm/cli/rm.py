"""`ups-rm rm trim | features | train | merge | check | card | score`: an RM from labelled rows to a folder to trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ups_rm.cli.rm_check import CHECK_EPILOG, check
from ups_rm.cli.rm_serve import SERVE_EPILOG, serve
from ups_rm.cli.rm_train import FEATURES_EPILOG, TRAIN_EPILOG, TRIM_EPILOG, features, train, trim

app = typer.Typer(no_args_is_help=True, help="Make, check and ask a reward model.")

Folder = Annotated[Path, typer.Argument(help="RM folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run the folder's own Python files instead of ours.")]
Template = Annotated[
    Path | None, typer.Option("--chat-template", help="File with a chat template (jinja), if the tokenizer has none.")
]
Side = Literal["left", "right"]
app.command(epilog=TRIM_EPILOG)(trim)
app.command(epilog=FEATURES_EPILOG)(features)
app.command(epilog=TRAIN_EPILOG)(train)
app.command(epilog=SERVE_EPILOG)(serve)
app.command(epilog=CHECK_EPILOG)(check)


@app.command(
    epilog="Example: ups-rm rm merge --backbone smollm2-135m-instruct --head runs/head "
    "--out merge/merged_model/Naive-RM-saferlhf"
)
def merge(
    backbone: Annotated[str, typer.Option(help="Folder or hub id of a decoder (Llama, Qwen2, ...).")],
    head: Annotated[Path, typer.Option(help="Head of `rm train`, or a folder with best_model.pth and config.yaml.")],
    out: Annotated[Path, typer.Option(help="The RM folder to make.")],
    helpfulness_head: Annotated[
        Path | None, typer.Option(help="Second head, trained apart. Default: HEAD/helpfulness of `--target both`.")
    ] = None,
    chat_template: Template = None,
    end_token: Annotated[str | None, typer.Option(help="Token that closes a reply, if the template has none.")] = None,
    truncation_side: Annotated[Side | None, typer.Option(help="Where long conversations are cut.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Limit in RM tokens.")] = None,
    other_backbone: Annotated[
        bool, typer.Option("--other-backbone", help="The head was trained on another copy of the backbone; I know.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Join backbone and MLP head to an RM folder that plain transformers loads; strict, and checked bit by bit."""
    from ups_rm.console import console
    from ups_rm.models import resolve_model
    from ups_rm.reward.merge import merge as run
    from ups_rm.reward.render import read_chat_template

    report = run(
        resolve_model(backbone),
        head,
        out,
        helpfulness_head=helpfulness_head,
        chat_template=read_chat_template(chat_template),
        end_token=end_token,
        truncation_side=truncation_side,
        max_length=max_length,
        other_backbone=other_backbone,
        overwrite=force,
    )
    console.print(
        f"merged {report.tensors} tensors, {report.total_bytes:,} bytes, {report.dtype}; logits bitwise those of "
        f"backbone and head; temperature {report.temperature:.3g} folded in; "
        f"left out: {', '.join(report.dropped) or 'nothing'}; "
        f"outputs: {', '.join(report.heads)}",
        soft_wrap=True,
    )
    console.print(f"RM folder: {report.folder}", soft_wrap=True)


@app.command(epilog="Example: ups-rm rm card models/my-rm --labels 'PKU-SafeRLHF is_response_i_safe'")
def card(
    folder: Folder,
    labels: Annotated[
        str | None, typer.Option(help="What the head was trained on. Default: as the old card says, else unknown.")
    ] = None,
    bos: Annotated[Literal["one", "none"] | None, typer.Option(help="BOS at the start of every rendering.")] = None,
    end_token: Annotated[str | None, typer.Option(help="Token that closes a reply; none: no token does.")] = None,
    truncation_side: Annotated[Side | None, typer.Option(help="Where long conversations are cut.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Limit in RM tokens.")] = None,
    infer: Annotated[
        bool, typer.Option("--infer", help="Take BOS, end token and limit from the template, not from the old card.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template; written into the folder.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Number format of the golden logits.")] = "float32",
    trust_remote_code: Remote = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the card; what only the old one knows is kept.")
    ] = False,
    describe: Annotated[bool, typer.Option("--describe", help="Print it for people, write nothing.")] = False,
) -> None:
    """Write rm_card.json, and README.md beside it, for an RM folder that has none; print the one that is there."""
    from ups_rm.console import console
    from ups_rm.errors import RMError
    from ups_rm.reward.card import CARD_FILE, RMCard, write_card
    from ups_rm.reward.model_card import print_card, write_model_card
    from ups_rm.reward.render import read_chat_template

    if (folder / CARD_FILE).is_file() and (describe or not force):
        found = RMCard.read(folder)
        assert found is not None
        if describe:
            print_card(found, folder)
        else:
            console.print(found.to_json(), markup=False, soft_wrap=True)
        return
    if describe:
        raise RMError(f"{folder} has no {CARD_FILE} to describe\n  fix: ups-rm rm card {folder}")
    path = write_card(
        folder,
        labels=labels,
        policy={"bos": bos, "end_token": end_token, "truncation_side": truncation_side, "max_length": max_length},
        chat_template=read_chat_template(chat_template),
        infer=infer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"card: {path}", soft_wrap=True)
    for written in write_model_card(folder):
        console.print(f"model card: {written}", soft_wrap=True)


@app.command(epilog="Example: ups-rm rm score merge/merged_model/Naive-RM-saferlhf replies.jsonl --out scored.jsonl")
def score(
    folder: Folder,
    file: Annotated[
        Path, typer.Argument(help="JSONL: messages; or prompt with response, response_0/1, safe_/unsafe_.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where the scored lines go. Default: standard output.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    max_batch_tokens: Annotated[int, typer.Option(help="Upper bound of a batch, padding included.")] = 8192,
    trust_remote_code: Remote = False,
    chat_template: Template = None,
) -> None:
    """Add logit (higher = less safe) and safe_score = sigmoid(-logit) to every line."""
    import json

    from ups_rm.console import console
    from ups_rm.durable import publishing
    from ups_rm.reward.render import read_chat_template
    from ups_rm.reward.score_file import read_lines, score_lines
    from ups_rm.reward.scorer import RewardScorer

    lines = list(read_lines(file))  # a bad line is told before the model is loaded
    scorer = RewardScorer.load(
        folder,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        max_batch_tokens=max_batch_tokens,
        chat_template=read_chat_template(chat_template),
    )
    if out is None:
        for line in score_lines(scorer, lines):
            typer.echo(json.dumps(line, ensure_ascii=False))
        return
    with publishing(out, manifest=False) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for line in score_lines(scorer, lines, progress=True):
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    console.print(f"scored {len(lines)} lines: {out}", soft_wrap=True)
