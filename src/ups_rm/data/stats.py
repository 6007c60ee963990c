"""What the rows of a source are like, counted while they stream by: 32 bytes a row in memory, whatever the texts'
length.

Distinct prompts, prompts shared by train and test, and texts labelled both ways are found by 64-bit hashes (see
`rows.text_hash`), so these counts are exact but for a chance of about 3e-8 per million rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ups_rm.data.rows import Row, text_hash
from ups_rm.data.schema import HARM_CATEGORIES, MAX_SEVERITY, SPLITS

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
    """Counts rows one by one: `add` each, then `result`."""

    def __init__(self) -> None:
        self._stats = SourceStats()
        self._prompts = {split: array("Q") for split in SPLITS}
        self._texts = array("Q")  # hash of (prompt, response), its lowest bit replaced by the safety label
        self._unlabelled_texts = array("Q")

    def add(self, row: Row) -> None:
        stats = self._stats
        if row.subset not in stats.rows:
            for counts in (stats.rows, stats.pairs, stats.categories, stats.severity):
                counts[row.subset] = Counter()
        stats.rows[row.subset][row.split] += 1
        stats.pairs[row.subset][pair_kind(row)] += 1
        self._prompts[row.split].append(text_hash(row.prompt))
        self._add_responses(row)
        safer, better = row.safer_response_id, row.better_response_id
        if safer is not None and better is not None:
            stats.better_and_safer_known += 1
            stats.better_differs_from_safer += safer != better
        if safer is not None and row.safe[safer] is False and row.safe[1 - safer] is True:
            stats.contradictions.safer_is_the_unsafe_one += 1
        stats.sha256_checked += sum(value is not None for value in row.sha256)
        stats.sha256_mismatches += len(row.sha256_mismatches())

    def _add_responses(self, row: Row) -> None:
        odd = self._stats.contradictions
        for text, safe, severity, categories in zip(row.responses, row.safe, row.severity, row.categories, strict=True):
            self._stats.categories[row.subset].update(categories or ())
            if severity is not None:
                self._stats.severity[row.subset][severity] += 1
            odd.unsafe_with_severity_0 += safe is False and severity == 0
            odd.safe_with_severity += safe is True and bool(severity)
            odd.safe_with_category += safe is True and bool(categories)
            hashed = text_hash(row.prompt, text) & ~1
            if safe is None:
                self._unlabelled_texts.append(hashed)
            else:
                self._texts.append(hashed | safe)

    def reject(self) -> None:
        self._stats.rejected += 1

    def result(self) -> SourceStats:
        stats = self._stats
        unique = {split: np.unique(_as_numpy(hashes)) for split, hashes in self._prompts.items()}
        stats.distinct_prompts = {split: len(values) for split, values in unique.items()}
        stats.shared_prompts = len(np.intersect1d(unique["train"], unique["test"], assume_unique=True))
        texts = np.unique(_as_numpy(self._texts))
        pairs_of_labels = texts[:-1] >> np.uint64(1) == texts[1:] >> np.uint64(1)
        stats.contradictions.texts_labelled_both_ways = int(np.count_nonzero(pairs_of_labels))
        unlabelled = np.unique(_as_numpy(self._unlabelled_texts) >> np.uint64(1))
        stats.distinct_responses = len(np.union1d(texts >> np.uint64(1), unlabelled))
        return stats


def _as_numpy(hashes: array[int]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, dtype=np.uint64)


def pair_kind(row: Row) -> str:
    """Which of PAIR_KINDS a row is."""
    if None in row.safe:
        return "unlabelled"
    if row.is_response_0_safe != row.is_response_1_safe:
        return "mixed"
    return "both safe" if row.is_response_0_safe else "both unsafe"


def collect_stats(rows: Iterator[Row]) -> SourceStats:
    """Counts over rows as `read_rows` yields them."""
    collector = StatsCollector()
    for row in rows:
        collector.add(row)
    return collector.result()
