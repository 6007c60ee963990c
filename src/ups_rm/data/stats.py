"""What the rows of a source are like, counted while they stream by, in memory that does not grow with them.

Distinct prompts, prompts shared by train and test, and texts labelled both ways are found by 64-bit hashes (see
`digest.py`), so these counts are exact but for a chance of about 3e-8 per million rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np

from ups_rm.data.columns import row_columns
from ups_rm.data.digest import Digest, PairLabels, ReplyLabels, digest
from ups_rm.data.hash_bag import HashBag, distinct
from ups_rm.data.rows import Row
from ups_rm.data.schema import HARM_CATEGORIES, MAX_SEVERITY, SPLITS, Split

FOLD_AT = 20_000
PAIR_KINDS = ("both safe", "both unsafe", "mixed", "unlabelled")


@dataclass
class Contradictions:
    """Labels that contradict each other. All but the last count responses or rows; the rows stay in the data."""

    unsafe_with_severity_0: int = 0
    safe_with_severity: int = 0
    safe_with_category: int = 0
    safer_is_the_unsafe_one: int = 0
    texts_labelled_both_ways: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass
class SourceStats:
    """Counts over a source. Shares are over labelled rows.

    `pairs[subset][kind]` counts rows by PAIR_KINDS; `categories[subset][name]` counts responses flagged with a harm;
    `severity[subset][level]` counts responses; `rows[subset][split]` counts rows.
    """

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    pairs: dict[str, Counter[str]] = field(default_factory=dict)
    categories: dict[str, Counter[str]] = field(default_factory=dict)
    severity: dict[str, Counter[int]] = field(default_factory=dict)
    distinct_prompts: dict[str, int] = field(default_factory=dict)
    shared_prompts: int = 0
    distinct_responses: int = 0
    better_differs_from_safer: int = 0
    better_and_safer_known: int = 0
    sha256_checked: int = 0
    sha256_mismatches: int = 0
    contradictions: Contradictions = field(default_factory=Contradictions)
    rejected: int = 0

    @property
    def total_rows(self) -> int:
        return sum(sum(counts.values()) for counts in self.rows.values())

    @property
    def subsets(self) -> list[str]:
        return list(self.rows)

    def split_rows(self, split: str) -> int:
        return sum(counts[split] for counts in self.rows.values())

    def pair_count(self, kind: str) -> int:
        return sum(counts[kind] for counts in self.pairs.values())

    def pair_share(self, kind: str) -> float:
        """Share of a pair kind among rows whose two labels are known; 0 where none is."""
        labelled = self.total_rows - self.pair_count("unlabelled")
        return self.pair_count(kind) / labelled if labelled else 0.0

    def category_names(self) -> list[str]:
        """The 19 names that occur, in the published order, then any others by name."""
        seen = set().union(*self.categories.values()) if self.categories else set()
        return [name for name in HARM_CATEGORIES if name in seen] + sorted(seen - set(HARM_CATEGORIES))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, for report.json. Keys are sorted, so that equal data gives equal bytes."""
        return {
            "rows": {"total": self.total_rows, **{split: self.split_rows(split) for split in SPLITS}},
            "distinct_prompts": dict(sorted(self.distinct_prompts.items())),
            "prompts_shared_by_train_and_test": self.shared_prompts,
            "distinct_responses": self.distinct_responses,
            "pairs": {kind: {"rows": self.pair_count(kind), "share": self.pair_share(kind)} for kind in PAIR_KINDS[:3]}
            | {"unlabelled": {"rows": self.pair_count("unlabelled")}},
            "better_differs_from_safer": self.better_differs_from_safer,
            "sha256": {"checked": self.sha256_checked, "mismatches": self.sha256_mismatches},
            "contradictions": asdict(self.contradictions),
            "rejected": self.rejected,
            "by_subset": {
                subset: {
                    "rows": dict(sorted(self.rows[subset].items())),
                    "pairs": dict(sorted(self.pairs[subset].items())),
                    "severity": {str(level): self.severity[subset][level] for level in range(MAX_SEVERITY + 1)},
                    "categories": {name: self.categories[subset][name] for name in self.category_names()},
                }
                for subset in self.subsets
            },
        }


