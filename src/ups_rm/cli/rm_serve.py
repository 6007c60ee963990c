"""`ups-rm rm serve`: the reward model behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

SERVE_EPILOG = "Example: ups-rm rm serve merge/merged_model/Naive-RM-saferlhf --port 8500"


def serve(
    folder: Annotated[Path, typer.Argument(help="RM folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one and prints it.")] = 8500,
    device: Annotated[
        list[str] | None, typer.Option(help="One copy of the RM on each: --device cuda:0 --device cuda:1. [cpu]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    max_batch_tokens: Annotated[int, typer.Option(help="Upper bound of a batch, padding included.")] = 8192,
    max_waiting: Annotated[int, typer.Option(help="Conversations accepted and unanswered; beyond it 429.")] = 4096,
    max_body_mb: Annotated[float, typer.Option(help="Largest request.")] = 16.0,
    answer_seconds: Annotated[float, typer.Option(help="Longest time to an answer; beyond it 503.")] = 600.0,
    by_request: Annotated[
        bool, typer.Option("--by-request", help="Batch each request by itself: the same logits to the last bit.")
    ] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, mode 600. Default: UPS_RM_TOKEN, if set.")
    ] = None,
    policy_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer of OpenRLHF's policy. Default: the RM's own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the folder's own Python files instead of ours.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Chat template (jinja), if the tokenizer has none.")
    ] = None,
) -> None:
    """Answer /score, OpenRLHF's /get_reward and vLLM's /classify until SIGTERM or Ctrl-C, losing nothing accepted."""
    from ups_rm.console import console
    from ups_rm.reward.client import TOKEN_VARIABLE
    from ups_rm.reward.native import load_tokenizer
    from ups_rm.reward.render import read_chat_template
    from ups_rm.reward.scorer import RewardScorer
    from ups_rm.reward.server import Limits, RewardServer, listen
    from ups_rm.reward.server_guard import read_token

    token = read_token(token_file, os.environ.get(TOKEN_VARIABLE))
    limits = Limits(max_waiting=max_waiting, max_body_bytes=int(max_body_mb * 2**20), answer_seconds=answer_seconds)
    listener = listen(host, port, token)
    scorers = [
        RewardScorer.load(
            folder,
            device=one,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_batch_tokens=max_batch_tokens,
            chat_template=read_chat_template(chat_template),
        )
        for one in device or ["cpu"]
    ]
    server = RewardServer(
        scorers,
        name=folder.name,
        listener=listener,
        token=token,
        limits=limits,
        policy_tokenizer=load_tokenizer(policy_tokenizer) if policy_tokenizer else None,
        by_request=by_request,
    )
    server.end_on_signals()
    console.print(
        f"{folder.name} on {', '.join(device or ['cpu'])} answers at {server.url} "
        f"({'token needed' if token else 'no token'})",
        soft_wrap=True,
        markup=False,
    )
    server.run()
    console.print("all accepted requests are answered")
