"""How the first failure of a run reaches the person who started it.

verl catches exceptions prompt by prompt and goes on with what is left, or stops with "no materializable trajectories".
So whoever fails writes the reason on a board, a small Ray actor of the job; our trainer reads it after every rollout
and raises the reason itself, which Ray carries to the driver. The trainer also leaves it in a file in the run folder,
from which `ups-rm train` prints it last, under everything that verl and Ray have to say.
"""

from __future__ import annotations

import json
from pathlib import Path

from ups_rm import errors
from ups_rm.errors import RunError, UpsRmError

FAILURE_FILE = "failure.json"
BOARD_NAME = "ups_rm_failures"
BOARD_LIMIT_S = 30.0
"""The board does nothing but hold text; an answer that takes longer than this means that Ray is gone."""


class FailureBoard:
    """The Ray actor: keeps the first failure."""

    def __init__(self) -> None:
        self._first: dict[str, str] | None = None

    def post(self, failure: dict[str, str]) -> None:
        self._first = self._first or failure

    def first(self) -> dict[str, str] | None:
        return self._first


def failure_board() -> object:
    """The job's board; whoever asks first creates it."""
    import ray

    return ray.remote(FailureBoard).options(name=BOARD_NAME, get_if_exists=True, num_cpus=0).remote()


def as_failure(error: BaseException) -> dict[str, str]:
    """An error as text that any process can read: the class where it is ours, and the message."""
    kind = next((base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__), "")
    return {"kind": kind or RunError.__name__, "message": str(error) if kind else f"{type(error).__name__}: {error}"}


def as_error(failure: dict[str, str]) -> UpsRmError:
    """The error that `as_failure` wrote down."""
    kind = getattr(errors, failure["kind"], RunError)
    return kind(failure["message"]) if issubclass(kind, UpsRmError) else RunError(failure["message"])


def write_failure(folder: Path, error: BaseException) -> None:
    """Leave `failure.json` in the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FAILURE_FILE}.tmp"
    temporary.write_text(json.dumps(as_failure(error), ensure_ascii=False), encoding="utf-8")
    temporary.replace(folder / FAILURE_FILE)


def read_failure(folder: Path) -> UpsRmError | None:
    """The failure that a run left in its folder, or None."""
    file = Path(folder) / FAILURE_FILE
    return as_error(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
