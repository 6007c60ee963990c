"""Files and folders that survive kills, bad disks, full disks and a second process."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from labelled_rows import make_rows
from tiny import tiny_backbone, tiny_rm
from tiny_training import prefers, tiny_recipe
from ups_rm import durable
from ups_rm.checkpoints import checkpoints
from ups_rm.data.check import check_parquet
from ups_rm.data.prepare import prepare
from ups_rm.data.prompts import PromptRow, read_prompts
from ups_rm.data.rows import read_rows
from ups_rm.durable import damage, publish_folder, remove_folder, sweep, write_text
from ups_rm.errors import DataError, PolicyError, RMError, RunError
from ups_rm.evaluation.compare import compare
from ups_rm.local.policy import load_model
from ups_rm.local.trainer import Trainer
from ups_rm.monitor.runs import find_runs
from ups_rm.pipeline.context import write_json
from ups_rm.report import read_run, write_report
from ups_rm.report.sources import keep_sources
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import FeatureReport, Parts, extract_features
from ups_rm.reward.scorer import RewardScorer
from ups_rm.study import results
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.group_table import Query, sorted_groups
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Message, Score, TrainResult

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


def test_a_mark_never_stands_beside_the_folder_that_is_replaced(tmp_path: Path) -> None:
    """Nor does one that can't be written cost the new folder."""
    final, new = tmp_path / "policy", tmp_path / ".policy.tmp"
    for folder, text in ((final, "old"), (new, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)

    def mark() -> None:
        assert not final.exists()
        assert damage(new) is None
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_folder(new, final, mark)
    assert (final / "weights").read_text() == "new"
    assert damage(final) is None


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
        yield from damages(folder / name)


def damages(file: Path) -> Iterator[str]:
    """What is wrong with a file, cut short and with one bit turned; it is made whole again."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    yield f"{file.name} has {len(whole) - 1} bytes, {len(whole)} were written"
    turned = bytearray(whole)
    turned[len(whole) // 2] ^= 1
    file.write_bytes(turned)
    yield f"{file.name} has other bytes than were written"
    file.write_bytes(whole)


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


# ---- a damaged file


def test_a_damaged_prompt_file_is_named_where_it_is_read(tmp_path: Path) -> None:
    out = tmp_path / "prompts"
    prepare("sample", out)
    for file in (out / "train.parquet", out / "val.parquet"):
        for wrong in damages(file):
            for read in (read_prompts, lambda path: check_parquet([path]), lambda path: list(read_rows(path))):
                with pytest.raises(DataError, match=re.escape(f"{file} is damaged: {wrong}")) as refused:
                    read(file)  # type: ignore[operator]
                assert "fix: ups-rm data prepare SOURCE --out" in str(refused.value)
                assert str(out / f".{file.name}.manifest.json") in str(refused.value)
    for name in ("rejected.jsonl", "report.json"):
        (out / name).write_bytes((out / name).read_bytes() + b"\n")
        assert f"{name} has" in str(durable.file_damage(out / name))


def test_prompts_of_ones_own_need_no_manifest(tmp_path: Path) -> None:
    """A file that was never ours, and one of ours in whose place another is put by `prepare` itself."""
    prepare("sample", tmp_path / "prompts")
    shutil.copy(tmp_path / "prompts/train.parquet", tmp_path / "mine.parquet")
    assert read_prompts(tmp_path / "mine.parquet") == read_prompts(tmp_path / "prompts/train.parquet")
    prepare("sample", tmp_path / "prompts", shuffle=True)
    assert read_prompts(tmp_path / "mine.parquet") != read_prompts(tmp_path / "prompts/train.parquet")


def test_damaged_features_are_named_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, backbone = tmp_path / "f.safetensors", tiny_backbone(tmp_path / "backbone")

    def extract() -> FeatureReport:
        return extract_features(backbone, make_rows(2), out, dtype="float32", device="cpu", progress=False)

    extract()
    whole = FeatureSet.read(out).tensors()
    for wrong in damages(out):
        with pytest.raises(RMError, match=re.escape(f"{out} is damaged: {wrong}")):
            FeatureSet.read(out)
        capsys.readouterr()
        assert extract().resumed == 0
        assert f"{out} is damaged: {wrong}" in capsys.readouterr().out
        anew = FeatureSet.read(out).tensors()
        assert all(torch.allclose(anew[name], tensor, equal_nan=True) for name, tensor in whole.items())
    extract()  # `damages` has put the first file back, which need not be the one made anew to the bit
    assert extract().resumed == 8, "whole features are kept"


def test_a_damaged_part_of_features_is_computed_once_more(tmp_path: Path) -> None:
    out, backbone = tmp_path / "f.safetensors", tiny_backbone(tmp_path / "backbone")

    def extract(**more: Any) -> FeatureReport:
        return extract_features(
            backbone, make_rows(3), out, dtype="float32", device="cpu", progress=False, max_batch_tokens=120,
            save_seconds=0.0, **more,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "remove", lambda _: None)
        extract()
    whole = FeatureSet.read(out)
    parts = sorted((tmp_path / "f.safetensors.parts").glob("*.safetensors"))
    assert len(parts) > 2
    for file in parts[:2]:
        held = len(load_file(file)["index"])
        for _ in damages(file):
            durable.remove_file(out)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Parts, "remove", lambda _: None)
                report = extract()
            assert report.resumed == report.texts - held
            torch.testing.assert_close(FeatureSet.read(out).hidden, whole.hidden)
            assert not file.exists(), "the damaged part is gone, a new one has its texts"
            break


def test_a_damaged_group_log_is_named_by_all_that_read_it(run: Path) -> None:
    file = run / "groups/step_000002.jsonl"
    for wrong in damages(file):
        told = f"{file} is damaged: {wrong}"
        for read in (lambda: read_group_log(file), lambda: sorted_groups(run, Query())):
            with pytest.raises(DataError, match=re.escape(told)) as refused:
                read()
            assert "fix: remove it to read the others" in str(refused.value)
        page = read_run(run)
        assert [step["step"] for step in page["groups"]["steps"]] == [1, 3, 4]
        assert any(problem.startswith(told) for problem in page["problems"])
    assert read_run(run)["problems"] == []


def evaluated(run: Path, policy: Path) -> Path:
    """A run with the outputs of an evaluation and what its report is made of."""
    prompts = [PromptRow(i, [Message(role="user", content=f"Why {i}?")], "unsafe") for i in range(3)]
    before, after = ([Score(logit, 1 / (1 + math.exp(logit)), 3, False)] * 3 for logit in (1.0, -1.0))
    comparison = compare(prompts, ["no"] * 3, ["yes"] * 3, before, after, kl=0.1, n_resamples=100)
    comparison.write(run / "eval")
    write_json(run / "summary.json", comparison.summary())
    keep_sources(run, tiny_recipe(run.parent, policy, *FOUR))
    return run


def test_damaged_figures_are_named_in_the_report_and_not_shown(run: Path, policy_folder: Path) -> None:
    evaluated(run, policy_folder)
    whole = read_run(run)
    assert whole["problems"] == []
    assert whole["sources_kept"]
    for name in ("summary.json", "eval/comparison.json", "eval/pairs.jsonl", "report_sources.json"):
        if name == "eval/comparison.json":
            durable.remove_file(run / "summary.json")
        for wrong in damages(run / name):
            page = read_run(run)
            assert f"{run / name} is damaged: {wrong}" in "\n".join(page["problems"])
            if name.startswith("eval/pairs"):
                assert page["outcome"]["pairs"] == []
            if name == "eval/comparison.json":
                assert page["outcome"] is None
            if name == "report_sources.json":
                assert not page["sources_kept"]
            if name in ("summary.json", "eval/comparison.json"):
                assert find_runs(run)[0].state == "unreadable"
                assert find_runs(run)[0].gain is None
    assert find_runs(run)[0].state == "finished"


def test_a_study_counts_no_damaged_run(run: Path, policy_folder: Path) -> None:
    evaluated(run, policy_folder)
    for name, read in (("summary.json", results._read), ("eval/pairs.jsonl", results._read_lines)):
        assert read(run / name)
        for wrong in damages(run / name):
            with pytest.raises(RunError, match=re.escape(f"{run / name} is damaged: {wrong}")) as refused:
                read(run / name)
            assert "fix: remove its run folder" in str(refused.value)


def test_a_damaged_page_does_not_open_and_says_so(run: Path) -> None:
    """Its script and its style are known by the hashes in its own policy, its data by the checksum in the gzip."""
    page = write_report([run]).read_text(encoding="utf-8")
    assert "This page did not open: its file is damaged" in page
    draw = random.Random(0)
    for start, end, whole in (("<style>", "</style>", hash_whole), ("<script>", "</script>", hash_whole),
                              ('id="payload">', "</script>", payload_whole)):  # fmt: skip
        first = page.index(start) + len(start)
        last = page.index(end, first)
        assert whole(page, page[first:last])
        assert not whole(page, page[first : last - 5])
        for _ in range(20):
            at = draw.randrange(first + 16, last - 4)  # between what gzip does not sum: its header, bits of padding
            turned = chr(ord(page[at]) ^ 1)
            assert not whole(page, page[first:at] + turned + page[at + 1 : last])


def hash_whole(page: str, text: str) -> bool:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in html.unescape(page[:5000])


def payload_whole(_page: str, text: str) -> bool:
    try:
        return bool(gzip.decompress(base64.b64decode(text, validate=True)))
    except (ValueError, OSError, EOFError, zlib.error):
        return False


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
durable.write_text(Path(sys.argv[1]), "new " * 1000, manifest=sys.argv[3] == "True")
"""


@pytest.mark.parametrize(("manifest", "calls"), [(False, 5), (True, 12)])
def test_a_small_file_is_the_old_or_the_new_one_wherever_the_kill_falls(
    tmp_path: Path, manifest: bool, calls: int
) -> None:
    file, seen = tmp_path / "file.json", set()
    for at in range(1, calls + 1):
        write_text(file, "old", manifest=manifest)
        command = [sys.executable, "-c", KILLED_IN_WRITE, str(file), str(at), str(manifest)]
        done = subprocess.run(command, check=False, timeout=60)
        text = file.read_text()
        assert text in ("old", "new " * 1000)
        assert durable.file_damage(file) is None, "what a kill leaves is never called damaged"
        seen.add((done.returncode, text[:3]))
    assert {(-signal.SIGKILL, "old"), (-signal.SIGKILL, "new")} <= seen
    assert (0, "new") in seen, "beyond the last call of a write there is none to be killed at"
    sweep(tmp_path)
    manifests = [".file.json.manifest.json"] if manifest else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*manifests, "file.json"]


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
