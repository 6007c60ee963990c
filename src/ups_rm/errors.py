"""The mistakes that UPS-RM reports, one class per kind.

Every message says what is wrong, where (file, line, field), the number that shows it, and the way out. The command line
prints the message alone and exits with the class's code (exits.py, docs/errors.md); from Python they are ordinary
exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class UpsRmError(Exception):
    """Base of all errors that are the input's or the setting's fault rather than a bug of ours."""

    exit_code: ClassVar[int] = 2
    """Of a command that ends with it."""


class RecipeError(UpsRmError):
    """A recipe key or value that does not exist, has the wrong type, or contradicts another."""


class DataError(UpsRmError):
    """Rows, parquet or JSONL files that can't be read or don't have the agreed form."""


class RMError(UpsRmError):
    """A reward model folder, card, head or score that can't be trusted."""


class PolicyError(UpsRmError):
    """A policy model or tokenizer that can't be loaded or does not fit the recipe."""


class NumberError(UpsRmError):
    """NaN or infinity in a training step: `tensor` says in what, `rows` in which replies of the batch."""

    def __init__(self, tensor: str, rows: Sequence[int] = ()) -> None:
        where = f" in replies {', '.join(map(str, rows))} of the batch" if rows else ""
        super().__init__(f"{tensor} is not finite{where}")
        self.tensor, self.rows = tensor, tuple(rows)


class CheckpointError(UpsRmError):
    """A checkpoint that is missing, incomplete or belongs to another recipe."""


class RunError(UpsRmError):
    """A stage of the run that can't start or go on: missing extra, existing output, full disk."""


class RMServerError(UpsRmError):
    """A reward server that can't start, can't be reached, or refuses a request."""


class PlanError(UpsRmError):
    """A capacity plan that can't be made: an unknown architecture or GPU, or a layout that does not divide."""
