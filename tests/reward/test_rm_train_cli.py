"""The commands from rows to an RM: trim, features, train, with and without adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labelled_rows import make_rows
from tiny import tiny_backbone
from ups_rm.cli.rm import app
from ups_rm.errors import DataError, RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.merge import merge
from ups_rm.reward.scorer import RewardScorer

QUICK = ["--hidden-dims", "8", "--max-epochs", "3", "--validation-share", "0.2", "--test-share", "0.2"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("cli") / "backbone")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cli") / "pairs.jsonl"
    lines = []
    for row in make_rows(20):
        safe, unsafe = (row.responses[i] for i in ((0, 1) if row.is_response_0_safe else (1, 0)))
        lines.append(json.dumps({"prompt": row.prompt, "safe_response": safe, "unsafe_response": unsafe}))
    file.write_text("\n".join(lines) + "\n")
    return file


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_trim_features_train_merge(backbone: Path, pairs: Path, tmp_path: Path) -> None:
    judge, file, head = tmp_path / "judge", tmp_path / "f.safetensors", tmp_path / "head"
    assert "next: ups-rm rm features" in run("trim", "--backbone", backbone, "--layers", 1, "--out", judge)
    options = ["--backbone", judge, "--data", pairs, "--out", file, "--dtype", "float32", "--device", "cpu"]
    assert "80 distinct texts of 40 rows" in run("features", *options)
    assert "80 were there, 0 computed" in run("features", *options)
    output = run("train", file, "--out", head, "--eval", file, "--loss", "pairs", *QUICK)
    assert "pairwise" in output
    with pytest.raises(RMError, match="holds a head already"):
        run("train", file, "--out", head, *QUICK)
    merge(judge, head, tmp_path / "rm")
    talk = [{"role": "user", "content": "Bread?"}, {"role": "assistant", "content": "Yes."}]
    assert 0 < RewardScorer.load(tmp_path / "rm", dtype="float32").score([talk])[0].safe_score < 1


def test_train_with_adapters(backbone: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--lora", "--backbone", backbone, "--data", pairs, "--lora-rank", 2, "--lora-epochs", 1]
    output = run("train", *options, "--dtype", "float32", "--device", "cpu", "--out", tmp_path, *QUICK)
    assert "frozen backbone" in output
    assert "RM folder, with its card" in output
    card = RMCard.read(tmp_path / "rm")
    assert card is not None
    assert set(card.head["metrics"]) == {"held_out", "frozen backbone"}
    assert (tmp_path / "rm" / "README.md").is_file()
    RewardScorer.load(tmp_path / "rm", dtype="float32")


def test_mistakes_are_told(backbone: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(RMError, match="no features to train on"):
        run("train", "--out", tmp_path / "head")
    with pytest.raises(RMError, match="not on features"):
        run("train", pairs, "--lora", "--out", tmp_path / "head")
    with pytest.raises(RMError, match="expected widths"):
        run("train", pairs, "--hidden-dims", "wide", "--out", tmp_path / "head")
    with pytest.raises(DataError, match="--split is 'val'"):
        run("features", "--backbone", backbone, "--split", "val", "--out", tmp_path / "f.safetensors")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs.read_text() + "not json\n")
    with pytest.raises(DataError, match=r"more than --max-bad(.|\n)*fix: `ups-rm data prepare` lists them all"):
        run("features", "--backbone", backbone, "--data", bad, "--out", tmp_path / "f.safetensors")


@pytest.mark.parametrize("command", ["trim", "features", "train"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: ups-rm rm {command}" in " ".join(run(command, "--help").split())
