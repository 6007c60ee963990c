"""Files and folders that survive kills, bad disks, full disks and a second process."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny import tiny_rm
from tiny_training import prefers, tiny_recipe
from ups_rm import durable
from ups_rm.checkpoints import checkpoints
from ups_rm.durable import damage, publish_folder, remove_folder, sweep, write_text
from ups_rm.errors import PolicyError, RMError, RunError
from ups_rm.local.policy import load_model
from ups_rm.local.trainer import Trainer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import TrainResult

FOUR = ["trainer.total_training_steps=4", "trainer.save_freq=1", "trainer.test_freq=-1"]
SIX = ["trainer.total_training_steps=6", *FOUR[1:]]


def fit(folder: Path, policy: Path, *overrides: str) -> TrainResult:
    return Trainer(tiny_recipe(folder, policy, *overrides), prefers("e")).fit()


@pytest.fixture
def run(tmp_path: Path, policy_folder: Path) -> Path:
    fit(tmp_path, policy_folder, *FOUR)
    return tmp_path / "run"


# ---- a damaged checkpoint


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with two files, one in a folder of its own."""
    made = tmp_path / ".made.tmp"
    (made / "deep").mkdir(parents=True)
    (made / "a.bin").write_bytes(random.Random(0).randbytes(5000))
    (made / "deep/b.txt").write_text("text")
    publish_folder(made, tmp_path / "made")
    assert not made.exists()
    return tmp_path / "made"


