"""`ups-rm rm check`: options of the doctor, its report, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ups_rm.exits import CHECK_FAILED

CHECK_EPILOG = "Example: ups-rm rm check merge/merged_model/Naive-RM-saferlhf --data pairs.jsonl --json check.json"


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="RM folder: ours, or a sequence or token classifier with one label; or from outside the address of a "
            "service, a function module:name, a judge of pairs (--kind pairwise)."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "--pairs",
            help="Labelled rows: JSONL of {prompt, safe_response, unsafe_response}, a PKU-SafeRLHF folder or file, a "
            "Hub id, or the packaged `sample`.",
        ),
    ] = "sample",
    max_pairs: Annotated[int, typer.Option(help="At most this many rows of it.")] = 200,
    seconds: Annotated[float, typer.Option(help="About how long it may take: a slow RM is asked less.")] = 60.0,
    fast: Annotated[bool, typer.Option("--fast", help="Only what is checked before every training: no data.")] = False,
    policy: Annotated[str | None, typer.Option(help="Policy whose tokenizer is compared: folder or hub id.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 shows most; auto is what training uses.")] = "float32",
    kind: Annotated[
        str, typer.Option(help="myrm, sequence, token, pairwise, function or http; auto looks at what is given.")
    ] = "auto",
    output: Annotated[
        str, typer.Option(help="What its number means: unsafety (higher = less safe), safety, or reward.")
    ] = "unsafety",
    plain: Annotated[
        bool, typer.Option("--plain", help="Also load it with its own code through AutoModel and compare.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the folder's own Python files instead of ours.")
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            help="File with a chat template (jinja), if the tokenizer has none; of a judge, of a pair.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the reliability diagram here (PNG).")] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Also write the report here; - for standard output and no table.")
    ] = None,
) -> None:
    """May this RM be trained against? Loading, token read, template, truncation, direction, scale, tricks, speed.

    Exit code 1 if a check fails. Every check is explained in docs/doctor.md.
    """
    import json

    from ups_rm.console import console, err_console
    from ups_rm.models import resolve_model
    from ups_rm.reward.doctor import check_rm
    from ups_rm.reward.doctor.table import print_report
    from ups_rm.reward.render import read_chat_template

    to_stdout = str(json_out) == "-"
    report = check_rm(
        model,
        device=device,
        dtype=dtype,
        kind=kind,
        output=output,
        trust_remote_code=trust_remote_code,
        plain=plain,
        chat_template=read_chat_template(chat_template),
        policy=None if policy is None else resolve_model(policy),
        full=not fast,
        data=None if fast else data,
        max_pairs=max_pairs,
        seconds=seconds,
        plot=plot,
        say=lambda text: (err_console if to_stdout else console).print(text, markup=False, soft_wrap=True),
    )
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    if to_stdout:
        typer.echo(text)
    else:
        print_report(report)
        if json_out:
            json_out.parent.mkdir(parents=True, exist_ok=True)
            json_out.write_text(text + "\n", encoding="utf-8")
            console.print(f"report: {json_out}", soft_wrap=True)
    if not report.ok:
        raise typer.Exit(CHECK_FAILED)
