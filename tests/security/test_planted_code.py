"""Code in a model folder: none of it runs without trust_remote_code, whatever loads the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import edit, with_code

from tiny import tiny_hf_rm
from tiny_training import tiny_recipe
from ups_rm.errors import PolicyError, RMError, UpsRmError
from ups_rm.local.policy import Policy
from ups_rm.recipe import RewardModel, RewardModelModel
from ups_rm.reward.open import open_scorer
from ups_rm.types import Message

TALK = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello there.")]


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that planted code would write; somebody at the keyboard says yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_rm(tmp_path_factory.mktemp("hf") / "classifier")


@pytest.fixture(scope="module")
def pair_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_rm(tmp_path_factory.mktemp("hf") / "pairs", kind="causal")


def load_policy(folder: Path, tmp_path: Path, trust: bool = False) -> None:
    remote = f"actor_rollout_ref.model.trust_remote_code={trust}"
    Policy.load(tiny_recipe(tmp_path / "work", folder, remote))


def score(folder: Path, kind: str, trust: bool = False) -> None:
    entry = RewardModelModel(path=str(folder), kind=kind, dtype="float32", trust_remote_code=trust)
    open_scorer(RewardModel(model=entry)).score([TALK, TALK])


def pair(folder: Path) -> None:
    entry = RewardModelModel(path=str(folder), kind="pairwise", dtype="float32")
    open_scorer(RewardModel(model=entry)).score([TALK, TALK])


def second_judge(folder: Path, tmp_path: Path, policy: Path) -> None:
    from ups_rm.monitor.judge import open_judge

    judge = open_judge(
        tiny_recipe(tmp_path / "work", policy, f"monitor.judge.path={folder}", "monitor.judge.dtype=float32")
    )
    assert judge is not None
    judge.score([TALK])


def features(folder: Path) -> None:
    from ups_rm.reward.features import backbone_config, load_decoder
    from ups_rm.reward.merge import load_backbone_tokenizer

    backbone_config(folder)
    load_backbone_tokenizer(folder, None)
    load_decoder(folder, torch.float32)


def doctor(folder: Path, policy: Path) -> None:
    from ups_rm.reward.doctor import check_rm

    check_rm(folder, policy=str(policy))


def tokenizer_for_verl(folder: Path) -> None:
    from ups_rm.distributed.engine import _tokenizer

    _tokenizer(str(folder), False)


def dry_run(folder: Path) -> None:
    from ups_rm.local.dry_run import _local_config

    _local_config(str(folder), False)


Loader = Callable[[dict[str, Path], Path], Any]
LOADERS: dict[str, tuple[str, Loader]] = {
    "policy": ("policy", lambda at, tmp: load_policy(at["policy"], tmp)),
    "policy of a dry run": ("policy", lambda at, _: dry_run(at["policy"])),
    "policy's tokenizer for verl": ("policy", lambda at, _: tokenizer_for_verl(at["policy"])),
    "RM": ("rm", lambda at, _: score(at["rm"], "myrm")),
    "classifier": ("classifier", lambda at, _: score(at["classifier"], "sequence")),
    "judge of pairs": ("pairs", lambda at, _: pair(at["pairs"])),
    "second RM": ("rm", lambda at, tmp: second_judge(at["rm"], tmp, at["good policy"])),
    "backbone of features": ("backbone", lambda at, _: features(at["backbone"])),
    "RM of the doctor": ("rm", lambda at, _: doctor(at["rm"], at["good policy"])),
    "policy of the doctor": ("policy", lambda at, _: doctor(at["good rm"], at["policy"])),
}


@pytest.fixture
def folders(
    policy_folder: Path, rm_folder: Path, backbone_folder: Path, classifier: Path, pair_judge: Path
) -> dict[str, Path]:
    """By what is attacked; `good ...` are left as they are."""
    return {
        "policy": policy_folder, "rm": rm_folder, "backbone": backbone_folder, "classifier": classifier,
        "pairs": pair_judge, "good policy": policy_folder, "good rm": rm_folder,
    }  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_a_known_architecture_loads_by_our_code_and_never_by_the_folders(
    name: str, folders: dict[str, Path], mark: Path, tmp_path: Path
) -> None:
    which, load = LOADERS[name]
    load(folders | {which: with_code(folders[which], tmp_path / "evil", mark, known=True)}, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("name", LOADERS)
def test_an_architecture_that_only_the_folder_knows_is_refused(
    name: str, folders: dict[str, Path], mark: Path, tmp_path: Path
) -> None:
    """Also where a person at the keyboard would say yes to transformers' question: the recipe decides."""
    which, load = LOADERS[name]
    evil = with_code(folders[which], tmp_path / "evil", mark, known=False)
    if which == "rm":
        edit(evil / "config.json", backbone_model_type="evil")
    try:
        load(folders | {which: evil}, tmp_path)
    except UpsRmError:
        pass
    else:  # a tokenizer that is stored as one file needs no class; the doctor reports instead of raising
        assert "tokenizer" in name or "doctor" in name
    assert not mark.exists()


def test_with_trust_remote_code_it_runs_so_the_plants_are_real(
    folders: dict[str, Path], mark: Path, tmp_path: Path
) -> None:
    policy = with_code(folders["policy"], tmp_path / "policy", mark, known=False)
    with pytest.raises((PolicyError, RuntimeError)):
        load_policy(policy, tmp_path, trust=True)
    assert mark.read_text() == "ran"
    mark.unlink()
    rm = with_code(folders["rm"], tmp_path / "rm", mark, known=True)
    with pytest.raises((RMError, RuntimeError)):
        score(rm, "myrm", trust=True)
    assert mark.read_text() == "ran"


def test_a_template_that_breaks_out_of_its_sandbox_is_refused(rm_folder: Path, mark: Path, tmp_path: Path) -> None:
    evil = tmp_path / "rm"
    shutil.copytree(rm_folder, evil)
    (evil / "rm_card.json").unlink()
    (evil / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}{{ messages[0]['content'] }}"
    )
    with pytest.raises(RMError, match="unsafe"):
        score(evil, "myrm")
    assert not mark.exists()
