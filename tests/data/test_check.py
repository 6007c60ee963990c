"""The check passes what prepare writes, counts every fault, and names its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ups_rm.data.check import SHOWN_PER_KIND, CheckResult, check_parquet
from ups_rm.data.prepare import prepare
from ups_rm.durable import manifest_of
from ups_rm.errors import DataError

from .conftest import Folder, make_row, write_parquet

GOOD: dict[str, Any] = {
    "data_source": "PKU-SafeRLHF",
    "prompt": [{"role": "user", "content": "Hello?"}],
    "ability": "safety",
    "reward_model": {"style": "model", "ground_truth": None},
    "extra_info": {"split": "train", "index": 0},
}


def check_rows(tmp_path: Path, *rows: dict[str, Any]) -> CheckResult:
    return check_parquet([write_parquet(tmp_path / "rows.parquet", list(rows))])


def good(index: int, **changes: Any) -> dict[str, Any]:
    return GOOD | {"extra_info": {"split": "train", "index": index}} | changes


def test_what_prepare_writes_is_fine(tmp_path: Path) -> None:
    report = prepare("sample", tmp_path, shuffle=True)
    result = check_parquet([tmp_path / "train.parquet", tmp_path / "val.parquet"])
    assert result.ok
    assert not result.problems
    train, val = result.files
    assert (train.rows, val.rows) == (report.train_rows, report.val_rows)
    assert train.distinct_prompts == report.train_prompts
    assert train.splits == {"train": report.train_rows}
    assert train.kinds["benign"] > 0


@pytest.mark.parametrize(
    ("bad", "level", "what"),
    [
        ({"prompt": []}, "error", "`prompt` is an empty list"),
        ({"prompt": [{"role": "user", "content": " "}]}, "error", "the last message of `prompt` is empty"),
        ({"data_source": None}, "error", "`data_source` is null"),
        ({"reward_model": None}, "error", "`reward_model` has no `ground_truth`"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "warning", "`reward_model.style` is 'rule'"),
        ({"extra_info": None}, "warning", "`extra_info` is null"),
        ({"extra_info": {"split": "train", "index": None}}, "warning", "`extra_info.index` is missing"),
    ],
)
def test_each_fault_is_named_with_its_row(tmp_path: Path, bad: dict[str, Any], level: str, what: str) -> None:
    result = check_rows(tmp_path, good(0), good(1), good(2) | bad, good(3))
    (problem,) = result.problems
    assert (problem.level, problem.row) == (level, 2)
    assert problem.what.startswith(what)
    assert result.ok == (level == "warning")
    assert str(problem).startswith(f"{level}: {tmp_path / 'rows.parquet'}: row 2: ")


def test_all_faults_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    bad = [good(n, prompt=[{"role": "user", "content": ""}]) for n in range(20)]
    result = check_rows(tmp_path, *bad, good(20, data_source=None))
    assert result.counts == {"error": 21}
    assert [problem.row for problem in result.problems] == [*range(SHOWN_PER_KIND), 20]


def test_columns_repeated_indices_and_emptiness(tmp_path: Path) -> None:
    result = check_rows(tmp_path, {"prompt": GOOD["prompt"]})
    missing = {problem.what: problem.level for problem in result.problems}
    assert missing == {
        "has no column `data_source`": "error",
        "has no column `ability`": "warning",
        "has no column `reward_model`": "error",
        "has no column `extra_info`": "warning",
    }
    (problem,) = check_rows(tmp_path, good(1), good(1), good(1)).problems
    assert problem.what == "`extra_info.index` is not unique: 2 rows repeat another's"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([good(0)]).slice(0, 0), tmp_path / "none.parquet")
    assert [p.what for p in check_parquet([tmp_path / "none.parquet"]).problems] == ["has no rows"]


def test_prompts_in_two_files_are_told(tmp_path: Path, pku_folder: Folder) -> None:
    root = pku_folder(
        {"Alpaca-7B/train": [make_row(n) for n in range(5)], "Alpaca-7B/test": [make_row(3), make_row(9)]}
    )
    prepare(root, tmp_path / "out")
    result = check_parquet([tmp_path / "out" / "train.parquet", tmp_path / "out" / "val.parquet"])
    (problem,) = result.problems
    assert problem.what.startswith("1 of 2 distinct prompts also stand in")
    assert result.ok
    prepare(root, tmp_path / "out", group_split=True)
    assert not check_parquet([tmp_path / "out" / "train.parquet", tmp_path / "out" / "val.parquet"]).problems


def test_a_file_that_is_not_the_reports_is_told(tmp_path: Path) -> None:
    prepare("sample", tmp_path / "one")
    prepare("sample", tmp_path / "two", shuffle=True)
    files = [tmp_path / "one" / "train.parquet", tmp_path / "one" / "val.parquet"]
    files[0].write_bytes((tmp_path / "two" / "train.parquet").read_bytes())
    with pytest.raises(DataError, match=r"train\.parquet is damaged: train\.parquet has .* written"):
        check_parquet(files)
    manifest_of(files[0]).unlink()  # the change was meant
    (problem,) = check_parquet(files).problems
    assert problem.what.startswith("is not the file that report.json beside it describes")


def test_what_is_no_parquet_raises(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="is not a parquet file"):
        check_parquet([tmp_path / "x.parquet"])
