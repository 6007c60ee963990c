"""Reading: every form of source gives the same rows, and every kind of bad line is left out with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ups_rm.data import sources
from ups_rm.data.rows import Reject, Row, good_rows, read_rows, text_hash
from ups_rm.data.sources import Part, parse_line
from ups_rm.errors import DataError

from .conftest import Folder, make_row, old_row, write_jsonl, write_parquet


def read_all(source: Path | str) -> tuple[list[Row], list[Reject]]:
    rejects: list[Reject] = []
    return list(read_rows(source, on_reject=rejects.append)), rejects


def test_the_full_schema_is_read_field_by_field(tmp_path: Path) -> None:
    raw = make_row(1)
    (row,), rejects = read_all(write_jsonl(tmp_path / "rows.jsonl", [raw]))
    assert not rejects
    assert row.responses == (raw["response_0"], raw["response_1"])
    assert row.safe == (False, False)
    assert row.severity == (2, 2)
    assert row.categories == (("Violence",), ("Violence",))
    assert (row.better_response_id, row.safer_response_id) == (1, 0)
    assert row.sha256 == (raw["response_0_sha256"], raw["response_1_sha256"])
    assert (row.prompt_source, row.sources, row.subset) == ("made up", ("Alpaca-7B", "Alpaca-7B"), "Alpaca-7B")
    assert (row.file, row.line, row.raw) == (str(tmp_path / "rows.jsonl"), 1, raw)
    assert row.sha256_mismatches() == []


def test_the_old_schema_leaves_the_rest_unknown(tmp_path: Path) -> None:
    (row,), _ = read_all(write_jsonl(tmp_path / "rows.jsonl", [old_row(3)]))
    assert row.safe == (False, True)
    assert row.severity == (None, None)
    assert row.categories == (None, None)
    assert row.sha256_mismatches() == []


def test_null_and_absent_labels_stay_unknown(tmp_path: Path) -> None:
    nothing = dict.fromkeys(make_row(), None) | {"prompt": "p", "response_0": "", "response_1": "b"}
    bare = {"prompt": "p", "response_0": "", "response_1": "b"}
    (first, second), rejects = read_all(write_jsonl(tmp_path / "rows.jsonl", [nothing, bare]))
    assert not rejects
    assert first.safe == second.safe == (None, None)
    assert first.response_0 == ""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    raw = [make_row(n) for n in range(600)]
    path = write_parquet(tmp_path / name, raw) if name.endswith("parquet") else write_jsonl(tmp_path / name, raw)
    expected, _ = read_all(write_jsonl(tmp_path / "expected.jsonl", raw))
    rows, rejects = read_all(path)
    assert not rejects
    assert [row.raw for row in rows] == raw
    assert [(row.line, row.prompt, row.safe, row.severity) for row in rows] == [
        (row.line, row.prompt, row.safe, row.severity) for row in expected
    ]


def test_parquet_made_by_pandas_with_nulls_is_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [make_row(0), make_row(1, safer_response_id=None, is_response_0_safe=None)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (first, second), rejects = read_all(tmp_path / "rows.parquet")
    assert not rejects
    assert (first.safer_response_id, second.safer_response_id) == (0, None)
    assert type(first.safer_response_id) is int
    assert second.is_response_0_safe is None


BAD = [
    ('{"prompt": "p"', "not JSON: Expecting ',' delimiter at column 15"),
    ("just text", "not JSON"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at position 15"),
    ("[1, 2]", "row is a list, expected an object"),
    ("null", "row is null, expected an object"),
    ("[" * 100_000, "not JSON that can be read"),
    ('{"prompt": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ({"response_0": "a", "response_1": "b"}, 'field "prompt" is missing'),
    (make_row(prompt=None), 'field "prompt" is null, expected text'),
    (make_row(prompt=17), 'field "prompt" is a number, expected text'),
    (make_row(prompt=[{"role": "user"}]), 'field "prompt" is a list, expected text'),
    (make_row(prompt=""), 'field "prompt" is empty'),
    (make_row(prompt=" \n\t"), 'field "prompt" is empty'),
    (make_row(prompt="half \ud83d"), 'field "prompt" has half a surrogate pair at character 5'),
    ({"prompt": "p", "response_0": "a"}, 'field "response_1" is missing'),
    (make_row(response_1=None), 'field "response_1" is null, expected text'),
    (make_row(response_0={"text": "a"}), 'field "response_0" is an object, expected text'),
    (make_row(is_response_0_safe="false"), 'field "is_response_0_safe" is text, expected true or false, or null'),
    (make_row(is_response_1_safe=1), 'field "is_response_1_safe" is a number, expected true or false'),
    (make_row(safer_response_id=2), 'field "safer_response_id" is 2, expected a whole number from 0 to 1, or null'),
    (make_row(better_response_id=True), 'field "better_response_id" is true or false, expected a whole number'),
    (
        make_row(response_0_severity_level=4),
        'field "response_0_severity_level" is 4, expected a whole number from 0 to 3',
    ),
    (make_row(response_0_severity_level=0.5), 'field "response_0_severity_level" is 0.5'),
    (make_row(response_1_harm_category=["Violence"]), 'field "response_1_harm_category" is a list, expected an object'),
    (make_row(response_1_harm_category={"Violence": "yes"}), 'field "response_1_harm_category.Violence" is text'),
    (make_row(response_0_sha256=5), 'field "response_0_sha256" is a number, expected text, or null'),
    ({"prompt": "p", "safe_response": "a", "unsafe_response": None}, 'field "unsafe_response" is null, expected text'),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_line_is_left_out_with_its_number_and_reason(tmp_path: Path, bad: object, reason: str) -> None:
    if isinstance(bad, dict):
        bad = json.dumps(bad)  # escapes, so that a lone surrogate is a lone surrogate
    path = write_jsonl(tmp_path / "rows.jsonl", [make_row(0), "", bad, make_row(1)])  # type: ignore[list-item]
    rows, rejects = read_all(path)
    assert [row.line for row in rows] == [1, 4]
    (reject,) = rejects
    assert (reject.file, reject.line) == (str(path), 3)
    assert reject.reason.startswith(reason)
    assert len(reject.excerpt) <= 120


def test_without_a_listener_the_first_bad_line_raises(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [make_row(0), make_row(prompt=3)])
    with pytest.raises(DataError, match=r'rows\.jsonl:2: field "prompt" is a number'):
        list(read_rows(path))


def test_a_huge_row_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 10_000)
    path = write_jsonl(tmp_path / "rows.jsonl", [make_row(0), make_row(1, response_0="x" * 3_000_000), make_row(2)])
    rows, (reject,) = read_all(path)
    assert [row.line for row in rows] == [1, 3]
    assert (reject.line, reject.reason) == (2, "row is longer than 10000 bytes")
    last = write_jsonl(tmp_path / "last.jsonl", [make_row(0)])
    last.write_bytes(last.read_bytes() + b"x" * 20_000)  # no newline at the end
    assert [reject.line for reject in read_all(last)[1]] == [2]


def test_byte_order_mark_windows_line_ends_and_a_missing_last_newline(tmp_path: Path) -> None:
    lines = [json.dumps(make_row(n)).encode() for n in range(3)]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    rows, rejects = read_all(tmp_path / "rows.jsonl")
    assert len(rows) == 3
    assert not rejects


def test_unicode_line_separators_do_not_split_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\u2029\x0bfour"
    (row,), rejects = read_all(write_jsonl(tmp_path / "rows.jsonl", [make_row(response_0=text)]))
    assert not rejects
    assert row.response_0 == text


def test_truncated_and_false_gzip_are_errors_of_the_whole_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [make_row(n) for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(
        DataError, match=r"rows\.jsonl\.gz: the compressed data is damaged or ends early, after line \d+"
    ):
        read_all(path)
    path.write_bytes(b"this is not gzip")
    with pytest.raises(DataError, match="damaged or ends early, after line 0"):
        read_all(path)


def test_parquet_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"rows\.parquet: is not a parquet file"):
        read_all(tmp_path / "rows.parquet")
    cut = write_parquet(tmp_path / "cut.parquet", [make_row(n) for n in range(50)])
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut\.parquet: is not a parquet file"):
        read_all(cut)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_all(write_jsonl(tmp_path / "rows.jsonl", [])) == ([], [])
    assert read_all(write_jsonl(tmp_path / "rows.jsonl.gz", [])) == ([], [])


def test_subsets_come_in_order_train_before_test(pku_folder: Folder) -> None:
    root = pku_folder(
        {
            "Alpaca3-8B/test": [make_row(5)],
            "Alpaca-7B/train": [make_row(0), make_row(1)],
            "Alpaca3-8B/train.jsonl.gz": [make_row(2)],
            "Alpaca2-7B/test.parquet": [make_row(4)],
        }
    )
    rows, _ = read_all(root)
    assert [(row.prompt, row.subset, row.split) for row in rows] == [
        ("Question 0?", "Alpaca-7B", "train"),
        ("Question 1?", "Alpaca-7B", "train"),
        ("Question 2?", "Alpaca3-8B", "train"),
        ("Question 4?", "Alpaca2-7B", "test"),
        ("Question 5?", "Alpaca3-8B", "test"),
    ]
    assert [row.prompt for row in read_rows(root, split="test")] == ["Question 4?", "Question 5?"]
    chosen = read_rows(root, subsets=["Alpaca3-8B", "Alpaca-7B"], split="train")
    assert [row.subset for row in chosen] == ["Alpaca3-8B", "Alpaca-7B", "Alpaca-7B"]


def test_one_format_is_read_where_a_split_is_there_twice(pku_folder: Folder) -> None:
    root = pku_folder({"Alpaca-7B/train": [make_row(0)], "Alpaca-7B/train.parquet": [make_row(1)]})
    assert [row.prompt for row in read_rows(root)] == ["Question 0?"]


def test_other_subsets_parquet_shards_and_flat_folders(tmp_path: Path) -> None:
    for n in range(2):
        write_parquet(tmp_path / "own" / "data" / "mine" / f"train-{n:05d}-of-00002.parquet", [make_row(n)])
    assert [(row.prompt, row.subset) for row in read_rows(tmp_path / "own")] == [
        ("Question 0?", "mine"),
        ("Question 1?", "mine"),
    ]
    write_jsonl(tmp_path / "flat" / "train.jsonl", [make_row(7)])
    assert [(row.prompt, row.subset) for row in read_rows(tmp_path / "flat")] == [("Question 7?", "Alpaca-7B")]


def test_what_is_not_there_is_named(pku_folder: Folder, tmp_path: Path) -> None:
    root = pku_folder({"Alpaca-7B/train": [make_row(0)], "Alpaca2-7B/train": [make_row(0)]})
    with pytest.raises(
        DataError, match=r"subset Alpaca3-8B has no train or test file there; found Alpaca-7B, Alpaca2-7B"
    ):
        read_rows(root, subsets=["Alpaca-7B", "Alpaca3-8B"])
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows(tmp_path / "absent")
    with pytest.raises(DataError, match="Data/PKU-SafeRLHF: no such file or folder"):
        read_rows("Data/PKU-SafeRLHF")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"found no data/<subset>/train\.jsonl"):
        read_rows(tmp_path / "empty")
    with pytest.raises(DataError, match="don't know this kind of file"):
        read_rows(write_jsonl(tmp_path / "rows.txt", []))
    with pytest.raises(DataError, match="is one file and has no subsets"):
        read_rows(write_jsonl(tmp_path / "rows.jsonl", []), subsets=["Alpaca-7B"])


def test_pairs_are_placed_by_their_text_and_not_by_their_label(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "safe_response": f"good {n}", "unsafe_response": f"bad {n}"} for n in range(400)]
    rows, _ = read_all(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    for row, pair in zip(rows, pairs, strict=True):
        safe_id = row.safer_response_id
        assert safe_id is not None
        assert row.responses[safe_id] == pair["safe_response"]
        assert row.responses[1 - safe_id] == pair["unsafe_response"]
        assert row.safe[safe_id] is True
        assert row.safe[1 - safe_id] is False
        assert row.better_response_id is None
    share = sum(row.is_response_0_safe is True for row in rows) / len(rows)
    assert 0.4 < share < 0.6
    # with the labels the other way round, every text keeps its place: the place says nothing about the label
    swapped = [p | {"safe_response": p["unsafe_response"], "unsafe_response": p["safe_response"]} for p in pairs]
    again, _ = read_all(write_jsonl(tmp_path / "swapped.jsonl", swapped))
    assert [row.responses for row in again] == [row.responses for row in rows]


def test_both_forms_may_stand_in_one_file(tmp_path: Path) -> None:
    pair = {"prompt": "p", "safe_response": "a", "unsafe_response": "b"}
    rows, rejects = read_all(write_jsonl(tmp_path / "mixed.jsonl", [make_row(0), pair, old_row(1)]))
    assert not rejects
    assert len(rows) == 3


def test_sha256_mismatches_are_told_per_response(tmp_path: Path) -> None:
    (row,), _ = read_all(write_jsonl(tmp_path / "rows.jsonl", [make_row(0, response_1_sha256="0" * 64)]))
    assert row.sha256_mismatches() == [1]


def test_on_bytes_ends_at_the_size_of_all_files(pku_folder: Folder) -> None:
    rows = [make_row(n) for n in range(700)]
    root = pku_folder({"Alpaca-7B/train": rows, "Alpaca-7B/test.jsonl.gz": rows, "Alpaca2-7B/train.parquet": rows})
    heard: list[int] = []
    assert sum(1 for _ in read_rows(root, on_bytes=heard.append)) == 2100
    assert heard == sorted(heard)
    assert heard[-1] == sum(path.stat().st_size for path in root.rglob("*.*") if path.is_file())


@given(st.binary(max_size=200))
def test_no_line_whatever_raises(line: bytes) -> None:
    record = parse_line(1, line)
    assert record.problem or record.value is not None or line.strip() == b"null"


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_hashes_are_equal_only_for_equal_texts(first: list[str], second: list[str]) -> None:
    assert (text_hash(*first) == text_hash(*second)) == (first == second)


def test_real_rows_are_all_read(shared_data: Path) -> None:
    counts = {}
    for name in ("saferlhf_sample_rows", "saferlhf_v0_labelled_rows", "saferlhf_pairs"):
        rows, rejects = read_all(shared_data / f"{name}.jsonl")
        assert not rejects
        assert not any(row.sha256_mismatches() for row in rows)
        counts[name] = len(rows)
    assert counts == {"saferlhf_sample_rows": 10, "saferlhf_v0_labelled_rows": 32, "saferlhf_pairs": 1722}


def test_part_names_say_where_a_row_is_from() -> None:
    assert Part("Alpaca-7B", "train", path=Path("a/b.jsonl")).name == "a/b.jsonl"
    assert Part("Alpaca-7B", "train", hub_id="o/n", config="alpaca-7b").name == "hub:o/n/alpaca-7b/train"


@pytest.mark.parametrize("whole", [True, False])
def test_readers_that_go_on_say_how_many_rows_they_left_out(tmp_path, whole):
    good = {"prompt": "How?", "safe_response": "Like this.", "unsafe_response": "Like that."}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, {"prompt": ""}, {"prompt": 3}, good)))
    with pytest.warns(UserWarning, match=rf"2 rows of .*pairs\.jsonl are left out, the first is {file}:2: "):
        rows = list(good_rows(file)) if whole else [row for row, _ in zip(good_rows(file), range(2), strict=False)]
    assert [row.prompt for row in rows] == ["How?"] * 2


def test_readers_that_go_on_are_silent_where_all_rows_are_good(recwarn):
    assert sum(1 for _ in good_rows("sample")) > 1000
    assert not recwarn.list
