"""One pass over a source that counts everything, shows progress, and says when too many rows are bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ups_rm.console import progress_bar
from ups_rm.data.rows import Reject, Row, read_parts, size_of, source_parts
from ups_rm.data.sources import Part
from ups_rm.data.stats import SourceStats, StatsCollector
from ups_rm.errors import DataError

MIB = 2**20


def read_counted(
    parts: Sequence[Part],
    *,
    on_row: Callable[[Row], None] = lambda row: None,
    on_reject: Callable[[Reject], None] = lambda reject: None,
    progress: bool = False,
) -> tuple[SourceStats, Reject | None]:
    """Reads all rows of some parts once; returns their statistics and the first bad row, if there is one."""
    collector = StatsCollector()
    first: list[Reject] = []
    shown = 0

    def hear_reject(reject: Reject) -> None:
        collector.reject()
        first[:] = first or [reject]
        on_reject(reject)

    total = size_of(parts)
    with progress_bar("reading rows", total // MIB, unit="MiB", enabled=progress) as advance:

        def on_bytes(count: int) -> None:
            nonlocal shown
            if (now := min(count, total) // MIB) > shown:
                advance(now - shown)
                shown = now

        for row in read_parts(parts, hear_reject, on_bytes):
            collector.add(row)
            on_row(row)
    return collector.result(), first[0] if first else None


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
