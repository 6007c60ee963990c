"""Preparing: the reference behaviour's values, new options that do what they say, the same bytes twice."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ups_rm.data import prepare as module
from ups_rm.data.prepare import prepare
from ups_rm.data.rows import read_rows
from ups_rm.data.schema import SPLITS
from ups_rm.durable import file_sha256
from ups_rm.errors import DataError

from .conftest import Folder, RowDict, make_row, old_row, write_jsonl

FILES = ("train.parquet", "val.parquet", "rejected.jsonl", "report.json")


def with_manifests(*names: str) -> set[str]:
    return {*names, *(f".{name}.manifest.json" for name in names)}


def table(path: Path) -> list[RowDict]:
    return pq.read_table(path).to_pylist()


def prompts(path: Path) -> list[str]:
    return [row["prompt"][0]["content"] for row in table(path)]


def reference(
    train: list[RowDict], test: list[RowDict], *, train_ratio: float = 0.9, shuffle: bool = False, seed: int = 42
) -> tuple[list[RowDict], list[RowDict]]:
    """What users of the preprocessing script rely on, in its own order: index, then split, then shuffle."""

    def converted(rows: list[RowDict], split: str) -> list[RowDict]:
        labels = ("is_response_0_safe", "is_response_1_safe", "safer_response_id", "better_response_id")
        return [
            {
                "data_source": "PKU-SafeRLHF",
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "ability": "safety",
                "reward_model": {"style": "model", "ground_truth": None},
                "extra_info": {"split": split, "index": n} | {name: row.get(name) for name in labels},
            }
            for n, row in enumerate(rows)
        ]

    first, second = converted(train, "train"), converted(test, "test")
    if not second:
        cut = int(len(first) * train_ratio)
        first, second = first[:cut], first[cut:]
    if shuffle:
        random.seed(seed)
        random.shuffle(first)
        random.shuffle(second)
    return first, second


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.integers(2, 60),
    test=st.integers(0, 20),
    ratio=st.floats(0.5, 0.99),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
    nulls=st.sets(st.integers(0, 60)),
)
def test_values_equal_the_reference_behaviour(
    tmp_path: Path, train: int, test: int, ratio: float, shuffle: bool, seed: int, nulls: set[int]
) -> None:
    rows = [
        old_row(n) | ({"is_response_0_safe": None, "better_response_id": None} if n in nulls else {})
        for n in range(train + test)
    ]
    for split, part in (("train", rows[:train]), ("test", rows[train:])):
        write_jsonl(tmp_path / "pku" / "data" / "Alpaca-7B" / f"{split}.jsonl", part)
    prepare(tmp_path / "pku", tmp_path / "out", train_ratio=ratio, shuffle=shuffle, seed=seed)
    first, second = reference(rows[:train], rows[train:], train_ratio=ratio, shuffle=shuffle, seed=seed)
    assert table(tmp_path / "out" / "train.parquet") == first
    assert table(tmp_path / "out" / "val.parquet") == second


def test_columns_equal_those_that_pandas_writes(tmp_path: Path, pku_folder: Folder) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [make_row(n) for n in range(20)]
    prepare(pku_folder({"Alpaca-7B/train": rows}), tmp_path / "out")
    first, _ = reference(rows, [])
    pandas.DataFrame(first).to_parquet(tmp_path / "reference.parquet", index=False)
    ours, theirs = pq.read_schema(tmp_path / "out" / "train.parquet"), pq.read_schema(tmp_path / "reference.parquet")

    def plain(schema: pa.Schema) -> str:  # pandas 3 says large_string for what pandas 2 calls string
        return str(schema.remove_metadata()).replace("large_string", "string")

    assert plain(ours) == plain(theirs)
    assert pq.read_table(tmp_path / "out" / "train.parquet").to_pylist() == first


def test_subsets_are_read_in_order_and_counted_through(tmp_path: Path, pku_folder: Folder) -> None:
    root = pku_folder(
        {
            "Alpaca3-8B/train": [make_row(n) for n in (6, 7)],
            "Alpaca-7B/train": [make_row(n) for n in (0, 1, 2)],
            "Alpaca2-7B/train.jsonl.gz": [make_row(n) for n in (3, 4, 5)],
            "Alpaca2-7B/test": [make_row(8)],
        }
    )
    report = prepare(root, tmp_path / "out")
    assert prompts(tmp_path / "out" / "train.parquet") == [f"Question {n}?" for n in range(8)]
    assert [row["extra_info"]["index"] for row in table(tmp_path / "out" / "train.parquet")] == list(range(8))
    assert [row["extra_info"]["index"] for row in table(tmp_path / "out" / "val.parquet")] == [0]
    assert (report.train_rows, report.val_rows, report.split_from_train) == (8, 1, False)
    one = prepare(root, tmp_path / "one", subsets=["Alpaca3-8B"], train_ratio=0.5)
    assert (one.train_rows, one.val_rows, one.split_from_train) == (1, 1, True)


def test_real_rows_give_exactly_the_reference(tmp_path: Path, shared_data: Path) -> None:
    for name in ("saferlhf_sample_rows", "saferlhf_v0_labelled_rows"):
        source = shared_data / f"{name}.jsonl"
        rows = [json.loads(line) for line in source.read_text("utf-8").split("\n") if line.strip()]
        prepare(source, tmp_path / name)
        assert (table(tmp_path / name / "train.parquet"), table(tmp_path / name / "val.parquet")) == reference(rows, [])
    report = prepare(shared_data / "saferlhf_pairs.jsonl", tmp_path / "pairs", group_split=True)
    assert report.train_rows + report.val_rows == 1722
    assert report.stats.distinct_prompts == {"train": 590, "test": 0}
    assert report.shared_prompts == 0


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_bytes(tmp_path: Path, pku_folder: Folder, suffix: str) -> None:
    rows = [make_row(n) for n in range(300)]
    prepare(pku_folder({f"Alpaca-7B/train.{suffix}": rows}), tmp_path / "out", shuffle=True)
    prepare(write_jsonl(tmp_path / "expected.jsonl", rows), tmp_path / "expected", shuffle=True)
    for name in ("train.parquet", "val.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for out in ("one", "two"):
        prepare("sample", tmp_path / out, shuffle=True)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    prepare("sample", tmp_path / "three", shuffle=True, seed=7)
    assert (tmp_path / "one" / "train.parquet").read_bytes() != (tmp_path / "three" / "train.parquet").read_bytes()


def test_pairs_become_prompts_with_their_labels(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "safe_response": "good", "unsafe_response": "bad"} for n in range(10)]
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    prepare(source, tmp_path / "out")
    expected = [(row.safe, row.safer_response_id, None) for row in read_rows(source)]
    found = [row["extra_info"] for name in FILES[:2] for row in table(tmp_path / "out" / name)]
    assert [
        (
            (info["is_response_0_safe"], info["is_response_1_safe"]),
            info["safer_response_id"],
            info["better_response_id"],
        )
        for info in found
    ] == expected


def test_prompt_source_is_kept_only_where_it_says_the_kind(tmp_path: Path) -> None:
    names = ["GPT-4", "mine/benign", None, "mine/unsafe"] * 5
    rows = [make_row(n, prompt_source=name) for n, name in enumerate(names)]
    prepare(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    kept = [row["extra_info"]["prompt_source"] for name in FILES[:2] for row in table(tmp_path / "out" / name)]
    assert kept == [None, "mine/benign", None, "mine/unsafe"] * 5


def test_categories_are_kept_where_they_are_asked_for_and_the_six_fields_otherwise(tmp_path: Path) -> None:
    prepare("sample", tmp_path / "plain", shuffle=True)
    prepare("sample", tmp_path / "named", shuffle=True, keep_categories=True)
    source = {split: list(read_rows("sample", split=split)) for split in SPLITS}
    for name in FILES[:2]:
        plain, named = (table(tmp_path / out / name) for out in ("plain", "named"))
        assert not any("categories" in row["extra_info"] for row in plain)
        kept = [row["extra_info"].pop("categories") for row in named]
        assert named == plain
        assert len({tuple(one) for one in kept}) > 10
        for row, categories in zip(named, kept, strict=True):
            info = row["extra_info"]
            of_row = source[info["split"]][info["index"]]
            assert of_row.prompt == row["prompt"][0]["content"]
            assert set(categories) == {name for names in of_row.categories for name in names or ()}
            assert len(categories) == len(set(categories))


def test_rows_of_the_older_schema_name_no_categories(tmp_path: Path) -> None:
    prepare(write_jsonl(tmp_path / "old.jsonl", map(old_row, range(9))), tmp_path / "out", keep_categories=True)
    assert [row["extra_info"]["categories"] for row in table(tmp_path / "out/train.parquet")] == [[]] * 8


# the new options


def repeated(prompt_numbers: list[int], start: int = 0) -> list[RowDict]:
    return [make_row(start + n, prompt=f"p{number}") for n, number in enumerate(prompt_numbers)]


def test_dedup_keeps_the_first_row_of_each_prompt_in_each_split(tmp_path: Path, pku_folder: Folder) -> None:
    root = pku_folder({"Alpaca-7B/train": repeated([3, 1, 3, 2, 1]), "Alpaca-7B/test": repeated([1, 1, 9], start=50)})
    report = prepare(root, tmp_path / "out", dedup="prompt")
    train = table(tmp_path / "out" / "train.parquet")
    assert prompts(tmp_path / "out" / "train.parquet") == ["p3", "p1", "p2"]
    assert [row["extra_info"]["index"] for row in train] == [0, 1, 2]
    assert [row["extra_info"]["is_response_0_safe"] for row in train] == [True, False, False]  # of rows 0, 1 and 3
    assert prompts(tmp_path / "out" / "val.parquet") == ["p1", "p9"]
    assert (report.train_prompts, report.val_prompts, report.shared_prompts) == (3, 2, 1)
    assert report.stats.total_rows == 8


def test_group_split_takes_the_prompts_of_test_out_of_train(tmp_path: Path, pku_folder: Folder) -> None:
    root = pku_folder({"Alpaca-7B/train": repeated([1, 2, 3, 2]), "Alpaca-7B/test": repeated([2, 5])})
    assert prepare(root, tmp_path / "plain").shared_prompts == 1
    report = prepare(root, tmp_path / "out", group_split=True)
    assert prompts(tmp_path / "out" / "train.parquet") == ["p1", "p3"]
    assert prompts(tmp_path / "out" / "val.parquet") == ["p2", "p5"]
    assert report.shared_prompts == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 12), min_size=2, max_size=40), ratio=st.floats(0.5, 0.95))
def test_group_split_without_test_rows_moves_whole_prompts(tmp_path: Path, numbers: list[int], ratio: float) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", repeated(numbers))
    if len(set(numbers)) < 2:
        with pytest.raises(DataError, match="no train row is left"):
            prepare(source, tmp_path / "out", group_split=True, train_ratio=ratio)
        return
    report = prepare(source, tmp_path / "out", group_split=True, train_ratio=ratio)
    train, val = (prompts(tmp_path / "out" / name) for name in FILES[:2])
    assert sorted(train + val) == sorted(f"p{n}" for n in numbers)
    assert not set(train) & set(val)
    assert report.shared_prompts == 0
    order = list(dict.fromkeys(f"p{n}" for n in numbers))
    assert set(val) == set(order[len(set(train)) :])  # the prompts that appear last
    allowed = len(numbers) - int(len(numbers) * ratio)
    sizes = {prompt: val.count(prompt) for prompt in set(val)}
    assert len(val) <= allowed or len(sizes) == 1
    following = order[len(set(train)) - 1]
    assert len(val) + train.count(following) > allowed  # one more prompt would not have fitted


def test_categories_keep_rows_flagged_in_either_response(tmp_path: Path, pku_folder: Folder) -> None:
    rows = [
        make_row(n) for n in range(12)
    ]  # response 0 is flagged where n is odd, response 1 where 3 does not divide n
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, old_row(1)])
    prepare(source, tmp_path / "out", categories=["Violence"])
    kept = prompts(tmp_path / "out" / "train.parquet") + prompts(tmp_path / "out" / "val.parquet")
    assert kept == [f"Question {n}?" for n in range(12) if n % 2 or n % 3]
    with pytest.raises(DataError, match="no response is flagged with Violense; the categories there are: Violence"):
        prepare(source, tmp_path / "out", categories=["Violence", "Violense"])


def test_max_rows_cuts_each_file_after_everything_else(tmp_path: Path) -> None:
    prepare("sample", tmp_path / "all", shuffle=True)
    report = prepare("sample", tmp_path / "some", shuffle=True, max_rows=20)
    assert (report.train_rows, report.val_rows) == (20, 20)
    for name in FILES[:2]:
        assert prompts(tmp_path / "some" / name) == prompts(tmp_path / "all" / name)[:20]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_ratio": 0.0}, "train_ratio is 0.0"),
        ({"train_ratio": 1.5}, "train_ratio is 1.5"),
        ({"max_bad": -1}, "max_bad is -1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"dedup": "rows"}, "dedup is 'rows'"),
    ],
)
def test_settings_that_make_no_sense_are_errors(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        prepare("sample", tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# bad rows


def test_bad_rows_are_listed_and_the_rest_is_written(tmp_path: Path) -> None:
    lines = [make_row(n) for n in range(98)] + ["{oops", make_row(prompt="")]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    report = prepare(source, tmp_path / "out", max_bad=0.02)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejected] == [(str(source), 99), (str(source), 100)]
    assert rejected[0]["reason"].startswith("not JSON")
    assert rejected[0]["excerpt"] == "{oops"
    assert report.rejected == 2
    assert report.train_rows + report.val_rows == 98
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rejected"] == 2


def test_too_many_bad_rows_are_an_error_before_anything_is_replaced(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [make_row(n) for n in range(999)] + ["{"])
    bad = write_jsonl(tmp_path / "bad.jsonl", [make_row(n) for n in range(500)] + ["{"])
    with pytest.raises(
        DataError, match=r"(?s)bad\.jsonl:501: not JSON.*1 of 501 rows rejected \(0\.20%\).*--max-bad 0\.10%"
    ):
        prepare(bad, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == with_manifests("rejected.jsonl")
    prepare(good, tmp_path / "out")  # exactly 0.1%
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    with pytest.raises(DataError, match=r"see .*rejected\.failed\.jsonl"):
        prepare(bad, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == before
    assert json.loads((tmp_path / "out" / "rejected.failed.jsonl").read_text())["line"] == 501
    prepare(good, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == with_manifests(*FILES)


@pytest.mark.parametrize("lines", [[], [""], ["{"]])
def test_no_rows_at_all_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError, match="no train row is left"):
        prepare(source, tmp_path / "out", max_bad=1.0)
    assert not (tmp_path / "out" / "train.parquet").exists()


# what is reported


def test_the_report_describes_the_files(tmp_path: Path) -> None:
    report = prepare("sample", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told == json.loads(json.dumps(report.to_dict()))
    for name in FILES[:2]:
        assert told["written"][name]["sha256"] == file_sha256(tmp_path / "out" / name)
        assert told["written"][name]["rows"] == len(table(tmp_path / "out" / name))
        assert told["written"][name]["distinct_prompts"] == len(set(prompts(tmp_path / "out" / name)))
    assert told["prompts_shared_by_train_and_validation"] == 0
    train, test = (sum(1 for _ in read_rows("sample", split=split)) for split in SPLITS)
    assert told["read"]["rows"] == {"total": train + test, "train": train, "test": test}


def test_small_batches_and_row_groups_change_nothing_but_the_grouping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("sample", tmp_path / "whole", shuffle=True)
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    monkeypatch.setattr(module, "BATCH_BYTES", 300)
    monkeypatch.setattr(module, "ROW_GROUP_BATCHES", 3)
    prepare("sample", tmp_path / "parts", shuffle=True)
    assert table(tmp_path / "parts" / "train.parquet") == table(tmp_path / "whole" / "train.parquet")
    assert pq.ParquetFile(tmp_path / "parts" / "train.parquet").num_row_groups > 40


def test_verl_and_datasets_can_read_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    prepare("sample", tmp_path / "out")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "val.parquet"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded[0]["prompt"] == table(tmp_path / "out" / "val.parquet")[0]["prompt"]
    assert loaded[0]["reward_model"] == {"style": "model", "ground_truth": None}
