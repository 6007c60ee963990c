"""The fast way through a source: never another row, reject or byte than the strict way; helpers change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ups_rm.data import block_workers, columns, reading, sources
from ups_rm.data.columns import Columns, block_columns, row_columns
from ups_rm.data.hash_bag import HashBag
from ups_rm.data.prepare import prepare
from ups_rm.data.reading import source_stats
from ups_rm.data.rows import Reject, Row, read_rows
from ups_rm.data.sources import Block, Part
from ups_rm.errors import DataError, RunError

from .conftest import make_row, write_jsonl

FILES = ("train.parquet", "val.parquet", "rejected.jsonl", "report.json")
FIELDS = tuple(make_row())
HARMS = ("response_0_harm_category", "response_1_harm_category")
ODD: list[Any] = [None, True, False, 0, 1, 2, 3, 4, 1.0, 0.5, float("nan"), 2**70, -1, "", " ", "text", "caf\u00e9",
                  "\ud83d", [], ["a"], {}, {"Violence": True}, {"Violence": 1}, {"Violence": None}]  # fmt: skip
SPOILT = [b"", b"\xff", b"{", b"}", b"\r", b"\x0c", b"\xef\xbb\xbf", b"NaN", b"\\ud800", b"\x00", b"\n"]


def strict(block: Block, part: Part) -> tuple[Columns, list[Reject]]:
    """By `read_rows`, line by line."""
    rejects: list[Reject] = []
    assert part.path is not None
    part.path.write_bytes(block.data)
    rows: list[Row] = list(read_rows(part.path, on_reject=rejects.append))
    return row_columns(rows, part.split), rejects


def comparable(found: Columns) -> dict[str, str]:
    """Columns with their types: True is not 1 here."""

    def listed(value: Any) -> Any:
        return [listed(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {name: repr(listed(value)) for name, value in vars(found).items()}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(ODD), max_size=1), max_size=5),
    absent=st.lists(st.sampled_from(FIELDS), max_size=2),
    spoilt=st.none() | st.tuples(st.integers(0, 3000), st.sampled_from(SPOILT)),
)
def test_the_fast_way_gives_what_the_strict_way_gives(
    tmp_path: Path, changes: list[dict[str, Any]], absent: list[str], spoilt: tuple[int, bytes] | None
) -> None:
    rows = [make_row(n) | change for n, change in enumerate(changes)]
    rows += [{name: value for name, value in make_row(9).items() if name not in absent}]
    data = b"".join(json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows)
    if spoilt is not None:
        place = spoilt[0] % len(data)
        data = data[:place] + spoilt[1] + data[place:]
    part = Part(subset="", split="train", path=tmp_path / "rows.jsonl")
    expected, expected_rejects = strict(Block(data=data.removeprefix(b"\xef\xbb\xbf")), part)
    found, rejects, _ = block_columns(Block(data=data.removeprefix(b"\xef\xbb\xbf")), part)
    assert comparable(found) == comparable(expected)
    assert rejects == expected_rejects


def test_plain_rows_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a plain block went line by line")

    monkeypatch.setattr(columns, "parse_row", never)
    data = b"".join(json.dumps(make_row(n)).encode() + b"\n" for n in range(50))
    found, rejects, lines = block_columns(Block(data=data), Part(subset="", split="train"))
    assert (len(found), rejects, lines) == (50, [], 50)


@pytest.mark.parametrize("size", [1, 50, 1000, 3000])
def test_blocks_of_any_size_hold_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    lines = [make_row(0), "", "x" * 3000, make_row(1), b"\xff", "y" * 2999, make_row(2)]
    path = write_jsonl(tmp_path / "rows.jsonl", lines)
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 3000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", size)
    rejects: list[Reject] = []
    rows = list(read_rows(path, on_reject=rejects.append))
    assert [row.line for row in rows] == [1, 4, 7]
    assert [(reject.line, reject.reason[:20]) for reject in rejects] == [
        (3, "row is longer than 3"),
        (5, "not UTF-8: byte 0xff"),
        (6, "not JSON: Expecting "),
    ]


def test_hashes_that_are_right_only_when_joined_are_wrong(tmp_path: Path) -> None:
    row = make_row(0)
    first, second = (row[f"response_{i}_sha256"] for i in (0, 1))
    shifted = {"response_0_sha256": first[:-1], "response_1_sha256": first[-1] + second}
    stats = source_stats(write_jsonl(tmp_path / "rows.jsonl", [make_row(0), row | shifted]))
    assert (stats.sha256_checked, stats.sha256_mismatches) == (4, 2)


def test_kinds_of_prompts_that_the_categories_leave_out_add_no_column(tmp_path: Path) -> None:
    rows = [make_row(n, response_0_harm_category={"Violence": True}) for n in range(9)]
    rows += [make_row(n, prompt_source="own-benign", **dict.fromkeys(HARMS)) for n in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for out, categories, expected in ((tmp_path / "all", [], True), (tmp_path / "some", ["Violence"], False)):
        prepare(path, out, categories=categories)
        extra_info = pq.read_schema(out / "train.parquet").field("extra_info").type
        assert (extra_info.get_field_index("prompt_source") >= 0) is expected


@pytest.fixture
def rows_with_bad_ones(tmp_path: Path) -> Path:
    """3000 rows, a bad one in every hundred, one prompt in three repeated."""
    rows: list[Any] = [make_row(n, prompt=f"p{n // 3}") if n % 100 else "{" for n in range(3000)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True, "dedup": "prompt"}, {"categories": ["Violence"], "keep_categories": True}]
)
def test_helpers_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_with_bad_ones: Path, options: dict[str, Any]
) -> None:
    prepare(rows_with_bad_ones, tmp_path / "alone", max_bad=0.1, **options)
    monkeypatch.setattr(reading, "_helpers", lambda total: 2)
    monkeypatch.setattr(block_workers, "MOST_UNDER_WAY", 3)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 20_000)
    prepare(rows_with_bad_ones, tmp_path / "helped", max_bad=0.1, **options)
    for name in FILES:
        assert (tmp_path / "helped" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_helper_that_dies_ends_the_run_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_with_bad_ones: Path
) -> None:
    monkeypatch.setattr(reading, "_helpers", lambda total: 1)
    monkeypatch.setattr(block_workers.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"a process that helps to read .*rows\.jsonl ended"):
        prepare(rows_with_bad_ones, tmp_path / "out", max_bad=0.1)
    assert not list((tmp_path / "out").iterdir())


def test_an_error_of_the_source_reaches_the_caller_with_helpers_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [make_row(n) for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(reading, "_helpers", lambda total: 1)
    with pytest.raises(DataError, match="the compressed data is damaged or ends early"):
        prepare(path, tmp_path / "out")


@pytest.mark.parametrize("held", [10, 10**6])
def test_a_bag_counts_as_numpy_does_in_files_or_not(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr("ups_rm.data.hash_bag.HELD", held)
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 5000, dtype=np.uint64)[random.integers(0, 5000, 9000)]
    bag = HashBag()
    for some in np.split(hashes, 90):
        bag.add(some)
    for _ in range(2):
        assert np.array_equal(np.concatenate(list(bag.shards())), np.unique(hashes))
