"""The memory estimate against tensors that a real (tiny) trainer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config

from tiny_training import prefers, tiny_recipe
from ups_rm.layers.decoder import DecoderLayers
from ups_rm.local.decode import FastDecoder
from ups_rm.local.dry_run import (
    ACTIVATIONS,
    KEPT,
    MemoryEstimate,
    estimate_memory,
    kept_once,
    print_dry_run,
    prompts_at_once,
)
from ups_rm.local.group_cache import GroupCache
from ups_rm.local.policy import Policy
from ups_rm.local.sampling import Sampling
from ups_rm.local.sequences import Sequences
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import Recipe

MODEL = "actor_rollout_ref.model."
DTYPE = "actor_rollout_ref.actor.fsdp_config.dtype="


def estimate(recipe: Recipe, rm_bytes: int = 0) -> MemoryEstimate:
    return estimate_memory(recipe, AutoConfig.from_pretrained(recipe.actor_rollout_ref.model.path), rm_bytes)


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes of distinct storages: tied tensors count once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def longest() -> Sequences:
    """4 replies of 12 tokens to each of 2 prompts of 40."""
    prompts = torch.randint(5, 90, (2, 40)).repeat_interleave(4, 0)
    return Sequences(
        prompts=prompts, prompt_mask=torch.ones_like(prompts), responses=torch.randint(5, 90, (8, 12)),
        response_mask=torch.ones(8, 12, dtype=torch.long), group_ids=torch.arange(2).repeat_interleave(4),
    )  # fmt: skip


VARIANTS = {
    "fp32": [f"{DTYPE}float32"],
    "bf16": [f"{DTYPE}bfloat16"],
    "fp32, LoRA": [f"{DTYPE}float32", "actor_rollout_ref.model.lora_rank=4"],
    "bf16, LoRA": [f"{DTYPE}bfloat16", "actor_rollout_ref.model.lora_rank=4"],
    "bf16, LoRA on q and v": [
        f"{DTYPE}bfloat16", "actor_rollout_ref.model.lora_rank=2",
        "actor_rollout_ref.model.target_modules=[q_proj,v_proj]",
    ],
    "no KL": [f"{DTYPE}bfloat16", "algorithm.use_kl_in_reward=false"],
    "KL only watched": [f"{DTYPE}bfloat16", "algorithm.use_kl_in_reward=false", "trainer.max_kl=0.5"],
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_weights_masters_gradients_and_optimizer_are_counted_exactly(
    tmp_path: Path, policy_folder: Path, backbone_folder: Path, variant: list[str], tied: bool
) -> None:
    from transformers import LlamaForCausalLM

    folder = policy_folder
    if tied:
        folder = tmp_path / "tied"
        import shutil

        shutil.copytree(backbone_folder, folder)
        model = LlamaForCausalLM.from_pretrained(backbone_folder)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
    recipe = tiny_recipe(tmp_path, folder, "trainer.total_training_steps=1", *variant)
    trainer = Trainer(recipe, prefers("e"))
    seen: dict[str, int] = {}

    def look() -> None:
        masters = [master for _, master in trainer.policy.masters]
        seen["gradients"] = size([master.grad for master in masters if master.grad is not None])

    trainer.actor.optimizer.register_step_pre_hook(lambda *_: look())
    trainer.fit()
    parameters = list(trainer.policy.model.parameters())
    own = {id(parameter) for parameter in parameters}
    moments = [
        value
        for state in trainer.actor.optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    parts = estimate(recipe, rm_bytes=12345).parts
    assert parts["policy weights"] == size(parameters)
    assert parts["fp32 masters"] == size([m for _, m in trainer.policy.masters if id(m) not in own])
    assert parts["gradients"] == seen["gradients"]
    assert parts["optimizer (AdamW, two moments)"] == size(moments)
    reference = trainer.reference
    separate = reference is not None and reference is not trainer.policy
    assert parts["reference"] == (size(list(reference.model.parameters())) if reference and separate else 0)
    assert parts["reward model"] == 12345


def test_the_kv_cache_is_counted_exactly(tmp_path: Path, policy_folder: Path) -> None:
    """Keys and values of all replies that decode at the same time, and once per group those of the longest prompt."""
    for overrides, rows in (([], 16), (["actor_rollout_ref.rollout.max_num_seqs=8"], 8)):
        recipe = tiny_recipe(tmp_path, policy_folder, *overrides)
        parts = estimate(recipe).parts
        n = recipe.actor_rollout_ref.rollout.n
        keys = torch.zeros(2, rows // n, 2, 128, 16)  # layers, prompts, heads, tokens, size
        sizes = {"columns": n, "reply_length": 8, "heads": 4}
        cache = GroupCache(keys, keys.clone(), torch.full((rows // n,), 128), **sizes)
        held = [cache.prompt_keys, cache.prompt_values, cache.keys, cache.values]
        assert parts["KV cache of the rollout"] == size(held)


def test_packed_rollout_weights_are_counted_exactly(tmp_path: Path, policy_folder: Path) -> None:
    for dtype, lora in (("float32", 0), ("bfloat16", 0), ("float32", 2), ("bfloat16", 2)):
        recipe = tiny_recipe(tmp_path, policy_folder, f"{DTYPE}{dtype}", f"actor_rollout_ref.model.lora_rank={lora}")
        decoder = Trainer(recipe, prefers("e")).engine.decoder
        assert decoder is not None
        packed = decoder.copies(packed=True)  # in oneDNN's layout they have no storage that could be looked at
        held = sum(weight.numel() * weight.element_size() for weight in packed)
        assert estimate(recipe).parts["packed rollout weights"] == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_a_rollout_keeps_is_counted_exactly(
    tmp_path: Path, policy_folder: Path, dtype: str, lora_rank: int
) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{DTYPE}{dtype}", "data.max_prompt_length=40", "data.max_response_length=12",
        "data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4",
        f"{MODEL}lora_rank={lora_rank}",
    )  # fmt: skip
    decoder = FastDecoder.of(Policy.load(recipe).model)
    assert decoder is not None
    kept = decoder.kept_forward()
    sampling = Sampling(seed=1)
    decoder.generate([[5] * 40, [6] * 40], 4, 12, [], sampling, sampling.uniforms(8, 12), kept=kept)
    assert kept is not None
    assert kept.before + kept.now == 2 * 40 + 8 * 11 == kept.room - 24, "168 of the next multiple of 32"
    assert estimate(recipe).parts[KEPT] == size([part for layer in kept.layers for part in layer]) > 0


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1", "actor_rollout_ref.actor.entropy_coeff=0.1",
        "actor_rollout_ref.rollout.max_num_seqs=7", f"{MODEL}enable_gradient_checkpointing=true",
    ],
)  # fmt: skip
def test_nothing_is_kept_where_the_trainer_would_not(tmp_path: Path, policy_folder: Path, override: str) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, "data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.n=4", "trainer.total_training_steps=1", override,
    )  # fmt: skip
    trainer = Trainer(recipe, prefers("e"))
    seen: list[object] = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *a, **k: seen.append(out := generate(*a, **k)) or out  # type: ignore[method-assign]
    trainer.fit()
    assert [rollout.kept for rollout in seen] == [None]
    assert estimate(recipe).parts[KEPT] == 0


@pytest.mark.parametrize("scores_at_once", [2**22, 0], ids=["products", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_activations_are_what_layers_keep_for_backward(
    tmp_path: Path,
    policy_folder: Path,
    dtype: str,
    scores_at_once: int,
    lora_rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of prompts and replies as long as they may be: distinct tensors that autograd holds, weights left out."""
    for module in ("ups_rm.layers.decoder", "ups_rm.local.dry_run"):
        monkeypatch.setattr(f"{module}.SCORES_AT_ONCE", scores_at_once)
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{DTYPE}{dtype}", "data.max_prompt_length=40", "data.max_response_length=12",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8", "actor_rollout_ref.rollout.n=4",
        f"actor_rollout_ref.model.lora_rank={lora_rank}",
    )  # fmt: skip
    policy = Policy.load(recipe)
    part = longest()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logprobs, _ = policy.response_logprobs(part, 1.0)
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    held = size([tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own])
    estimated = estimate(recipe).parts["activations of a micro batch"]
    assert logprobs.requires_grad
    assert 0.8 * estimated < held < 1.1 * estimated


