"""Statistics equal a plain recount of the rows, and every contradiction is found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ups_rm.data.reading import source_stats
from ups_rm.data.rows import read_rows
from ups_rm.data.stats import PAIR_KINDS, SourceStats, collect_stats
from ups_rm.errors import DataError

from .conftest import RowDict, make_row, old_row, write_jsonl


def stats_of(tmp_path: Path, *rows: RowDict) -> SourceStats:
    return collect_stats(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)))


def test_the_sample_equals_a_plain_recount() -> None:
    rows = list(read_rows("sample"))
    stats = collect_stats(iter(rows))
    prompts = {split: {row.prompt for row in rows if row.split == split} for split in ("train", "test")}
    assert stats.total_rows == len(rows)
    assert stats.distinct_prompts == {split: len(found) for split, found in prompts.items()}
    assert stats.shared_prompts == len(prompts["train"] & prompts["test"])
    assert stats.distinct_responses == len({(row.prompt, text) for row in rows for text in row.responses})
    for subset in stats.subsets:
        of_subset = [row for row in rows if row.subset == subset]
        flagged = Counter(name for row in of_subset for names in row.categories for name in names or ())
        assert stats.categories[subset] == flagged
        assert stats.severity[subset] == Counter(level for row in of_subset for level in row.severity)
        assert stats.rows[subset] == Counter(row.split for row in of_subset)
    assert sum(stats.pair_share(kind) for kind in PAIR_KINDS[:3]) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2), st.sampled_from([True, False, None])),
        min_size=1,
        max_size=30,
    )
)
def test_counts_by_hash_equal_counts_by_text(tmp_path: Path, drawn: list[tuple[int, int, int, bool | None]]) -> None:
    rows = [
        make_row(
            n, prompt=f"p{p}", response_0=f"a{a}", response_1=f"b{b}", is_response_0_safe=safe, is_response_1_safe=None
        )
        for n, (p, a, b, safe) in enumerate(drawn)
    ]
    stats = stats_of(tmp_path, *rows)
    labels: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        if row["is_response_0_safe"] is not None:
            labels.setdefault((row["prompt"], row["response_0"]), set()).add(row["is_response_0_safe"])
    both = sum(len(found) == 2 for found in labels.values())
    assert stats.contradictions.texts_labelled_both_ways == both
    assert stats.distinct_prompts["train"] == len({row["prompt"] for row in rows})
    texts = {(row["prompt"], row[name]) for row in rows for name in ("response_0", "response_1")}
    assert stats.distinct_responses == len(texts)


CLEAN: dict[str, Any] = {
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "response_0_harm_category": {"Violence": False},
    "response_1_harm_category": {"Violence": True},
    "safer_response_id": 0,
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unsafe_with_severity_0", {"response_1_severity_level": 0}),
        ("safe_with_severity", {"response_0_severity_level": 1}),
        ("safe_with_category", {"response_0_harm_category": {"Violence": True}}),
        ("safer_is_the_unsafe_one", {"safer_response_id": 1}),
        ("texts_labelled_both_ways", {"response_1": "the same", "response_0": "the same"}),
    ],
)
def test_each_contradiction_is_counted_once(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    assert stats_of(tmp_path, make_row(**CLEAN)).contradictions.total == 0
    odd = stats_of(tmp_path, make_row(**(CLEAN | change))).contradictions
    assert getattr(odd, name) == 1
    assert odd.total == 1


def test_sha256_mismatches_and_better_versus_safer(tmp_path: Path) -> None:
    stats = stats_of(
        tmp_path,
        make_row(0, response_0_sha256="0" * 64, better_response_id=1, safer_response_id=0),
        make_row(1, better_response_id=0, safer_response_id=0),
        make_row(2, better_response_id=None),
        old_row(4),
    )
    assert (stats.sha256_checked, stats.sha256_mismatches) == (6, 1)
    assert stats.better_and_safer_known == 3
    assert stats.better_differs_from_safer == 1


def test_unlabelled_rows_are_left_out_of_the_shares(tmp_path: Path) -> None:
    safe = {"is_response_0_safe": True, "is_response_1_safe": True}
    stats = stats_of(tmp_path, make_row(0, **safe), make_row(1, **safe), make_row(2, is_response_1_safe=None))
    assert stats.pair_count("unlabelled") == 1
    assert stats.pair_share("both safe") == 1.0


def test_source_stats_tolerates_few_bad_rows_only(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [make_row(0), "{", make_row(1)])
    assert source_stats(source, max_bad=0.5).rejected == 1
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl:2: not JSON.*1 of 3 rows rejected \(33\.33%\)"):
        source_stats(source)
    with pytest.raises(DataError, match="has no rows"):
        source_stats(write_jsonl(tmp_path / "empty.jsonl", []))


def test_the_report_form_is_plain_json_in_a_fixed_order() -> None:
    first, second = (json.dumps(collect_stats(read_rows("sample")).to_dict()) for _ in range(2))
    assert first == second
    assert json.loads(first)["pairs"]["mixed"]["share"] == pytest.approx(0.15, abs=0.02)


def test_real_rows(shared_data: Path) -> None:
    stats = collect_stats(read_rows(shared_data / "saferlhf_sample_rows.jsonl"))
    assert (stats.total_rows, stats.sha256_checked, stats.sha256_mismatches) == (10, 20, 0)
    assert stats.pair_count("mixed") == 2
