"""Rows, files and folders in the forms that `ups_rm.data` reads, made on the spot."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ups_rm.data.schema import HARM_CATEGORIES

REPO = Path(__file__).resolve().parents[2]

RowDict = dict[str, Any]


def make_row(number: int = 0, **changes: Any) -> RowDict:
    """A row in the full schema, harmless in content; `changes` replace fields."""
    prompt = changes.get("prompt", f"Question {number}?")
    responses = [changes.get(f"response_{i}", f"Answer {number}.{i} — “quoted”.") for i in (0, 1)]
    safe = [number % 2 == 0, number % 3 == 0]
    row: RowDict = {"prompt": prompt, "response_0": responses[0], "response_1": responses[1]}
    row |= {"prompt_source": "made up", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B"}
    row |= {f"is_response_{i}_safe": safe[i] for i in (0, 1)}
    for i in (0, 1):
        row[f"response_{i}_harm_category"] = {name: not safe[i] and name == "Violence" for name in HARM_CATEGORIES}
    row |= {f"response_{i}_severity_level": 0 if safe[i] else 1 + number % 3 for i in (0, 1)}
    row |= {"better_response_id": number % 2, "safer_response_id": 0 if safe[0] or not safe[1] else 1}
    for i in (0, 1):
        text = f"{prompt}{responses[i]}" if isinstance(prompt, str) else ""
        row[f"response_{i}_sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return row | changes


def old_row(number: int = 0) -> RowDict:
    """The same in the older schema of seven fields."""
    names = "prompt response_0 response_1 is_response_0_safe is_response_1_safe better_response_id safer_response_id"
    return {name: make_row(number)[name] for name in names.split()}


def write_jsonl(path: Path, rows: Iterable[RowDict | str | bytes]) -> Path:
    """One line per row; text and bytes go in as they are."""
    lines = [json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows]
    data = b"".join(
        (line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")) + b"\n" for line in lines
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[RowDict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


Folder = Callable[[Mapping[str, list[Any]]], Path]


@pytest.fixture
def pku_folder(tmp_path: Path) -> Folder:
    """Makes a folder in PKU layout out of {"Alpaca-7B/train": rows, ...}; ".jsonl" unless the name has a suffix."""

    def build(files: Mapping[str, list[Any]]) -> Path:
        root = tmp_path / "PKU-SafeRLHF"
        for name, rows in files.items():
            path = root / "data" / (name if "." in Path(name).name else f"{name}.jsonl")
            if path.suffix == ".parquet":
                write_parquet(path, rows)
            else:
                write_jsonl(path, rows)
        return root

    return build
