"""Parameters and FLOPs against real transformers models on the meta device: exact, full-size ones included."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tiny import tiny_rm
from ups_rm.errors import PlanError
from ups_rm.planning.architecture import Architecture, from_config, read_architecture, reward_model

NO_SHRINKING = (Phase.explicit, Phase.generate)  # a failing model is small already, and each costs a build


def build(config: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kwargs)


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A config of a random known type, sizes nobody picked."""
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head = 2 * draw(st.integers(1, 8))
    extra: dict[str, Any] = {"head_dim": head} if kind in ("llama", "qwen3", "mistral") else {}
    if kind in ("llama", "qwen3"):
        extra["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        extra["mlp_bias"] = draw(st.booleans())
    hidden = kv_heads * groups * (head if kind == "qwen2" else 2 * draw(st.integers(1, 8)))
    return AutoConfig.for_model(
        kind,
        vocab_size=draw(st.integers(2, 300)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 200)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_parameters_and_tensors_of_any_config_are_those_of_the_model(config):
    ours, model = from_config(config.to_dict()), build(config)
    assert ours.parameters == count(model)
    assert ours.tensors == len(list(model.parameters()))


@pytest.mark.parametrize(("name", "parameters"), [("qwen2-7b-instruct", 7_615_616_512), ("llama3-8b", 8_030_261_248)])
def test_the_packaged_full_size_descriptions_count_as_published(name, parameters):
    text = (resources.files("ups_rm.planning") / "architectures" / f"{name}.json").read_text(encoding="utf-8")
    fields = json.loads(text)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert read_architecture(name).parameters == count(build(config)) == parameters


def test_the_packaged_default_model_counts_as_published():
    assert read_architecture("smollm2-135m-instruct").parameters == 134_515_008


def test_an_rm_folder_counts_as_the_model_that_is_loaded_from_it(tmp_path):
    from ups_rm.reward.native import load_model

    folder = tiny_rm(tmp_path / "rm", hidden_dims=(16, 8))
    assert read_architecture(folder).parameters == count(load_model(folder, dtype=torch.float32))


def test_an_rm_of_a_language_model_has_the_mlp_in_place_of_the_lm_head():
    backbone = read_architecture("llama3-8b")
    judge = reward_model(backbone, "256,64")
    mlp = 4096 * 256 + 256 + 256 * 64 + 64 + 64 + 1
    assert judge.parameters == backbone.parameters - 4096 * 128_256 + mlp


@settings(max_examples=15, deadline=None, phases=NO_SHRINKING)
@given(configs(), st.integers(2, 40), st.integers(1, 3))
def test_forward_flops_are_those_that_torch_counts(config, length, batch):
    """torch counts every pair of positions in attention; causal attention needs half of them."""
    ours = from_config(config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    tokens = batch * length
    matmuls = 2 * ours.matmul_parameters * tokens
    pairs = ours.forward_flops(tokens, length) - matmuls
    rotary_angles = 2 * (ours.head_dim // 2) * length  # frequencies x positions, once; not counted by us
    assert counter.get_total_flops() == matmuls + 2 * pairs + rotary_angles


@settings(max_examples=15, deadline=None)
@given(configs(), st.integers(1, 20))
def test_kv_bytes_are_those_of_a_real_cache(config, length):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = DynamicCache(config=config)
    model(input_ids=torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert from_config(config.to_dict()).kv_bytes_per_token(2) * length == held


@pytest.mark.parametrize("rank", [1, 8])
def test_lora_parameters_are_those_that_peft_adds(rank):
    from peft import LoraConfig, get_peft_model

    fields = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 90}
    config = AutoConfig.for_model("qwen2", num_attention_heads=6, num_key_value_heads=2, **fields)
    model = get_peft_model(build(config), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert from_config(config.to_dict()).lora_parameters(rank) == trained


def test_a_name_without_description_says_which_there_are():
    with pytest.raises(PlanError, match=r"(?s)no config.json at no/such/model.*llama3-8b"):
        read_architecture("no/such/model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON"),
        ('{"model_type": "mixtral"}', "model_type 'mixtral' is not known"),
        ('{"model_type": "llama", "hidden_size": 8}', "intermediate_size, num_hidden_layers"),
    ],
)
def test_a_config_that_is_no_dense_decoder_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        read_architecture(tmp_path)


def test_the_class_needs_no_weights_and_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from ups_rm.planning import plan, report; from ups_rm.planning.architecture import "
        "read_architecture; read_architecture('llama3-8b'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert Architecture.__dataclass_params__.frozen  # type: ignore[attr-defined]
