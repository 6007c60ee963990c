"""Hub data sets: the same code over a local data set folder (no network), and what is said when the Hub is out of
reach.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ups_rm.data import hub
from ups_rm.data.prepare import prepare
from ups_rm.data.rows import read_rows
from ups_rm.errors import DataError

from .conftest import make_row, write_jsonl

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/*/train.jsonl"}
  - {split: test, path: "data/*/test.jsonl"}
- config_name: alpaca-7b
  data_files:
  - {split: train, path: data/Alpaca-7B/train.jsonl}
  - {split: test, path: data/Alpaca-7B/test.jsonl}
- config_name: alpaca3-8b
  data_files:
  - {split: train, path: data/Alpaca3-8B/train.jsonl}
---
"""


@pytest.fixture
def hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set repository as it lies on the Hub, in a folder; `datasets` streams it with the same code."""
    pytest.importorskip("datasets")
    root = tmp_path / "repository"
    write_jsonl(root / "data" / "Alpaca-7B" / "train.jsonl", [make_row(n) for n in range(12)])
    write_jsonl(root / "data" / "Alpaca-7B" / "test.jsonl", [make_row(90)])
    write_jsonl(root / "data" / "Alpaca3-8B" / "train.jsonl", [make_row(n) for n in (50, 51)])
    (root / "README.md").write_text(README)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return f"hub:{root}"


def test_configurations_are_subsets(hub_set: str) -> None:
    rows = list(read_rows(hub_set))
    assert [(row.prompt, row.subset, row.split) for row in rows] == [
        *((f"Question {n}?", "Alpaca-7B", "train") for n in range(12)),
        *((f"Question {n}?", "Alpaca3-8B", "train") for n in (50, 51)),
        ("Question 90?", "Alpaca-7B", "test"),
    ]
    assert rows[1].line == 2
    assert rows[1].file == f"{hub_set}/alpaca-7b/train"
    assert rows[0].categories == make_row_categories()
    assert [row.prompt for row in read_rows(hub_set, subsets=["Alpaca3-8B"])] == ["Question 50?", "Question 51?"]


def make_row_categories() -> tuple[tuple[str, ...], tuple[str, ...]]:
    first, second = (make_row(0)[f"response_{i}_harm_category"] for i in (0, 1))
    return tuple(n for n, flag in first.items() if flag), tuple(n for n, flag in second.items() if flag)


def test_a_subset_that_is_no_configuration(hub_set: str) -> None:
    with pytest.raises(
        DataError, match=r"no configuration for subset Alpaca2-7B; there are default, alpaca-7b, alpaca3-8b"
    ):
        read_rows(hub_set, subsets=["Alpaca2-7B"])


def test_the_default_configuration_serves_where_there_are_no_known_subsets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "own" / "train.jsonl", [make_row(1), make_row(2)])
    rows = list(read_rows(f"hub:{tmp_path / 'own'}"))
    assert [(row.prompt, row.subset) for row in rows] == [("Question 1?", "Alpaca-7B"), ("Question 2?", "Alpaca-7B")]


def test_prepare_takes_a_hub_set(hub_set: str, tmp_path: Path) -> None:
    report = prepare(hub_set, tmp_path / "out", progress=True)
    assert (report.train_rows, report.val_rows) == (14, 1)
    local = prepare(Path(hub_set.removeprefix("hub:")), tmp_path / "local")
    assert local.sha256 == report.sha256


def test_an_id_goes_to_the_hub_only_if_it_looks_like_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def parts(hub_id: str, **_: object) -> list[object]:
        asked.append(hub_id)
        return []

    monkeypatch.setattr(hub, "hub_parts", parts)
    monkeypatch.chdir(tmp_path)
    assert list(read_rows("PKU-Alignment/PKU-SafeRLHF")) == []
    assert list(read_rows("hub:anything")) == []
    (tmp_path / "mydata").mkdir()
    for path in ("mydata/absent", "Data/PKU-SafeRLHF", "absent.jsonl", "some/file.jsonl", "/a/b", "../a/b"):
        with pytest.raises(DataError, match="no such file or folder"):
            read_rows(path)
    assert asked == ["PKU-Alignment/PKU-SafeRLHF", "anything"]


def test_out_of_reach_is_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str) -> list[str]:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nwith many more lines")

    monkeypatch.setattr(datasets, "get_dataset_config_names", offline)
    with pytest.raises(
        DataError, match=r"o/n: is no local path, and no data set .* Couldn't reach 'o/n' on the Hub\n  fix"
    ):
        read_rows("o/n")


def test_a_stream_that_breaks_off_names_the_row(hub_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaking(*args: object, **kwargs: object) -> object:
        yield make_row(0)
        yield make_row(1)
        raise ConnectionError("the line went dead")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    with pytest.raises(DataError, match=r"alpaca-7b/train: reading failed after row 2: the line went dead"):
        list(read_rows(hub_set))
