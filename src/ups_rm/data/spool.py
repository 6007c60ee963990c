"""What `prepare` keeps of each row between reading and writing: a temporary file on disk, 24 bytes a row in memory.

A row's place in the output is known only at the end (a shuffle, a split by count, a later duplicate), so the few fields
that reach the parquet wait on disk and are fetched by number. The prompts' 64-bit hashes stay in memory for finding
repeats.
"""

from __future__ import annotations

import marshal
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ups_rm.data.rows import Row, text_hash


@dataclass(frozen=True)
class Kept:
    """The fields of a row that go into the parquet."""

    prompt: str
    is_response_0_safe: bool | None
    is_response_1_safe: bool | None
    safer_response_id: int | None
    better_response_id: int | None
    prompt_source: str | None


class Spool:
    """Rows of one split, appended once and then read by number in any order.

    The records are Python's marshal format: the file never outlives the process that wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb+")
        self._offsets = array("Q", [0])
        self._hashes = array("Q")
        self.names_kinds = False  # some row's prompt_source says what kind of prompt it is

    def append(self, row: Row, prompt_source: str | None) -> None:
        record = marshal.dumps(
            (
                row.prompt,
                row.is_response_0_safe,
                row.is_response_1_safe,
                row.safer_response_id,
                row.better_response_id,
                prompt_source,
            )
        )
        self._file.write(record)
        self._offsets.append(self._offsets[-1] + len(record))
        self._hashes.append(text_hash(row.prompt))
        self.names_kinds = self.names_kinds or prompt_source is not None

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, number: int) -> Kept:
        start, end = self._offsets[number], self._offsets[number + 1]
        self._file.seek(start)
        return Kept(*marshal.loads(self._file.read(end - start)))

    @property
    def prompt_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row's prompt. Shape (rows,)."""
        return np.frombuffer(self._hashes, dtype=np.uint64) if len(self) else np.empty(0, dtype=np.uint64)

    def close(self) -> None:
        self._file.close()
