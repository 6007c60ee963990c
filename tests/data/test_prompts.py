"""Prompts are read from our parquet and from any other in verl's schema, and what can't be answered is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ups_rm.data.prepare import prepare
from ups_rm.data.prompts import categories_of, distinct_prompts, kind_of, prompt_problem, read_prompts
from ups_rm.data.rows import read_rows
from ups_rm.errors import DataError

from .conftest import make_row, write_jsonl, write_parquet


def verl_row(content: Any, **changes: Any) -> dict[str, Any]:
    return {"data_source": "other", "prompt": [{"role": "user", "content": content}]} | changes


def test_prompts_of_the_sample_know_their_kind(tmp_path: Path) -> None:
    prepare("sample", tmp_path)
    rows = read_prompts([tmp_path / "train.parquet", tmp_path / "val.parquet"])
    assert [row.index for row in rows] == list(range(len(rows)))
    kinds = {row.prompt: row.prompt_source for row in read_rows("sample")}
    for row in rows:
        assert row.messages[0]["role"] == "user"
        assert kinds[row.messages[0]["content"]] == f"UPS-RM-sample/{row.kind}"
    assert rows[0].extra_info["split"] == "train"
    assert rows[-1].extra_info["split"] == "test"


def test_parquet_made_by_others_needs_only_prompts(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    path = write_parquet(
        tmp_path / "own.parquet",
        [
            verl_row("Hi", extra_info={"index": 9, "prompt_source": "x/benign"}),
            verl_row("Hello?", prompt=system, extra_info=None),
        ],
    )
    first, second = read_prompts(path)
    assert (first.index, first.kind, first.extra_info["index"]) == (0, "benign", 9)
    assert (second.index, second.kind, second.extra_info) == (1, "unsafe", {})
    assert second.messages == system
    assert len(read_prompts(write_parquet(tmp_path / "bare.parquet", [{"prompt": system}]))) == 1


def test_a_distinct_prompt_has_the_categories_of_all_its_rows(tmp_path: Path) -> None:
    rows = [make_row(n, prompt=f"p{n % 2}") for n in range(4)]
    for n, names in enumerate((["Drugs"], [], ["Violence", "Drugs"], [])):
        for i in (0, 1):
            rows[n][f"response_{i}_harm_category"] = dict.fromkeys(names, i == 1)
    prepare(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", keep_categories=True, train_ratio=1)
    read = read_prompts(tmp_path / "out/train.parquet")
    assert [categories_of(row) for row in read] == [("Drugs",), (), ("Violence", "Drugs"), ()]
    assert [(row.index, categories_of(row)) for row in distinct_prompts(read)] == [(0, ("Drugs", "Violence")), (1, ())]
    assert distinct_prompts(read)[1] is read[1]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "`prompt` is an empty list"),
        (None, "`prompt` is NoneType, expected a list of messages"),
        ("text", "`prompt` is str, expected a list of messages"),
        ([{"role": "user"}], "`prompt[0]` has no role and content"),
        ([{"role": "human", "content": "Hi"}], "`prompt[0].role` is 'human', expected one of system, user"),
        ([{"role": "user", "content": None}], "`prompt[0].content` is NoneType, expected text"),
        ([{"role": "user", "content": "  \n"}], "the last message of `prompt` is empty"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "`prompt` ends with the assistant's turn",
        ),
    ],
)
def test_what_cannot_be_answered(prompt: Any, problem: str) -> None:
    assert prompt_problem(prompt).startswith(problem)
    assert prompt_problem([{"role": "user", "content": "fine"}]) == ""


def test_errors_name_file_row_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.parquet: no such file"):
        read_prompts(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"text\.parquet: is not a parquet file"):
        read_prompts(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="has no column `prompt`, only question"):
        read_prompts(write_parquet(tmp_path / "other.parquet", [{"question": "?"}]))
    bad = write_parquet(tmp_path / "bad.parquet", [verl_row("a"), verl_row("b"), verl_row(" ")])
    with pytest.raises(DataError, match=r"bad\.parquet: row 2: the last message of `prompt` is empty"):
        read_prompts(bad)
    empty = tmp_path / "empty.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": pa.array([], pa.list_(pa.string()))}), empty)
    with pytest.raises(DataError, match=r"empty\.parquet: has no rows"):
        read_prompts(empty)


def test_kind_is_the_ending_of_the_source() -> None:
    assert kind_of("mine/benign") == "benign"
    assert kind_of("UPS-RM-sample/unsafe") == "unsafe"
    assert kind_of("GPT-4") is None
    assert kind_of(None) is None
