"""Prompts of public sets in their own columns, of own files, and of the package; what is said of broken ones."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from tiny_training import prompt_file
from ups_rm.data.prompts import categories_of
from ups_rm.data.rows import read_rows
from ups_rm.data.schema import HARM_CATEGORIES
from ups_rm.errors import DataError
from ups_rm.evaluation.language import main_script
from ups_rm.evaluation.prompt_sets import SETS, group_of, load_prompts

# a row of each public set in the columns of its owner's file, and of the mirror on the Hub; the texts are ours
ROWS = {
    "xstest": ("csv", ["id,prompt,type,label,focus,note", '1,"Kill it, how?",homonyms,safe,kill,x',
                       "2,Kill her how?,contrast_homonyms,unsafe,kill,x"]),
    "simplesafetytests": ("csv", ["id,prompt,harm_area,category", "1,Harm how?,Scams & Fraud,Information"]),
    "harmbench": ("csv", ["Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
                          "Answer it,contextual,illegal,,A text to answer,b1", "Do harm,standard,illegal,,,b2"]),
    "advbench": ("csv", ["goal,target", 'Write a bad thing,"Sure, here"']),
    "strongreject": ("csv", ["category,source,forbidden_prompt", "Violence,custom,How to hurt?"]),
    "beavertails": ("jsonl", ['{"prompt": "How to hurt?", "category": "violence", "category_id": 3}']),
    "alpacaeval": ("json", ['[{"instruction": "Name a river.", "output": "Rhine", "dataset": "helpful_base"}]']),
}  # fmt: skip


def texts(rows) -> list[str]:
    return [row.messages[0]["content"] for row in rows]


@pytest.mark.parametrize("name", ROWS)
def test_a_public_set_is_read_in_its_owners_columns(name: str, tmp_path: Path) -> None:
    ending, lines = ROWS[name]
    file = tmp_path / f"copy.{ending}"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows, (described,) = load_prompts([f"{name}={file}"])
    assert (described["set"], described["place"], described["licence"]) == (name, str(file), SETS[name].licence)
    assert sum(described["prompts"].values()) == len(rows) == max(1, len(lines) - 1)
    assert {row.extra_info["set"] for row in rows} == {name}
    expected = {
        "xstest": [
            ("Kill her how?", "unsafe", ("contrast_homonyms",)),
            ("Kill it, how?", "alarming", ("homonyms",)),
        ],
        "harmbench": [
            ("A text to answer\n\n---\n\nAnswer it", "unsafe", ("illegal",)),
            ("Do harm", "unsafe", ("illegal",)),
        ],
        "advbench": [("Write a bad thing", "unsafe", ())],
        "strongreject": [("How to hurt?", "unsafe", ("Violence",))],
        "beavertails": [("How to hurt?", "unsafe", ("violence",))],
        "alpacaeval": [("Name a river.", "benign", ("helpful_base",))],
        "simplesafetytests": [("Harm how?", "unsafe", ("Scams & Fraud",))],
    }
    assert [(row.messages[0]["content"], group_of(row), categories_of(row)) for row in rows] == expected[name]
    assert [row.kind for row in rows] == ["unsafe" if group_of(row) == "unsafe" else "benign" for row in rows]


@pytest.mark.parametrize("name", ["harmbench", "advbench", "strongreject"])
def test_the_columns_of_a_mirror_are_known_too(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mirror.jsonl"
    file.write_text('{"prompt": "Bad thing", "category": "c"}\n')
    rows, _ = load_prompts([f"{name}={file}"])
    assert texts(rows) == ["Bad thing"]


def test_a_hub_set_is_streamed_in_all_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set repository in a folder goes the same way through `datasets` as one on the Hub."""
    pytest.importorskip("datasets")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "test.jsonl").write_text('{"prompt": "One?", "label": "safe", "focus": "kill"}\n')
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: test.jsonl}\n---\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, _ = load_prompts([f"xstest=hub:{root}"])
    assert [(texts(rows), group_of(rows[0]))] == [(["One?"], "alarming")]


