"""The benchmark of `data prepare`: all three ways give the same prompts, and its rows are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import prepare, prepare_curve
from ups_rm.data.reading import source_stats


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    prepare.write_rows(tmp_path / "rows.jsonl", 60)
    return tmp_path / "rows.jsonl"


def test_rows_have_the_size_and_the_hashes_they_should(rows: Path) -> None:
    stats = source_stats(rows)
    assert (stats.total_rows, stats.sha256_checked, stats.sha256_mismatches) == (60, 120, 0)
    assert 2700 < rows.stat().st_size / 60 < 3300


def test_all_ways_write_the_same_values(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    found = {}
    for name, way in prepare.WAYS.items():
        (tmp_path / name).mkdir()
        assert way(rows, tmp_path / name) > (0, 0)
        found[name] = [pq.read_table(tmp_path / name / f"{part}.parquet").to_pylist() for part in ("train", "val")]
    assert found["ours"] == found["plain"]
    for ours, theirs in zip(found["ours"], found["datasets"], strict=True):
        assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]


def test_the_floor_is_the_parsing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"ours": 4.0, "plain": 12.0, "datasets": 24.0, "parse": 2.0}
    monkeypatch.setattr(prepare, "measure", lambda way, _: prepare.Cost(costs[way], costs[way] * 2, costs[way] * 100))
    found = prepare.run(1, rows=3)
    cores = len(os.sched_getaffinity(0))
    assert [one.ratio for one in found[:2]] == [3.0, 6.0]
    assert [one.floor for one in found[::2]] == [4.0 / cores, 4.0, None]


def test_parsing_reads_every_line(rows: Path, tmp_path: Path) -> None:
    assert prepare.parse(rows, tmp_path) > (0, 0)
    rows.write_text(rows.read_text() + "{")
    with pytest.raises(ValueError, match="unexpected end"):
        prepare.parse(rows, tmp_path)


def test_the_curve_is_drawn_from_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_curve, "ROWS", 60)
    found = prepare_curve.run(1, (20, 120), tmp_path / "curve.png")
    assert [one.name.split(",")[1] for one in found[::3]] == [" 20 rows", " 120 rows"]
    least = {"s": 0.0, "CPU s": 0.0, "MB": 10.0}  # CPU time is counted in hundredths: 20 rows may take none
    assert not [(one.name, one.ours) for one in found if one.ours < least[one.unit]]
    assert (tmp_path / "curve.png").stat().st_size > 1000
