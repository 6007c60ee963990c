"""verl's own merger on checkpoints laid out as verl's FSDP checkpoint manager does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tiny_training import command
from ups_rm.distributed.export import export_policy
from ups_rm.errors import CheckpointError, RunError

pytest.importorskip("verl", reason="verl is an extra")


def checkpoint(folder: Path, policy: Path, weights: dict[str, torch.Tensor]) -> Path:
    """`global_step_3` of one worker."""
    actor = folder / "global_step_3" / "actor"
    shutil.copytree(policy, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    torch.save(weights, actor / "model_world_size_1_rank_0.pt")
    return actor.parent


def test_adapters_are_merged_into_the_weights(tmp_path: Path, policy_folder: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    step = checkpoint(tmp_path, policy_folder, model.state_dict())
    meta = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    (step / "actor" / "lora_train_meta.json").write_text(json.dumps(meta))
    exported = AutoModelForCausalLM.from_pretrained(export_policy(step, tmp_path / "out"), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    expected = model.merge_and_unload().state_dict()
    assert not list((tmp_path / "out").glob("lora_adapter"))
    moved = 0
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2**-7, atol=2e-3)  # bfloat16
        old = before.get(name, before.get(name.replace(".weight", ".base_layer.weight")))
        moved += int(old is not None and not torch.allclose(value, old, rtol=2**-6, atol=5e-3))
    assert moved > 5


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "global_step_1").mkdir()
    with pytest.raises(CheckpointError, match="it has no actor/fsdp_config"):
        export_policy(tmp_path / "global_step_1", tmp_path / "out")


def test_a_broken_checkpoint_leaves_the_old_policy_alone(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = checkpoint(tmp_path, policy_folder, {})
    (step / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"cut short")
    shutil.copytree(policy_folder, tmp_path / "out")
    with pytest.raises(RunError, match="verl's model merger failed"):
        export_policy(step, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert command("export", step, "--out", tmp_path / "out") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