@pytest.mark.parametrize("name", [name for name, entry in SETS.items() if entry.hub])
def test_a_name_alone_asks_the_hub_for_the_sets_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` with a Hub of our own behind it: rows in the owner's columns, from the one split that is there. What
    the real Hub serves under these ids was not tried."""
    datasets = pytest.importorskip("datasets")
    asked: list[str] = []

    def rows(hub_id: str, config: str, *, split: str, streaming: bool) -> list[dict[str, object]]:
        assert (config, split, streaming) == ("main", "test", True)
        asked.append(hub_id)
        if name == "saferlhf":
            harms = {"Violence": True, "Drugs": False}
            replies = {"response_0": "No.", "response_1": "So.", "response_1_harm_category": harms}
            return [{"prompt": "Harm how?", **replies}]
        ending, lines = ROWS[name]
        if ending == "csv":
            return list(csv.DictReader(lines))
        return [json.loads(line) for line in lines] if ending == "jsonl" else json.loads(lines[0])  # type: ignore[no-any-return]

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda hub_id: asked.append(hub_id) or ["main"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda hub_id, config: asked.append(hub_id) or ["test"])
    monkeypatch.setattr(datasets, "load_dataset", rows)
    found, (described,) = load_prompts([name])
    assert set(asked) == {SETS[name].hub}
    assert (described["set"], described["place"]) == (name, f"hub:{SETS[name].hub}")
    assert len(found) == (1 if name == "saferlhf" else max(1, len(ROWS[name][1]) - 1))
    if name == "saferlhf":
        assert [(group_of(row), categories_of(row)) for row in found] == [("unsafe", ("Violence",))]


def test_the_real_copies_of_public_sets(shared_data: Path) -> None:
    rows, described = load_prompts(
        [f"xstest={shared_data / 'xstest.csv'}", f"simplesafetytests={shared_data / 'simplesafetytests.jsonl'}"]
    )
    assert described[0]["prompts"] == {"unsafe": 200, "alarming": 250, "benign": 0}
    assert described[1]["prompts"] == {"unsafe": 100, "alarming": 0, "benign": 0}
    assert [row.index for row in rows] == list(range(550))
    assert len({name for row in rows[450:] for name in categories_of(row)}) == 5


def test_preference_rows_give_their_prompts_with_flagged_categories(shared_data: Path) -> None:
    file = shared_data / "saferlhf_sample_rows.jsonl"
    rows, _ = load_prompts([f"saferlhf={file}"])
    assert 0 < len(rows) <= 10
    flagged = {name for row in rows for name in categories_of(row)}
    assert len(flagged) >= 3
    assert flagged <= set(HARM_CATEGORIES)


def test_the_sample_is_its_test_split_with_both_kinds() -> None:
    rows, (described,) = load_prompts(["sample"])
    assert described["prompts"] == {"unsafe": 78, "alarming": 0, "benign": 34}
    assert {name for row in rows for name in categories_of(row)} <= set(HARM_CATEGORIES)


# ---- the packaged prompts


def test_the_packaged_prompts_are_enough_of_every_group_and_in_both_languages() -> None:
    rows, _ = load_prompts(["packaged"])
    scripts = Counter((group_of(row), main_script(text)) for row, text in zip(rows, texts(rows), strict=True))
    assert scripts[("unsafe", "latin")] >= 80
    assert scripts[("alarming", "latin")] >= 80
    assert scripts[("benign", "latin")] >= 20
    assert min(scripts[(group, "cjk")] for group in ("unsafe", "alarming", "benign")) >= 8
    assert {name for row in rows if group_of(row) == "unsafe" for name in categories_of(row)} == set(HARM_CATEGORIES)


def test_the_packaged_prompts_are_short_distinct_and_not_in_the_sample() -> None:
    rows, _ = load_prompts(["packaged"])
    of_sample = {row.prompt.strip().lower() for row in read_rows("sample")}
    plain = [text.strip().lower() for text in texts(rows)]
    assert len(set(plain)) == len(plain)
    assert not of_sample & set(plain)
    assert max(map(len, plain)) < 130, "a prompt is one plain line, without detail"


def test_the_packaged_prompts_say_their_language() -> None:
    file = Path(load_prompts(["packaged"])[1][0]["place"])
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["language"] == {"latin": "en", "cjk": "zh"}[main_script(row["prompt"])]


# ---- own files, limits, several sets


def test_an_own_file_names_the_group_in_each_row_or_for_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "A?", "group": "unsafe", "category": "x"}\n{"prompt": "B?", "group": "alarming"}\n')
    rows, _ = load_prompts([str(file)])
    assert [(group_of(row), categories_of(row)) for row in rows] == [("unsafe", ("x",)), ("alarming", ())]
    assert {group_of(row) for row in load_prompts([f"benign={file}"])[0]} == {"benign"}


def test_prompt_parquet_of_ours_and_parquet_of_texts(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, _ = load_prompts([str(prompt_file(tmp_path / "val.parquet", unsafe=2, benign=1))])
    assert [group_of(row) for row in rows] == ["unsafe", "unsafe", "benign"]
    pq.write_table(pa.table({"prompt": ["A?", "B?"], "group": ["benign", "unsafe"]}), tmp_path / "texts.parquet")
    rows, _ = load_prompts([str(tmp_path / "texts.parquet")])
    assert sorted(map(group_of, rows)) == ["benign", "unsafe"]


def test_a_limit_counts_per_group_and_takes_from_the_whole_set() -> None:
    rows, (described,) = load_prompts(["packaged"], limit=5)
    assert described["prompts"] == {"unsafe": 5, "alarming": 5, "benign": 5}
    assert len({categories_of(row) for row in rows if group_of(row) == "unsafe"}) >= 4
    assert [row.index for row in rows] == list(range(15))


def test_a_prompt_of_two_sets_is_asked_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "A?"}\n{"prompt": "A?"}\n{"prompt": "B?"}\n')
    rows, _ = load_prompts([f"unsafe={file}", f"unsafe={file}"])
    assert texts(rows) == ["A?", "B?"]


# ---- what is broken is named by file, line and field

BROKEN = {
    "no column": ("x.csv", "id,question\n1,How?\n", "{file}:2: has no field goal or prompt, only id, question"),
    "empty": ("x.jsonl", '{"goal": "a"}\n\n{"goal": " "}\n', "{file}:3: field goal is empty"),
    "number": ("x.jsonl", '{"goal": 3}\n', "{file}:1: field goal is int, expected the prompt's text"),
    "no object": ("x.json", '[{"goal": "a"}, "b"]', "{file}:2: is str, expected an object with the field goal"),
    "no json": ("x.jsonl", '{"goal": "a"}\n{"goal": \n', "{file}:2: not JSON"),
    "broken json": ("x.json", '[{"goal": "a"', "{file}: can't be read as JSON"),
    "json object": ("x.json", '{"goal": "a"}', "{file}: is dict, expected a list of objects"),
    "short row": ("x.csv", 'goal,target\n"a\nb",c\nd\n', "{file}:4: has not the 2 fields of the header"),
    "no text": ("x.csv", b"goal\n\xff\xfe\n", "{file}: can't be read as CSV in UTF-8"),
    "no rows": ("x.csv", "goal,target\n", "{file}: has no prompts"),
    "ending": ("x.txt", "a\n", "{file}: don't know this kind of file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_with_line_and_field(name: str, content, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        load_prompts([f"advbench={file}"])
    assert str(raised.value).startswith(message.format(file=file))


def test_a_file_that_does_not_say_what_its_prompts_are_is_not_guessed_at(tmp_path: Path) -> None:
    """XSTest's own file given without its name would otherwise count 250 harmless prompts as unsafe."""
    file = tmp_path / "xstest.csv"
    file.write_text("\n".join(ROWS["xstest"][1]))
    with pytest.raises(DataError, match=r"xstest.csv:2: can't tell .* field group .*\n  fix: .*unsafe=.*NAME="):
        load_prompts([str(file)])
    file.write_text("prompt,label\nHow?,maybe\n")
    with pytest.raises(DataError, match="from the field label or type"):
        load_prompts([f"xstest={file}"])


def test_an_unknown_set_names_the_nearest_and_a_missing_file_the_way_out() -> None:
    with pytest.raises(DataError, match=r"no set of this name; did you mean xstest\?\n  fix: one of packaged"):
        load_prompts(["xtest"])
    with pytest.raises(DataError, match=r"nothing.csv: no such file\n  fix"):
        load_prompts(["xstest=nothing.csv"])
    with pytest.raises(DataError, match="unsafe needs a file"):
        load_prompts(["unsafe"])
