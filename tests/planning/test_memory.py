"""Bytes against tensors that real models, optimizers and backward passes hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ups_rm.planning import memory
from ups_rm.planning.architecture import from_config, read_architecture, reward_model

SIZES = {"vocab_size": 500, "hidden_size": 96, "intermediate_size": 260, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
KINDS = ["llama", "qwen2", "qwen3"]
LAYOUT = memory.Layout(
    gpus=8, gpus_per_node=8, gpu_memory=140 * 10**9, shard_group=8, tensor_parallel=2, rollout_share=0.5, length=4096,
    micro_batch=8, logprob_micro_batch=8, checkpointing=True,
)  # fmt: skip
POLICY, RM = read_architecture("qwen2-7b-instruct"), reward_model(read_architecture("llama3-8b"))


def model_of(kind: str, dtype: torch.dtype = torch.float32, layers: int = 8) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"num_hidden_layers": layers}, **HEADS)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).train()


def kept_bytes(run: Any, model: Any) -> int:
    """Bytes of distinct storages that autograd keeps for the backward of `run()`, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_bytes_are_those_of_a_real_adamw(kind):
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert memory.optimizer_bytes(from_config(model.config.to_dict())) == held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"])
def test_activations_without_checkpointing_are_what_autograd_keeps(kind, dtype, width):
    model, tokens = model_of(kind, dtype), 3 * 150
    ids = torch.randint(0, 500, (3, 150))
    logprobs = lambda: torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)  # noqa: E731
    measured = kept_bytes(logprobs, model) - tokens * width * 500  # the log-softmax keeps its output
    ours = memory.activation_bytes(from_config(model.config.to_dict()), tokens, checkpointing=False, width=width)
    assert ours == pytest.approx(measured, rel=0.02)  # asked for: 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"])
def test_activations_with_checkpointing_are_layer_inputs_and_one_layer_at_work(kind, dtype, width):
    model, tokens = model_of(kind, dtype), 3 * 150
    ids, ours = torch.randint(0, 500, (3, 150)), from_config(model.config.to_dict())

    def kept_of_body(decoder: Any) -> int:
        return kept_bytes(lambda: decoder.model(input_ids=ids, use_cache=False), decoder)

    at_work = kept_of_body(model_of(kind, dtype, layers=2)) - kept_of_body(model_of(kind, dtype, layers=1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    measured = kept_of_body(model) + at_work
    assert memory.activation_bytes(ours, tokens, checkpointing=True, width=width) == pytest.approx(measured, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 64, 4096]))
def test_sharding_divides_the_training_state(group):
    whole = memory.training_state(POLICY, replace(LAYOUT, shard_group=1))
    parts = memory.training_state(POLICY, replace(LAYOUT, shard_group=group))
    assert parts == {name: size // group for name, size in whole.items()}
    assert sum(whole.values()) == pytest.approx(16 * POLICY.parameters, rel=1e-6)  # 4 + 4 + 8 bytes


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_rollout_weights_of_all_gpus_together_are_the_model_and_copied_norms(degree):
    norms = POLICY.hidden * (2 * POLICY.layers + 1)
    together = degree * memory.rollout_weights(POLICY, degree)
    assert together == 2 * (POLICY.parameters + (degree - 1) * norms)


def test_more_gpus_than_key_value_heads_hold_them_more_than_once():
    assert memory.kv_bytes_per_token(POLICY, 8) == memory.kv_bytes_per_token(POLICY, 4)
    assert 8 * memory.rollout_weights(POLICY, 8) > 4 * memory.rollout_weights(POLICY, 4)


def test_an_engine_without_room_has_no_cache():
    cache = memory.kv_cache(POLICY, replace(LAYOUT, gpu_memory=24 * 10**9, tensor_parallel=1))
    assert (cache.tokens, cache.sequences) == (0, 0)
    assert cache.bytes_per_gpu < 0


def test_the_cache_holds_as_many_tokens_as_its_bytes_say():
    cache = memory.kv_cache(POLICY, LAYOUT)
    assert cache.tokens == cache.bytes_per_gpu // (POLICY.kv_bytes_per_token(2) // 2)
    assert cache.sequences == cache.tokens // 4096


def test_offloading_takes_state_out_of_the_rollout_and_into_the_host():
    off = replace(LAYOUT, param_offload=True, optimizer_offload=True)
    gone = set(memory.phases(POLICY, RM, LAYOUT)["rollout"]) - set(memory.phases(POLICY, RM, off)["rollout"])
    assert gone == {"parameters (fp32)", "optimizer (AdamW)"}
    assert memory.phases(POLICY, RM, off)["update"] == memory.phases(POLICY, RM, LAYOUT)["update"]
    more = sum(memory.host_bytes(POLICY, off).values()) - sum(memory.host_bytes(POLICY, LAYOUT).values())
    assert more == 8 * sum(memory.training_state(POLICY, off)[name] for name in gone)


def test_an_rm_on_its_own_gpus_takes_nothing_from_the_training_gpus():
    for name, parts in memory.phases(POLICY, RM, replace(LAYOUT, rm_shared=False)).items():
        shared = memory.phases(POLICY, RM, LAYOUT)[name]
        assert sum(shared.values()) - sum(parts.values()) == memory.rm_bytes(RM, LAYOUT.rm_batch_tokens)
