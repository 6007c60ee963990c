"""One pass over a source that counts everything, shows progress, and says when too many rows are bad."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ups_rm.console import progress_bar
from ups_rm.data.block_workers import HELP_FROM, MOST_HELPERS, Wanted, digests
from ups_rm.data.digest import Digest
from ups_rm.data.rows import Reject, size_of, source_parts
from ups_rm.data.sources import Block, Part, iter_blocks
from ups_rm.data.stats import SourceStats, StatsCollector
from ups_rm.errors import DataError

MIB = 2**20


def read_counted(
    parts: Sequence[Part],
    *,
    wanted: Wanted | None = None,
    on_digest: Callable[[Digest], None] = lambda digest: None,
    progress: bool = False,
) -> tuple[SourceStats, Reject | None]:
    """Reads all rows of some parts once; returns their statistics and the first bad row, if there is one.

    Args:
        wanted: what the digests are to keep of the rows; nothing by default.
        on_digest: hears of each digest, in the order of the rows.
    """
    collector = StatsCollector()
    first: Reject | None = None
    shown = done = 0
    total = size_of(parts)
    with progress_bar("reading rows", total // MIB, unit="MiB", enabled=progress) as advance:

        def on_bytes(count: int) -> None:  # of the present part
            nonlocal shown
            if (now := min(done + count, total) // MIB) > shown:
                advance(now - shown)
                shown = now

        def blocks() -> Iterator[tuple[Block, Part]]:
            nonlocal done
            for part in parts:
                for block in iter_blocks(part, on_bytes):
                    yield block, part
                done += size_of([part])

        for digest in digests(blocks(), wanted or Wanted(), helpers=_helpers(total)):
            collector.add(digest)
            on_digest(digest)
            first = first or next(iter(digest.rejects), None)
    return collector.result(), first


def _helpers(total: int) -> int:
    """How many processes are to help with so many bytes: those that the free cores allow, none for few bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MOST_HELPERS) if total >= HELP_FROM else 0


def too_many_bad(stats: SourceStats, max_bad: float) -> bool:
    """Whether the share of rejected rows is above what is tolerated."""
    return stats.rejected > max_bad * (stats.total_rows + stats.rejected)


def bad_rows_message(stats: SourceStats, max_bad: float, first: Reject | None) -> str:
    """The first bad row, how many there are, and how many are tolerated."""
    read = stats.total_rows + stats.rejected
    share = stats.rejected / read
    return (
        f"{first}\n  {stats.rejected} of {read} rows rejected ({share:.2%}), more than --max-bad {max_bad:.2%} allows"
    )


def source_stats(
    source: Path | str, *, subsets: Sequence[str] | None = None, max_bad: float = 0.001, progress: bool = False
) -> SourceStats:
    """Statistics of a source. Raises DataError when more than `max_bad` of its rows are unusable, or it has none."""
    stats, first = read_counted(source_parts(source, subsets=subsets), progress=progress)
    if too_many_bad(stats, max_bad):
        raise DataError(
            bad_rows_message(stats, max_bad, first)
            + "\n  fix: ups-rm data prepare lists them all in rejected.jsonl; or raise --max-bad"
        )
    if not stats.total_rows:
        raise DataError(f"{source}: has no rows")
    return stats
