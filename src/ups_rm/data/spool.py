"""What `prepare` keeps of each row between reading and writing: files on disk, nothing in memory.

A row's place in the output is known only at the end (a shuffle, a split by count, a later duplicate), so the few fields
that reach the parquet wait on disk and are fetched by number. So do the prompts' 64-bit hashes, by which repeats are
found.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ups_rm.data.digest import Digest
from ups_rm.data.hash_bag import Hashes

Numbers = npt.NDArray[np.unsignedinteger]


class Kept(NamedTuple):
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
        self._path = path
        self._records = path.open("wb+")
        self._ends = path.with_suffix(".ends").open("wb+")  # of each record, uint64
        self._hashes = path.with_suffix(".hashes").open("wb+")  # of each prompt, uint64
        self._bytes = self._rows = 0
        self.names_kinds = False  # some row's prompt_source says what kind of prompt it is

    def append(self, digest: Digest) -> None:
        """Adds the rows that the digest keeps."""
        if digest.kept is None or digest.sizes is None or not len(digest.kept):
            return
        ends = np.cumsum(digest.sizes, dtype=np.uint64) + np.uint64(self._bytes)
        self._records.write(digest.records)
        self._ends.write(ends.tobytes())
        self._hashes.write(digest.prompts[digest.kept].tobytes())
        self._bytes += len(digest.records)
        self._rows += len(ends)
        self.names_kinds = self.names_kinds or digest.names_kinds

    def __len__(self) -> int:
        return self._rows

    def batches(self, numbers: Numbers, *, rows: int, size: int) -> Iterator[list[Kept]]:
        """Rows by number, in the order given, at most so many at once and of about `size` bytes (or one row)."""
        for file in (self._records, self._ends):
            file.flush()
        if not self._rows:
            return
        ends = np.memmap(self._ends, dtype=np.uint64, mode="r", shape=(self._rows,))
        for first in range(0, len(numbers), rows):
            some = numbers[first : first + rows].astype(np.int64)
            stops = ends[some]
            starts = np.where(some > 0, ends[some - 1], np.uint64(0))
            batch = (np.cumsum(stops - starts) - (stops - starts)) // np.uint64(size)  # by the bytes before each
            for group in np.split(np.arange(len(some)), np.flatnonzero(np.diff(batch)) + 1):
                yield list(map(Kept._make, self._read(starts[group].tolist(), stops[group].tolist())))

    def _read(self, starts: list[int], stops: list[int]) -> Iterator[tuple[object, ...]]:
        """The records at some places; neighbours that follow each other are read at once."""
        if starts[1:] == stops[:-1]:
            self._records.seek(starts[0])
            together = memoryview(self._records.read(stops[-1] - starts[0]))
            for start, stop in zip(starts, stops, strict=True):
                yield marshal.loads(together[start - starts[0] : stop - starts[0]])
            return
        for start, stop in zip(starts, stops, strict=True):
            self._records.seek(start)
            yield marshal.loads(self._records.read(stop - start))

    def prompt_hashes(self) -> Hashes:
        """Hash of each row's prompt, read from disk. Shape (rows,)."""
        self._hashes.flush()
        self._hashes.seek(0)
        return np.fromfile(self._hashes, dtype=np.uint64) if self._rows else np.empty(0, dtype=np.uint64)

    def close(self) -> None:
        for file in (self._records, self._ends, self._hashes):
            file.close()
