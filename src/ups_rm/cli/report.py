"""`ups-rm report` and `ups-rm watch`: a run to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

REPORT_EPILOG = (
    "Example: ups-rm report runs/ups-rm/quickstart      "
    "Several runs in one page: ups-rm report runs/first runs/second --out compared.html"
)
WATCH_EPILOG = "Example: ups-rm watch runs/ups-rm/quickstart --port 8600"

Runs = Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="Run folders; the first is shown first.")]


def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="The HTML file.", show_default="RUN/report.html")] = None,
) -> None:
    """Write one HTML file with answer, curves, replies, reward model, data and recipe of a run; opens offline."""
    from ups_rm.console import console
    from ups_rm.report import write_report

    file = write_report(runs, out)
    console.print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", soft_wrap=True, markup=False)


def watch(
    runs: Runs,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one and prints it.")] = 8600,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, mode 600. Default: UPS_RM_TOKEN, if set.")
    ] = None,
) -> None:
    """Serve the report of a run while it goes on: the page brings itself up to date. Ends with SIGTERM or Ctrl-C."""
    from ups_rm.console import console
    from ups_rm.report.watch import WatchServer
    from ups_rm.reward.client import TOKEN_VARIABLE
    from ups_rm.reward.server import listen
    from ups_rm.reward.server_guard import read_token

    token = read_token(token_file, os.environ.get(TOKEN_VARIABLE))
    server = WatchServer(runs, listener=listen(host, port, token), token=token)
    server.end_on_signals()
    console.print(
        f"{', '.join(str(run) for run in runs)}: open {server.url} ({'token as password' if token else 'no token'})",
        soft_wrap=True,
        markup=False,
    )
    server.run()
    console.print("no longer served")
