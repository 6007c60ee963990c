"""Many 64-bit hashes, counted distinct in little memory: beyond HELD of them they wait in files by their first bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
HELD = 2**19
SHARDS = 32


def distinct(hashes: Hashes) -> Hashes:
    """The different values, sorted; several times as fast as np.unique, which hashes integers first."""
    hashes = np.sort(hashes)
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


class HashBag:
    """Hashes with repeats; `shards` gives them back distinct. Temporary files, gone with the bag."""

    def __init__(self) -> None:
        self._held: list[Hashes] = []
        self._count = 0
        self._files: list[IO[bytes]] = []

    def add(self, hashes: Hashes) -> None:
        self._held.append(hashes)
        self._count += len(hashes)
        if self._count > HELD:
            self._files = self._files or [tempfile.TemporaryFile() for _ in range(SHARDS)]  # noqa: SIM115
            for file, shard in zip(self._files, self._by_shard(), strict=True):
                file.write(shard.tobytes())
            self._held, self._count = [], 0

    def shards(self) -> Iterator[Hashes]:
        """The distinct hashes, sorted, in SHARDS pieces from the smallest on; every bag is cut at the same places."""
        for number, shard in enumerate(self._by_shard()):
            if self._files:
                file = self._files[number]
                file.seek(0)
                shard = np.concatenate([np.frombuffer(file.read(), dtype=np.uint64), shard])
                file.seek(0, 2)
            yield distinct(shard)

    def _by_shard(self) -> list[Hashes]:
        hashes = np.sort(np.concatenate([*self._held, np.empty(0, dtype=np.uint64)]))
        cuts = np.arange(1, SHARDS, dtype=np.uint64) * np.uint64(2**64 // SHARDS)
        return np.split(hashes, np.searchsorted(hashes, cuts))