def test_a_published_folder_is_whole(published: Path) -> None:
    assert damage(published) is None
    listed = json.loads((published / "manifest.json").read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {"a.bin": 5000, "deep/b.txt": 4}


@pytest.mark.parametrize("bit", [0, 7, 19_999, 39_999])
def test_one_flipped_bit_is_found_and_named(published: Path, bit: int) -> None:
    data = bytearray((published / "a.bin").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (published / "a.bin").write_bytes(data)
    assert damage(published) == "a.bin has other bytes than were written (sha256 differs)"


def test_a_torn_missing_or_unlisted_file_is_named(published: Path) -> None:
    os.truncate(published / "a.bin", 4999)
    assert damage(published) == "a.bin has 4999 bytes, 5000 were written"
    (published / "a.bin").unlink()
    assert damage(published) == "a.bin is missing"
    (published / "manifest.json").write_text('{"files": [')
    assert "manifest.json can't be read" in str(damage(published))
    (published / "manifest.json").unlink()
    assert "manifest.json is missing" in str(damage(published))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def test_damaged_checkpoints_are_named_and_the_last_good_one_is_used(
    run: Path, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(run / "global_step_4/training.pt")
    os.truncate(run / "global_step_3/state.json", 100)
    capsys.readouterr()
    assert fit(tmp_path, policy_folder, *SIX).steps == 6
    told = capsys.readouterr().out
    assert "global_step_4 is damaged: training.pt has other bytes than were written" in told
    assert "global_step_3 is damaged: state.json has 100 bytes" in told
    assert "global_step_2 after step 2" in told
    fit(tmp_path / "straight", policy_folder, *SIX)
    weights = [folder / "run/policy/model.safetensors" for folder in (tmp_path, tmp_path / "straight")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---- a damaged model folder


def damaged(folder: Path) -> Iterator[str]:
    """What is wrong, with every listed file in turn, cut short and with one bit turned; it is made whole again."""
    for name in json.loads((folder / durable.MANIFEST).read_text())["files"]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        yield f"{name} has {len(whole) - 1} bytes, {len(whole)} were written"
        turned = bytearray(whole)
        turned[len(whole) // 2] ^= 1
        (folder / name).write_bytes(turned)
        yield f"{name} has other bytes than were written"
        (folder / name).write_bytes(whole)


def test_a_damaged_weight_of_a_reward_model_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    rm = tiny_rm(tmp_path / "rm", manifest=True)
    listed = json.loads((rm / durable.MANIFEST).read_text())["files"]
    assert set(listed) == {file.name for file in rm.glob("*.safetensors")}
    for wrong in damaged(rm):
        with pytest.raises(RMError, match=re.escape(f"{rm} is damaged: {wrong}")):
            RewardScorer.load(rm)
    (rm / "README.md").write_text("edited")  # what people write themselves is no damage
    RewardScorer.load(rm)


def test_a_damaged_file_of_a_trained_policy_is_named_when_it_is_loaded(run: Path) -> None:
    policy = run / "policy"
    for wrong in damaged(policy):
        with pytest.raises(PolicyError, match=re.escape(f"{policy} is damaged: {wrong}")):
            load_model(str(policy), dtype=torch.float32)
    load_model(str(policy), dtype=torch.float32)
    (policy / "tokenizer.json").unlink()
    with pytest.raises(PolicyError, match=r"tokenizer\.json is missing\n  fix: make or copy it again"):
        load_model(str(policy), dtype=torch.float32)


# ---- which checkpoints stay


def test_the_newest_and_the_best_stay(tmp_path: Path, policy_folder: Path) -> None:
    """A validation score that falls after step 2: the best is an old one."""
    keep = ["trainer.max_ckpt_to_keep=1", "trainer.best_ckpt_to_keep=2", "trainer.test_freq=1", "trainer.save_freq=4"]
    scores = iter([0.3, 0.9, 0.8, 0.2, 0.1, 0.1])

    class Validated(Trainer):
        def validate(self, state: object) -> dict[str, float]:
            from ups_rm.local import trainer

            score = next(scores)
            real, trainer.validate = trainer.validate, lambda *_, **__: {"val-core/PKU-SafeRLHF/reward/mean@1": score}
            try:
                return super().validate(state)  # type: ignore[arg-type]
            finally:
                trainer.validate = real

    Validated(tiny_recipe(tmp_path, policy_folder, *SIX, *keep), prefers("e")).fit()
    left = {path.name: json.loads((path / "state.json").read_text()) for path in checkpoints(tmp_path / "run")}
    # step 1 was the best when it was saved; step 3 is better but was never a best one, so it was not saved
    assert list(left) == ["global_step_1", "global_step_2", "global_step_6"]
    assert left["global_step_6"]["best"] == {"step": 2, "score": 0.9}


def test_async_and_sync_leave_the_same(tmp_path: Path, policy_folder: Path) -> None:
    for name in ("true", "false"):
        fit(tmp_path / name, policy_folder, *FOUR, f"trainer.async_save={name}")
    for step in (1, 4):
        files = [tmp_path / name / f"run/global_step_{step}/training.pt" for name in ("true", "false")]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 5 MB: room for a run and two checkpoints of the tiny policy, not for four."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("a small file system can't be mounted here: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("looks_first", [True, False], ids=["free space is looked at", "the disk says so"])
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    small_disk: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, looks_first: bool
) -> None:
    if not looks_first:
        monkeypatch.setattr("ups_rm.local.checkpoint.require_space", lambda *_: None)
    six = [*SIX, "trainer.group_log_freq=0"]
    with pytest.raises(RunError, match=r"checkpoint .*global_step_. can't be written") as stopped:
        fit(small_disk, policy_folder, *six)
    told = str(stopped.value)
    assert ("MB are free at" in told) == looks_first, told
    left = checkpoints(small_disk / "run")
    assert left
    assert all(damage(path) is None for path in left)
    assert not list((small_disk / "run").glob(".*.tmp")), "what did not fit was cleared away"
    assert not (small_disk / "run/policy").exists()
    monkeypatch.undo()
    result = fit(small_disk, policy_folder, *six, "trainer.max_ckpt_to_keep=1")  # the way out that the message names
    assert result.steps == 6
    assert [row["step"] for row in read_metrics(small_disk / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


# ---- small files


KILLED_IN_WRITE = """
import os, signal, sys
from pathlib import Path
from ups_rm import durable
calls = 0
def counted(name):
    original = getattr(os, name)
    def trapped(*arguments, **more):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)
    return trapped
for name in ("fsync", "replace", "rename", "open"):
    setattr(os, name, counted(name))
durable.write_text(Path(sys.argv[1]), "new " * 1000)
"""


def test_a_small_file_is_the_old_or_the_new_one_wherever_the_kill_falls(tmp_path: Path) -> None:
    file, seen = tmp_path / "file.json", set()
    for at in range(1, 6):
        write_text(file, "old")
        done = subprocess.run([sys.executable, "-c", KILLED_IN_WRITE, str(file), str(at)], check=False, timeout=60)
        text = file.read_text()
        assert text in ("old", "new " * 1000)
        seen.add((done.returncode, text[:3]))
    assert {(-signal.SIGKILL, "old"), (-signal.SIGKILL, "new")} <= seen
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_is_never_seen_half_removed(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(folder: Path, **_: object) -> None:
        if Path(folder).exists():
            assert not published.exists(), "its name is gone before its files are"
            raise KeyboardInterrupt

    monkeypatch.setattr(durable.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(published)
    monkeypatch.undo()
    sweep(published.parent)
    assert list(published.parent.iterdir()) == []


# ---- one writer


def test_a_second_trainer_in_the_folder_is_told_who_is_there(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR)
    told: list[str] = []

    class Second:
        def score(self, conversations: object) -> object:
            if not told:
                with pytest.raises(RunError) as refused:
                    Trainer(recipe, prefers("e")).fit()
                told.append(str(refused.value))
            return prefers("e").score(conversations)  # type: ignore[arg-type]

    assert Trainer(recipe, Second()).fit().steps == 4  # type: ignore[arg-type]
    assert f"{tmp_path / 'run'}: in use by process {os.getpid()} on" in told[0]
