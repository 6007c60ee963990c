"""How every command of ours ends: one message for a mistake, a traceback only with `--debug`, the exit code.

docs/errors.md lists the codes and classes. Errors of the machine (a file that can't be read, memory that is used up)
become errors of ours here, so that they too are one message with a way out; whatever else comes up is a bug.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from ups_rm.console import emit, err_console
from ups_rm.errors import RunError, UpsRmError

CHECK_FAILED = 1
"""A check that says no: `data check`, `rm check`, `doctor`, `plan`."""
STOPPED_BY_ALARM = 3
"""A training that an alarm of `monitor.stop_on` ended."""
BUG = 70
"""An error that is nobody's input: sysexits' EX_SOFTWARE."""
INTERRUPTED = 130
"""Ctrl-C or SIGTERM, after what was under way is saved."""

_debug = False


def show_tracebacks(wanted: bool) -> None:
    """Whether errors come with their traceback from now on (`--debug`)."""
    global _debug
    _debug = wanted


def guarded(command: Callable[[], int | None]) -> int:
    """The exit code of `command`: what it returns (0 for None), or that of the error that it ends with, which is shown.

    SystemExit and KeyboardInterrupt pass through.
    """
    try:
        return command() or 0
    except Exception as error:
        return report(error)


def report(error: Exception) -> int:
    """Prints an error as its reader needs it and gives its exit code."""
    if _debug:
        traceback.print_exception(error)
    ours = as_ours(error)
    shown: Exception = ours or error
    name, text = type(shown).__name__, str(shown)
    if ours is None:
        name, text = "bug in UPS-RM", f"{name}: {text}\n  {_where(error)}fix: report it with what --debug prints"
    err_console.print(f"[bold red]{name}:[/] ", end="")
    err_console.print(text, markup=False, soft_wrap=True)
    emit("error", type=type(shown).__name__, message=text)
    return ours.exit_code if ours is not None else BUG


def as_ours(error: Exception) -> UpsRmError | None:
    """An error as one of ours: itself, a RunError for the machine's, None for a bug."""
    if isinstance(error, UpsRmError):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return RunError(
            f"memory is used up: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            "  fix: smaller ppo_micro_batch_size_per_gpu, log_prob_micro_batch_size_per_gpu and "
            "reward_model.max_batch_tokens; `ups-rm plan` says what fits"
        )
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        where = f"{error.filename}: " if error.filename is not None else ""
        return RunError(
            f"{where}{what}\n  fix: check the path, its permissions and the free space; --debug shows where"
        )
    return None


def _where(error: Exception) -> str:
    """The last line of ours that an error passed through."""
    package = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if package in Path(frame.filename).parents]
    return f"in {Path(frames[-1].filename).relative_to(package)}, line {frames[-1].lineno}; " if frames else ""