class StatsCollector:
    """Adds up digests, in the order of the source: `add` each, then `result`."""

    def __init__(self) -> None:
        self._stats = SourceStats()
        self._prompts = {split: HashBag() for split in SPLITS}
        self._texts = HashBag()
        self._unlabelled = HashBag()
        self._pairs: dict[Split, Counter[PairLabels]] = {split: Counter() for split in SPLITS}
        self._replies: Counter[ReplyLabels] = Counter()

    def add(self, digest: Digest) -> None:
        stats = self._stats
        stats.rejected += len(digest.rejects)
        stats.sha256_checked += digest.sha256_checked
        stats.sha256_mismatches += digest.sha256_mismatches
        self._prompts[digest.split].add(digest.prompts)
        self._texts.add(digest.texts)
        self._unlabelled.add(digest.unlabelled)
        self._pairs[digest.split].update(digest.pairs)
        self._replies.update(digest.replies)
        if len(self._replies) > FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        """Turn the counts of labels, of which there are few different ones, into those of `SourceStats`."""
        stats = self._stats
        for split, pairs in self._pairs.items():
            for pair, count in pairs.items():
                if pair[0] not in stats.rows:
                    for counts in (stats.rows, stats.pairs, stats.categories, stats.severity):
                        counts[pair[0]] = Counter()
                stats.rows[pair[0]][split] += count
                self._add_pairs(pair, count)
            pairs.clear()
        for reply, count in self._replies.items():
            self._add_replies(reply, count)
        self._replies.clear()

    def _add_pairs(self, labels: PairLabels, count: int) -> None:
        stats = self._stats
        subset, *safe, safer, better = labels
        stats.pairs[subset][pair_kind(labels[1], labels[2])] += count
        if safer is not None and better is not None:
            stats.better_and_safer_known += count
            stats.better_differs_from_safer += count * (safer != better)
        if safer is not None and safe[safer] is False and safe[1 - safer] is True:
            stats.contradictions.safer_is_the_unsafe_one += count

    def _add_replies(self, labels: ReplyLabels, count: int) -> None:
        stats, odd = self._stats, self._stats.contradictions
        subset, safe, severity, categories = labels
        for name in categories or ():
            stats.categories[subset][name] += count
        if severity is not None:
            stats.severity[subset][severity] += count
        odd.unsafe_with_severity_0 += count * (safe is False and severity == 0)
        odd.safe_with_severity += count * (safe is True and bool(severity))
        odd.safe_with_category += count * (safe is True and bool(categories))

    def result(self) -> SourceStats:
        self._fold()
        stats, one = self._stats, np.uint64(1)
        stats.distinct_prompts = dict.fromkeys(SPLITS, 0)
        for train, test in zip(self._prompts["train"].shards(), self._prompts["test"].shards(), strict=True):
            stats.distinct_prompts["train"] += len(train)
            stats.distinct_prompts["test"] += len(test)
            stats.shared_prompts += len(np.intersect1d(train, test, assume_unique=True))
        for texts, unlabelled in zip(self._texts.shards(), self._unlabelled.shards(), strict=True):
            # texts that differ in the lowest bit only have both labels
            both = np.count_nonzero(texts[:-1] >> one == texts[1:] >> one)
            stats.contradictions.texts_labelled_both_ways += int(both)
            stats.distinct_responses += len(distinct(np.concatenate([texts >> one, unlabelled >> one])))
        return stats


def pair_kind(safe_0: bool | None, safe_1: bool | None) -> str:
    """Which of PAIR_KINDS a row is by its two labels."""
    if safe_0 is None or safe_1 is None:
        return "unlabelled"
    if safe_0 != safe_1:
        return "mixed"
    return "both safe" if safe_0 else "both unsafe"


def collect_stats(rows: Iterable[Row]) -> SourceStats:
    """Counts over rows as `read_rows` yields them."""
    collector = StatsCollector()
    for split, some in groupby(rows, key=lambda row: row.split):
        while batch := list(islice(some, 1000)):
            collector.add(digest(row_columns(batch, split), []))
    return collector.result()
