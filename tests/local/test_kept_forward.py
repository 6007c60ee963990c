"""The training forward that goes on from what decoding computed, against the forward that computes it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared_prefix import assert_gradients_close, by_row, gradients, naive_loss
from torch import Tensor

from tiny import qwen_tokenizer
from tiny_training import FAST, causal_lm, policy_of, prefers, tiny_recipe, with_adapters
from ups_rm.errors import NumberError
from ups_rm.layers import elementwise, linear, native
from ups_rm.local.decode import FastDecoder
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.local.trainer import Trainer
from ups_rm.types import Message, Score

CHATS = [
    [Message(role="user", content=text)]
    for text in ("bake", "Tell me about the sun and the moon", "I can't help with that", "piano")
]
TEMPERATURE = 0.8


def model_of(architecture: str) -> Any:
    """A model whose every fifth token ends a reply: they end at different lengths."""
    model = causal_lm(architecture, vocab_size=len(qwen_tokenizer()))
    model.generation_config.eos_token_id = list(range(2, len(qwen_tokenizer()), 5))
    return model


def rollout_of(policy: Policy, *, length: int = 12, n: int = 3, seed: int = 5, temperature: float = 2.0) -> Rollout:
    sampling = Sampling(temperature, seed=seed)
    return RolloutEngine(policy).generate(CHATS, n=n, max_new_tokens=length, sampling=sampling, keep=True)


def logprobs_of(policy: Policy, rollout: Rollout, kept: KeptForward | None) -> Tensor:
    return policy.response_logprobs(rollout.sequences, TEMPERATURE, kept=kept)[0]


def test_the_last_tokens_of_replies_are_drawn_but_not_read() -> None:
    policy = policy_of(model_of("llama"))
    rollout = rollout_of(policy)
    assert rollout.kept is not None
    assert sum(map(len, rollout.kept.rows)) == int(rollout.sequences.response_mask[:, 1:].sum())


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(native, "kernels", lambda: None)
    return bool(request.param)


@pytest.mark.parametrize("temperature", [TEMPERATURE, 2.0], ids=["one temperature", "drawn at another"])
@pytest.mark.parametrize("architecture", FAST)
def test_logprobs_and_every_gradient_equal_the_plain_forward(
    architecture: str, temperature: float, kernels: bool
) -> None:
    plain, model = model_of(architecture), model_of(architecture)
    policy = policy_of(model)
    rollout = rollout_of(policy, temperature=temperature)
    lengths = rollout.sequences.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 2, "replies should end at different lengths"
    expected = by_row(plain, rollout.sequences)
    naive_loss(expected, rollout.sequences).backward()
    assert rollout.kept is not None
    found = logprobs_of(policy, rollout, rollout.kept)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    naive_loss(found, rollout.sequences).backward()
    assert_gradients_close(gradients(model), gradients(plain), trained=len(list(plain.parameters())))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj", "down_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("architecture", ["llama without GQA, biases", "qwen2 tied", "qwen3 wide heads"])
def test_with_adapters_too(architecture: str, targets: str | list[str], kernels: bool) -> None:
    plain, model = (with_adapters(model_of(architecture), target_modules=targets) for _ in range(2))
    policy = policy_of(model)
    rollout = rollout_of(policy, temperature=TEMPERATURE)
    expected = by_row(plain, rollout.sequences)
    naive_loss(expected, rollout.sequences).backward()
    assert rollout.kept is not None
    found = logprobs_of(policy, rollout, rollout.kept)
    mask = rollout.sequences.response_mask.bool()
    assert torch.equal(found[mask], rollout.rollout_logprobs[mask])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    naive_loss(found, rollout.sequences).backward()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    assert_gradients_close(gradients(model), gradients(plain), trained=len(trained))


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_no_product_of_a_layer_is_computed_again(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    model = model_of("qwen3 wide heads")
    policy = policy_of(with_adapters(model) if lora else model)
    rollout = rollout_of(policy)
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return torch.nn.functional.linear(*given)

    for module in (linear, elementwise):
        monkeypatch.setattr(module, "product", counted)
    logprobs_of(policy, rollout, None)
    assert len(calls) == 7 * 2  # of two layers: the count sees them
    calls.clear()
    logprobs_of(policy, rollout, rollout.kept)
    assert calls == []


def test_what_is_kept_is_given_out_of_hand() -> None:
    policy = policy_of(model_of("llama"))
    rollout = rollout_of(policy)
    assert rollout.kept is not None
    assert all(rollout.kept.layers)
    logprobs_of(policy, rollout, rollout.kept)
    assert not any(rollout.kept.layers)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), length=st.integers(1, 9), seed=st.integers(0, 99), heat=st.sampled_from([0.0, 1.0, 4]))
def test_any_rollout_gives_the_logprobs_of_the_whole_forward(n: int, length: int, seed: int, heat: float) -> None:
    policy = policy_of(model_of("qwen2 untied"))
    rollout = rollout_of(policy, length=length, n=n, seed=seed, temperature=heat)
    expected = logprobs_of(policy, rollout, None)
    torch.testing.assert_close(logprobs_of(policy, rollout, rollout.kept), expected, atol=1e-5, rtol=0)


def test_replies_are_the_same_with_and_without(kernels: bool) -> None:
    policy = policy_of(model_of("qwen2 tied"))
    sampling = Sampling(2.0, seed=3)
    a, b = (
        RolloutEngine(policy).generate(CHATS, n=4, max_new_tokens=15, sampling=sampling, keep=keep)
        for keep in (False, True)
    )
    assert a.kept is None
    assert torch.equal(a.sequences.responses, b.sequences.responses)
    torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5, rtol=0)


def test_in_bf16_what_is_trained_is_what_was_sampled() -> None:
    """The whole forward rounds otherwise than decoding does."""
    policy = policy_of(model_of("llama"))
    policy.make_masters(torch.bfloat16)
    engine = RolloutEngine(policy)
    rollout = engine.generate(CHATS, n=8, max_new_tokens=20, sampling=Sampling(1.0, seed=1), keep=True)
    mask = rollout.sequences.response_mask.bool()

    def mismatch(kept: KeptForward | None) -> Tensor:
        logprobs, _ = policy.response_logprobs(rollout.sequences, 1.0, kept=kept)
        return (logprobs.detach() - rollout.rollout_logprobs)[mask].abs()

    assert float(mismatch(None).max()) > 1e-3
    assert float(mismatch(rollout.kept).max()) == 0


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model


def _hooked(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def _dropping(model: Any) -> Any:
    return with_adapters(model, lora_dropout=0.5)


def _adapted_head(model: Any) -> Any:
    return with_adapters(model, target_modules=["q_proj", "lm_head"])


def _mixed(model: Any) -> Any:
    model.model.layers[0].self_attn.o_proj.to(torch.float64)
    return model


@pytest.mark.parametrize("change", [_checkpointed, _hooked, _dropping, _adapted_head, _mixed])
def test_nothing_is_kept_where_the_training_forward_computes_otherwise(change: Callable[[Any], Any]) -> None:
    decoder = FastDecoder.of(change(model_of("llama")))
    assert decoder is not None
    assert decoder.kept_forward() is None


def test_nothing_is_kept_of_a_rollout_in_parts_or_by_generate() -> None:
    def kept(policy: Policy, most: int) -> KeptForward | None:
        engine = RolloutEngine(policy, max_num_seqs=most)
        return engine.generate(CHATS, n=2, max_new_tokens=3, sampling=Sampling(seed=1), keep=True).kept

    assert kept(policy_of(model_of("llama")), 8) is not None
    assert kept(policy_of(model_of("llama")), 7) is None
    assert kept(policy_of(model_of("gpt2")), 8) is None


def test_other_sequences_than_the_rollouts_are_refused() -> None:
    policy = policy_of(model_of("llama"))
    rollout = rollout_of(policy)
    rollout.sequences.response_mask[0, 1:] = 0
    with pytest.raises(ValueError, match="are not the"):
        logprobs_of(policy, rollout, rollout.kept)


@pytest.mark.parametrize("what", ["prompts", "responses"])
def test_other_tokens_of_the_same_lengths_are_refused(what: str) -> None:
    policy = policy_of(model_of("llama"))
    rollout = rollout_of(policy)
    getattr(rollout.sequences, what)[:, -1 if what == "prompts" else 0] += 1
    with pytest.raises(ValueError, match="are not the"):
        logprobs_of(policy, rollout, rollout.kept)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_in_bf16_gradients_are_as_near_to_fp32s_as_those_of_the_whole_forward(lora: bool) -> None:
    exact, rounded = model_of("qwen2 tied"), model_of("qwen2 tied")
    if lora:
        exact, rounded = with_adapters(exact), with_adapters(rounded.to(torch.bfloat16))
    policy = policy_of(rounded)
    policy.make_masters(torch.bfloat16)
    rollout = rollout_of(policy, n=6, temperature=TEMPERATURE)
    advantages = torch.randn(len(rollout.texts), 1, generator=torch.Generator().manual_seed(2))

    def gradients_of(of: Policy, kept: KeptForward | None) -> dict[str, Tensor]:
        of.model.zero_grad()
        (logprobs_of(of, rollout, kept) * advantages * rollout.sequences.response_mask).sum().backward()
        return {name: grad.float() for name, grad in gradients(of.model).items()}

    truth = gradients_of(policy_of(exact), None)
    whole, going_on = gradients_of(policy, None), gradients_of(policy, rollout.kept)

    def error(found: dict[str, Tensor]) -> float:
        return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in truth.items())

    assert 0 < error(going_on) < 1.5 * error(whole) < 0.2


# ---- in the trainer

WHOLE = [f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={4 * 4}", "actor_rollout_ref.rollout.temperature=2"]


def spied(trainer: Trainer) -> list[Rollout]:
    """The rollouts of its steps, as they come."""
    seen: list[Rollout] = []
    generate = trainer.engine.generate

    def spy(*given: Any, **named: Any) -> Rollout:
        seen.append(generate(*given, **named))
        return seen[-1]

    trainer.engine.generate = spy  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("kl", ["true", "false"], ids=["KL", "no KL"])
def test_steps_go_on_from_their_rollout_but_for_one_in_fifty(tmp_path: Path, policy_folder: Path, kl: str) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *WHOLE, f"algorithm.use_kl_in_reward={kl}")
    trainer = Trainer(recipe, prefers("e"))
    seen = spied(trainer)
    calls: list[int] = []
    trainer.policy.model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    for number, keeps in ((1, False), (2, True), (50, True), (51, False), (52, True)):
        calls.clear()
        record = trainer.step(trainer.train_rows[:4], number)
        assert (seen[-1].kept is not None) == keeps
        assert len(calls) == 1
        if seen[-1].kept is not None:
            assert not any(seen[-1].kept.layers)
            assert torch.equal(record.old_logprobs, record.rollout.rollout_logprobs)
        gap = "rollout/logprob_gap_max" in trainer.metrics(record, number)
        assert gap == (not keeps and kl == "true")


def test_a_run_ends_as_one_that_computes_every_forward_whole(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(name: str) -> dict[str, Tensor]:
        recipe = tiny_recipe(tmp_path / name, policy_folder, *WHOLE, "trainer.total_training_steps=4")
        trainer = Trainer(recipe, prefers("e"))
        seen = spied(trainer)
        trainer.fit()
        assert [rollout.kept is None for rollout in seen] == [True, *[name == "whole"] * 3]
        return {name: weight.detach().clone() for name, weight in trainer.policy.model.named_parameters()}

    going_on = ended("going on")
    monkeypatch.setattr(FastDecoder, "kept_forward", lambda self: None)
    whole = ended("whole")
    for name, weight in whole.items():
        torch.testing.assert_close(going_on[name], weight, atol=1e-4, rtol=0)


def test_nothing_is_held_of_replies_that_are_drawn_again(tmp_path: Path, policy_folder: Path) -> None:
    """All scores are equal, so every group is flat and drawn anew."""

    class Same:
        def score(self, conversations: list[Any]) -> list[Score]:
            return [Score(0.0, 0.5, 0, False) for _ in conversations]

    overrides = ["algorithm.zero_std_groups=resample", "algorithm.resamples=2"]
    trainer = Trainer(tiny_recipe(tmp_path, policy_folder, *WHOLE, *overrides), Same())
    seen = spied(trainer)
    trainer.step(trainer.train_rows[:4], 2)
    first, *again = [rollout.kept for rollout in seen]
    assert first is not None
    assert first.layers == []
    assert again == [None, None]


def test_nothing_is_held_of_a_step_that_is_left_out(tmp_path: Path, policy_folder: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, policy_folder, *WHOLE), prefers("e"))
    update = trainer.actor.update

    def broken(*given: Any, step: int, **named: Any) -> dict[str, float]:
        if step == 2:
            raise NumberError("the loss")
        assert trainer._at_work is not None
        return update(*given, step=step, **named)

    trainer.actor.update = broken  # type: ignore[method-assign]
    skip, held = trainer._skip, []

    def after(*given: Any) -> dict[str, float]:
        metrics = skip(*given)
        held.append(trainer._at_work)
        return metrics

    trainer._skip = after  # type: ignore[method-assign]
    trainer.fit()
    assert held == [None]
