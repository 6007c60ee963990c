"""What `prepare` keeps of each row between reading and writing: files on disk, nothing in memory.

A row's place in the output is known only at the end (a shuffle, a split by count, a later duplicate), so the few fields
that reach the parquet wait on disk and are fetched by number. So do the prompts' 64-bit hashes, by which repeats are
found.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ups_rm.data.digest import KeptRows
from ups_rm.data.hash_bag import Hashes

T = TypeVar("T")
Numbers = npt.NDArray[np.uint32]  # of rows, 4 bytes each: a source of four billion rows is not expected


@dataclass(frozen=True)
class Batch:
    """n rows: prompts in UTF-8 one behind the other, with the n + 1 places where they begin and end; `labels` (n, 4),
    `kinds` (n,) and `harms` (n,) as in KeptRows.
    """

    texts: bytes
    offsets: npt.NDArray[np.int32]
    labels: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.int32]
    harms: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.kinds)


class Spool:
    """Rows of one split, appended once and then read by number in any order."""

    def __init__(self, path: Path) -> None:
        names = ("texts", "ends", "labels", "kinds", "harms", "hashes")
        self._files = {name: path.with_suffix(f".{name}").open("wb+") for name in names}
        self._bytes = self._rows = 0
        self._sources: dict[str, int] = {}
        self._harm_sets: dict[tuple[str, ...], int] = {}

    @property
    def sources(self) -> list[str]:
        """The prompt_sources that `Batch.kinds` points to; empty where none says what kind of prompt it is."""
        return list(self._sources)

    @property
    def harm_sets(self) -> list[tuple[str, ...]]:
        """The harms that `Batch.harms` points to."""
        return list(self._harm_sets)

    def append(self, rows: KeptRows) -> None:
        """Adds rows."""
        columns: dict[str, npt.NDArray[Any]] = {
            "ends": np.cumsum(rows.sizes) + self._bytes,
            "labels": rows.labels,
            "kinds": _renumbered(rows.kinds, rows.sources, self._sources),
            "harms": _renumbered(rows.harms, rows.harm_sets, self._harm_sets),
            "hashes": rows.hashes,
        }
        for name, values in columns.items():
            self._files[name].write(values.tobytes())
        self._files["texts"].write(rows.texts)
        self._bytes += len(rows.texts)
        self._rows += len(rows.sizes)

    def __len__(self) -> int:
        return self._rows

    def batches(self, numbers: Numbers, *, rows: int, size: int) -> Iterator[Batch]:
        """Rows by number, in the order given, at most so many at once and of about `size` bytes (or one row)."""
        if not self._rows:
            return
        maps = {name: self._map(name) for name in ("ends", "labels", "kinds", "harms")}
        ends, labels = np.frombuffer(maps["ends"], np.int64), np.frombuffer(maps["labels"], np.uint8).reshape(-1, 4)
        kinds, harms = np.frombuffer(maps["kinds"], np.int32), np.frombuffer(maps["harms"], np.int32)
        self._files["texts"].flush()
        for first in range(0, len(numbers), rows):
            for one in maps.values():
                _give_back(one)
            some = numbers[first : first + rows].astype(np.int64)
            stops = ends[some]
            starts = np.where(some > 0, ends[some - 1], 0)
            before = np.cumsum(stops - starts) - (stops - starts)
            for group in np.split(np.arange(len(some)), np.flatnonzero(np.diff(before // size)) + 1):
                offsets = np.zeros(len(group) + 1, dtype=np.int32)
                np.cumsum(stops[group] - starts[group], out=offsets[1:])
                texts = self._read(starts[group], stops[group])
                yield Batch(texts, offsets, labels[some[group]], kinds[some[group]], harms[some[group]])

    def _map(self, name: str) -> mmap.mmap:
        self._files[name].flush()
        return mmap.mmap(self._files[name].fileno(), 0, access=mmap.ACCESS_READ)

    def _read(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> bytes:
        """The texts at some places, one behind the other; neighbours that follow each other are read at once."""
        file = self._files["texts"]
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        pieces = []
        for first, last in zip([0, *breaks], [*breaks - 1, len(starts) - 1], strict=True):
            file.seek(starts[first])
            pieces.append(file.read(stops[last] - starts[first]))
        return b"".join(pieces)

    def prompt_hashes(self) -> Hashes:
        """Hash of each row's prompt, read from disk. Shape (rows,)."""
        file = self._files["hashes"]
        file.flush()
        file.seek(0)
        return np.fromfile(file, dtype=np.uint64) if self._rows else np.empty(0, dtype=np.uint64)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _give_back(pages: mmap.mmap) -> None:
    """What was read of a file counts as this process's memory until it says that it needs no more of it."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _renumbered(places: npt.NDArray[np.int32], names: Sequence[T], known: dict[T, int]) -> npt.NDArray[np.int32]:
    """Places in `names` as places in `known`, which takes in what it lacks; -1 stays -1."""
    if not names:
        return places
    new = [known.setdefault(name, len(known)) for name in names]
    return np.array([*new, -1], dtype=np.int32)[places]  # -1 is the last of them
