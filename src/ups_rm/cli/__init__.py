"""The `ups-rm` command: wiring only. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ups_rm.cli import data, doctor, evaluate, export, groups, models, plan, replay, report, rm, run, runs, study, train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a language model safer by GRPO against your own reward model.\n\n"
    "Example: **ups-rm run** does the whole way on a laptop; **ups-rm COMMAND --help** shows an example of each.",
)
app.add_typer(data.app, name="data")
app.add_typer(rm.app, name="rm")
app.add_typer(models.app, name="models")
app.command(name="run", epilog=run.EPILOG)(run.run)
app.command(name="train", epilog=train.TRAIN_EPILOG)(train.train)
app.command(name="eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(name="study", epilog=study.EPILOG)(study.study)
app.command(name="runs", epilog=runs.EPILOG)(runs.runs)
app.command(name="groups", epilog=groups.EPILOG)(groups.groups)
app.command(name="report", epilog=report.REPORT_EPILOG)(report.report)
app.command(name="watch", epilog=report.WATCH_EPILOG)(report.watch)
app.command(name="export", epilog=export.EPILOG)(export.export)
app.command(name="replay", epilog=replay.EPILOG)(replay.replay)
app.command(name="plan", epilog=plan.EPILOG)(plan.plan)
app.command(name="doctor", epilog=doctor.EPILOG)(doctor.doctor)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors. May stand anywhere.")] = False,
) -> None:
    """Options of all commands."""
    from ups_rm.exits import show_tracebacks

    show_tracebacks(debug)


def main() -> None:
    """Entry point: an error becomes one message and its exit code (exits.py), Ctrl-C becomes 130."""
    from ups_rm.console import err_console, set_output
    from ups_rm.device import rest_idle_threads
    from ups_rm.exits import INTERRUPTED, guarded, show_tracebacks

    rest_idle_threads()
    given = sys.argv[1:]
    arguments = [word for word in given if word != "--debug"]
    try:
        sys.exit(guarded(lambda: app(args=["--debug", *arguments] if len(arguments) < len(given) else arguments)))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            err_console.print("\ninterrupted; the same command goes on from the last finished stage or checkpoint")
        raise
    finally:
        set_output()  # whoever calls this from Python prints as always afterwards
        show_tracebacks(False)
