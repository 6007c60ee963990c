"""The commands and the two scripts, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ups_rm.cli.data import app
from ups_rm.errors import DataError

from .conftest import REPO, Folder, make_row, write_jsonl, write_parquet


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", ["prepare", "check", "stats"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: ups-rm data {command}" in run(command, "--help")


def test_prepare_check_stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run("prepare", "sample", "--shuffle", "--seed", 3, "--dedup", "prompt", "--group-split", "--max-rows", 40)
    assert "both unsafe" in printed
    out = tmp_path / "Data" / "pku_saferlhf_verl"
    assert "prompts in both files: 0" in printed
    assert pq.read_metadata(out / "train.parquet").num_rows == 40
    assert "these files can be trained on: 0 errors, 0 warnings" in run("check", out)
    printed = run("stats", "sample")
    assert "Human Trafficking" in printed
    assert (tmp_path / "data_stats.png").read_bytes().startswith(b"\x89PNG")
    assert run("prepare", "sample", "--quiet") == ""


def test_names_may_stand_between_commas_or_come_again(tmp_path: Path) -> None:
    both = ("--categories", "Violence,Drugs", "--categories", "Animal Abuse")
    run("prepare", "sample", "--out", tmp_path, "--subsets", "Alpaca-7B, Alpaca3-8B", *both)
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings["subsets"] == ["Alpaca-7B", "Alpaca3-8B"]
    assert settings["categories"] == ["Violence", "Drugs", "Animal Abuse"]


def test_max_bad_reaches_prepare_and_stats(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [make_row(0), make_row(1), "{"])
    for command in (("prepare", source, "--out", tmp_path / "out"), ("stats", source, "--no-plot")):
        with pytest.raises(DataError, match="1 of 3 rows rejected"):
            run(*command)
        run(*command, "--max-bad", 0.5)


def test_check_fails_with_code_1_and_says_where(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"prompt": [{"role": "user", "content": ""}]}])
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 1
    assert "row 0: the last message of `prompt` is empty" in result.output
    assert "these files can't be trained on: 3 errors" in result.output
    with pytest.raises(DataError, match=r"has no \.parquet file"):
        CliRunner().invoke(app, ["check", str(tmp_path / "..")], catch_exceptions=False)


def test_preprocess_script_with_the_known_flags(tmp_path: Path, pku_folder: Folder) -> None:
    rows = [make_row(n) for n in range(30)]
    root = pku_folder({"Alpaca-7B/train": rows[:10], "Alpaca2-7B/train": rows[10:20], "Alpaca3-8B/train": rows[20:]})
    known = ("--local_dataset_path", root, "--local_save_dir", "out", "--subsets", "Alpaca3-8B", "Alpaca-7B")
    done = script("preprocess_pku_saferlhf.py", *known, "--shuffle", "--seed", 1, "--train_ratio", 0.8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert len(train) == 16
    assert {row["extra_info"]["index"] for row in train} == set(range(16))
    assert {row["prompt"][0]["content"] for row in train} == {f"Question {n}?" for n in [*range(20, 30), *range(6)]}
    done = script("test_data_loading.py", "--parquet_path", "out/val.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "these files can be trained on" in done.stdout
    assert "first row: " in done.stdout


def test_scripts_say_what_is_wrong_and_exit_with_2(tmp_path: Path) -> None:
    done = script("preprocess_pku_saferlhf.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("DataError: Data/PKU-SafeRLHF: no such file or folder\n  fix: ")
    assert not (tmp_path / "Data").exists()
    done = script("test_data_loading.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "Data/pku_saferlhf_verl/train.parquet: no such file" in done.stderr


def test_the_commands_start_without_heavy_imports() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys, ups_rm.cli.data, ups_rm.data.prepare; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