def test_layers_that_are_run_again_keep_their_inputs(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd holds before the backward; one layer's activations come on top when it is run again."""
    recipes = [
        tiny_recipe(
            tmp_path, policy_folder, f"{DTYPE}float32", "data.max_prompt_length=40", "data.max_response_length=12",
            f"{MODEL}enable_gradient_checkpointing={on}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        )
        for on in ("false", "true")
    ]  # fmt: skip
    whole, again = (estimate(recipe).parts[ACTIVATIONS] for recipe in recipes)
    inputs: list[torch.Tensor] = []
    run = DecoderLayers._layer
    monkeypatch.setattr(
        DecoderLayers, "_layer", lambda self, layer, x, *given: inputs.append(x) or run(self, layer, x, *given)
    )
    Policy.load(recipes[1]).response_logprobs(longest(), 1.0)
    once = 4 * kept_once(AutoConfig.from_pretrained(policy_folder), 2, 8, 40, 52)
    assert again - once - (whole - once) // len(inputs) == size(inputs)


def test_an_entropy_bonus_needs_all_logits(tmp_path: Path, policy_folder: Path) -> None:
    """Of every reply token, in fp32 and several times: transformers' forward and its autograd keep them."""
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{DTYPE}float32", "data.max_prompt_length=40", "data.max_response_length=12",
        "actor_rollout_ref.actor.entropy_coeff=0.01", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    )  # fmt: skip
    policy = Policy.load(recipe)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        policy.response_logprobs(longest(), 1.0, with_entropy=True)
    vocabulary = policy.model.config.vocab_size
    held = size(
        [tensor for tensor in kept if tensor.shape[-1:] == (vocabulary,) and tensor.numel() >= 8 * 12 * vocabulary]
    )
    assert 0.7 * estimate(recipe).parts["logits"] <= held <= 1.1 * estimate(recipe).parts["logits"]


@pytest.mark.parametrize(("micro_batch", "n"), [(8, 4), (8, 5), (3, 4), (2, 8), (5, 2), (1, 3), (64, 4)])
def test_prompts_of_a_micro_batch(tmp_path: Path, policy_folder: Path, micro_batch: int, n: int) -> None:
    """Against the cuts that the actor makes of groups side by side; shuffled mini batches may mix all."""
    batch = "data.train_batch_size=16"
    groups = torch.arange(16).repeat_interleave(n)
    most = max(len(rows.unique()) for rows in groups.split(micro_batch))
    assert prompts_at_once(micro_batch, n, tiny_recipe(tmp_path, policy_folder, batch)) == most
    shuffled = tiny_recipe(tmp_path, policy_folder, batch, "actor_rollout_ref.actor.shuffle=true")
    assert prompts_at_once(micro_batch, n, shuffled) == min(micro_batch, 16)


def test_the_total_does_not_add_what_is_never_there_together() -> None:
    parts = {"policy weights": 100, "packed rollout weights": 30, "KV cache of the rollout": 5, "gradients": 20,
             "activations of a micro batch": 40, "logits": 3}  # fmt: skip
    assert MemoryEstimate(parts).total == 163
    assert MemoryEstimate(parts | {"KV cache of the rollout": 50}).total == 180


def test_nothing_is_written_or_loaded(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, "reward_model.model.path=nowhere")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    print_dry_run(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for part in ("ppo_mini_batch_size: 4", "reads", "writes", "memory", "nowhere", "on Ctrl-C only", "total"):
        assert part in out


def test_any_architecture_under_the_home_folder_is_estimated(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's configuration as published has no intermediate_size: its MLP is 4 hidden sizes wide."""
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    assert not hasattr(config, "intermediate_size")
    config.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tiny_recipe(tmp_path, policy_folder, "actor_rollout_ref.model.path=~/gpt2", f"{DTYPE}float32")
    print_dry_run(recipe)
    assert "activations of a micro batch" in capsys.readouterr().out
    by_hand = 2 * (16 * (128 + 8)) * 2 * (6 * 16 + 3 * 64) * 4  # layers, tokens, numbers per layer and token, bytes
    assert estimate_memory(recipe, config, 0).parts["activations of a micro batch"] == by_hand


def test_a_policy_that_is_not_here_is_said_to_be(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, "actor_rollout_ref.model.path=someone/some-model")
    print_dry_run(recipe)
    assert "someone/some-model is not on this machine yet" in capsys.readouterr().out.replace("\n", " ")
