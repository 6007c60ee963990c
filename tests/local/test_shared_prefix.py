"""The forward that computes a group's prompt once: log-probabilities and gradients against transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_training import (
    FAST,
    UNKNOWN,
    VOCAB,
    ProductSizes,
    causal_lm,
    policy_of,
    random_sequences,
    slow_logprobs,
    with_adapters,
)  # fmt: skip
from ups_rm.layers import decoder
from ups_rm.layers.elementwise import RMSNorm
from ups_rm.layers.grid import COLUMNS_BY
from ups_rm.local import shared_prefix
from ups_rm.local.actor import response_logprobs
from ups_rm.local.policy import Policy
from ups_rm.local.selected_logprobs import SelectedLogprobs
from ups_rm.local.sequences import Sequences
from ups_rm.local.shared_prefix import SharedPrefixForward

TEMPERATURE = 0.8
# Three groups, their rows interleaved; one of a single reply, one with an empty reply; different lengths.
LENGTHS, GROUPS = [5, 3, 0, 7, 1, 4, 6, 2], [4, 4, 4, 9, 0, 0, 4, 0]


def by_row(model: Any, sequences: Sequences) -> Tensor:
    """(B, R) by one unpadded forward per row: no padding, no masks, no positions that could be wrong."""
    out = torch.zeros(sequences.responses.shape)
    for i in range(len(sequences)):
        prompt = sequences.prompts[i][sequences.prompt_mask[i].bool()].tolist()
        reply = sequences.responses[i][sequences.response_mask[i].bool()].tolist()
        if reply:
            out[i, : len(reply)] = slow_logprobs(model, prompt, reply, TEMPERATURE)
    return out


def naive_loss(logprobs: Tensor, sequences: Sequences) -> Tensor:
    """A clipped policy loss, token mean, written out; advantages and old log-probabilities are random but fixed."""
    generator = torch.Generator().manual_seed(8)
    shape = sequences.responses.shape
    advantages = torch.randn(shape[0], 1, generator=generator)
    old = logprobs.detach() + 0.3 * torch.randn(shape, generator=generator)
    ratio = (logprobs - old).exp()
    per_token = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.2))
    return (per_token * sequences.response_mask).sum() / sequences.response_mask.sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, trained: int) -> None:
    """Each parameter's gradient within 1e-4 of its own size, and its largest element too."""
    assert ours.keys() == theirs.keys()
    assert len(theirs) == trained
    largest = max(float(g.norm()) for g in theirs.values())
    for name, expected in theirs.items():
        scale = max(float(expected.norm()), 1e-5 * largest)  # a gradient that is zero up to rounding has no direction
        assert float((ours[name] - expected).norm()) <= 1e-4 * scale, name
        assert expected.norm() > 0, f"{name} has no gradient: the test would see nothing"


def shared(policy: Policy, sequences: Sequences) -> Tensor:
    prompts, mask, group = sequences.unique_prompts()
    assert policy.shared is not None
    return policy.shared.response_logprobs(
        prompts, mask, sequences.responses, sequences.response_mask, group, TEMPERATURE
    )


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Number of times the module runs forward."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("scores", [0, decoder.SCORES_AT_ONCE], ids=["sdpa", "products"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("architecture", FAST)
def test_logprobs_and_every_gradient_equal_the_plain_forward(
    architecture: str, checkpointing: bool, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "SCORES_AT_ONCE", scores)
    sequences = random_sequences(LENGTHS, GROUPS)
    plain = causal_lm(architecture)
    expected = by_row(plain, sequences)
    naive_loss(expected, sequences).backward()
    model = causal_lm(architecture)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.eval()
    with counted(model.model.layers[0].self_attn.q_proj) as calls:
        logprobs = shared(policy_of(model), sequences)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        naive_loss(logprobs, sequences).backward()
    assert len(calls) == (2 if checkpointing else 1)
    assert_gradients_close(gradients(model), gradients(plain), trained=len(list(plain.parameters())))


@pytest.mark.parametrize("scores", [0, decoder.SCORES_AT_ONCE], ids=["sdpa", "products"])
@pytest.mark.parametrize("architecture", FAST)
def test_what_prompts_begin_with_is_computed_once(
    architecture: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a template's system prompt; one prompt is the beginning of another, and two groups have the same one."""
    monkeypatch.setattr(decoder, "SCORES_AT_ONCE", scores)
    monkeypatch.setattr(shared_prefix, "rounded", lambda count: count)
    begin = [7, 8, 9, 10, 11]
    prompts = {0: [*begin, 5], 1: [*begin, 6, 7], 2: begin, 3: [*begin, 6, 7], 4: [3, *begin]}
    groups = [0, 1, 1, 2, 3, 4, 2, 0]
    drawn = random_sequences(LENGTHS, groups)
    width = 8
    rows = [[0] * (width - len(prompts[group])) + prompts[group] for group in groups]
    sequences = replace(drawn, prompts=torch.tensor(rows), prompt_mask=(torch.tensor(rows) > 0).long())
    plain, model = causal_lm(architecture), causal_lm(architecture)
    expected = by_row(plain, sequences)
    naive_loss(expected, sequences).backward()
    seen: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    found = shared(policy_of(model), sequences)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    naive_loss(found, sequences).backward()
    assert_gradients_close(gradients(model), gradients(plain), trained=len(list(plain.parameters())))
    assert seen == [len(begin) + 1 + 2 + 6 + sum(max(0, length - 1) for length in LENGTHS)]


def test_all_layers_share_one_mask_where_sdpa_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward keeps the mask: a copy for each layer would be gigabytes at 2048 tokens."""
    monkeypatch.setattr(decoder, "SCORES_AT_ONCE", 0)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spied(*given: Tensor, attn_mask: Tensor) -> Tensor:
        masks.append(attn_mask)
        return attend(*given, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    model = causal_lm("llama")
    shared(policy_of(model), random_sequences(LENGTHS, GROUPS))
    assert len(masks) == 2 * len(model.model.layers) > 2
    assert len({mask.data_ptr() for mask in masks}) == 2


def test_a_sampled_padding_token_gets_no_gradient_as_in_transformers() -> None:
    """A policy may say its padding token: it is read like any other, and nn.Embedding keeps its row as it is."""
    model = causal_lm("qwen2 untied")
    assert model.get_input_embeddings().padding_idx == 0
    policy, sequences = policy_of(model), random_sequences(LENGTHS, GROUPS)
    sequences.responses[0, 1] = sequences.responses[3, 4] = 0
    naive_loss(shared(policy, sequences), sequences).backward()
    ours = gradients(model)
    model.zero_grad()
    naive_loss(by_row(model, sequences), sequences).backward()
    assert_gradients_close(ours, gradients(model), trained=len(ours))
    assert float(ours["model.embed_tokens.weight"][0].abs().max()) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_gradients_add_up_however_groups_are_split_over_micro_batches(size: int) -> None:
    sequences = random_sequences(LENGTHS, GROUPS, seed=3)
    plain = causal_lm("qwen2 untied")
    whole = by_row(plain, sequences)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)) * sequences.response_mask
    (whole * weights).sum().backward()
    model = causal_lm("qwen2 untied")
    policy = policy_of(model)
    seen: list[int] = []
    for rows in sequences.micro_batches(torch.arange(len(sequences)), size):
        part = sequences.trimmed(rows)
        assert len(rows) <= size
        seen += rows.tolist()
        logprobs, _ = policy.response_logprobs(part, TEMPERATURE)
        (logprobs * weights[rows, : logprobs.shape[1]] * part.response_mask).sum().backward()
    assert sorted(seen) == list(range(len(sequences)))
    assert_gradients_close(gradients(model), gradients(plain), trained=len(list(plain.parameters())))


def test_a_batch_of_empty_replies_gives_zero_and_no_nan() -> None:
    policy = policy_of(causal_lm())
    sequences = random_sequences([0, 0], [0, 1], response_padding=3)
    logprobs = shared(policy, sequences)
    logprobs.sum().backward()
    assert logprobs.tolist() == [[0.0] * 3] * 2
    assert all(bool(torch.isfinite(g).all()) for g in gradients(policy.model).values())


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_any_batch_has_the_plain_forwards_logprobs(
    lengths: list[int], left: int, right: int, size: int, seed: int
) -> None:
    """Lengths, padding on both sides, group membership and micro batch size as hypothesis likes."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 3, (len(lengths),), generator=generator).tolist()
    sequences = random_sequences(lengths, groups, seed=seed, prompt_padding=left, response_padding=max(right, 1))
    model = causal_lm("qwen3 wide heads")
    policy = policy_of(model, trainable=False)
    found = response_logprobs(policy, sequences, micro_batch_size=size, temperature=TEMPERATURE)
    with torch.no_grad():
        torch.testing.assert_close(found, by_row(model, sequences), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", *UNKNOWN])
def test_the_plain_path_agrees_too_and_gives_the_entropy(architecture: str) -> None:
    model = causal_lm(architecture)
    sequences = random_sequences(LENGTHS, GROUPS)
    policy = policy_of(model, trainable=False)
    assert (policy.shared is None) == (architecture in UNKNOWN)
    mask = sequences.response_mask
    logprobs, entropy = policy.plain_logprobs(sequences, TEMPERATURE, with_entropy=True)
    torch.testing.assert_close(logprobs * mask, by_row(model, sequences), atol=1e-4, rtol=0)
    assert entropy is not None
    prompt = sequences.prompts[3][sequences.prompt_mask[3].bool()].tolist()
    reply = sequences.responses[3][mask[3].bool()].tolist()
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[3, : len(reply)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_plain_path_checkpoints_where_the_recipe_asks_for_it(architecture: str) -> None:
    sequences = random_sequences(LENGTHS, GROUPS)
    found = {}
    for checkpointing in (False, True):
        model = causal_lm(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.eval()
        policy = policy_of(model)
        inner = model.transformer.h[0].mlp.c_fc if architecture == "gpt2" else model.model.layers[0].mlp.up_proj
        with counted(inner) as calls:
            logprobs, _ = policy.plain_logprobs(sequences, TEMPERATURE)
            naive_loss(logprobs, sequences).backward()
        assert len(calls) == (2 if checkpointing else 1)
        assert not any(module.training for module in model.modules())
        found[checkpointing] = gradients(model)
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, atol=1e-6, rtol=1e-5)


def lora_model(checkpointing: bool) -> Any:
    base = causal_lm("qwen2 untied")
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_adapters(base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_the_plain_forward(checkpointing: bool) -> None:
    sequences = random_sequences(LENGTHS, GROUPS)
    plain, model = lora_model(False), lora_model(checkpointing)
    expected = by_row(plain, sequences)
    naive_loss(expected, sequences).backward()
    policy = policy_of(model)
    assert policy.shared is not None
    assert policy.is_lora
    logprobs = shared(policy, sequences)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    naive_loss(logprobs, sequences).backward()
    assert_gradients_close(gradients(model), gradients(plain), trained=2 * 2 * 7)  # A and B, 2 layers, 7 linear layers
    with policy.as_reference(), torch.no_grad():
        base = shared(policy, sequences)
    assert float((base - logprobs).abs().max()) > 0.05
    torch.testing.assert_close(base, by_row(causal_lm("qwen2 untied"), sequences).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_adapters_on_embeddings_or_head_are_left_to_the_plain_forward(target: list[str]) -> None:
    """The fast paths read those weights directly and would pass over an adapter."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        causal_lm("qwen2 untied"), LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    sequences = random_sequences(LENGTHS, GROUPS)
    policy = policy_of(model)
    with torch.no_grad():
        expected = by_row(model, sequences)
        found = response_logprobs(policy, sequences, micro_batch_size=4, temperature=TEMPERATURE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_selected_logprobs_pass_gradcheck_in_double(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.double, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return SelectedLogprobs.apply(h, w, targets, 0.7, chunk)

    expected = (hidden @ weight.t() / 0.7).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(function(hidden, weight), expected)
    assert torch.autograd.gradcheck(function, (hidden, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda h: SelectedLogprobs.apply(h, frozen, targets, 0.7, chunk), (hidden,))


def test_bf16_logprobs_stay_near_fp32() -> None:
    """The only rounding is the model's own: fp32 softmax over bf16 logits, tokens of a group once."""
    sequences = random_sequences(LENGTHS, GROUPS)
    exact = by_row(causal_lm("llama", initializer_range=0.05), sequences).detach()
    model = causal_lm("llama", initializer_range=0.05).to(torch.bfloat16)
    found = shared(policy_of(model, trainable=False), sequences)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 0.05


def test_prompts_are_computed_once_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module is for: 12 replies to one prompt send one prompt through the layers, no padding (but what makes
    the number round, left out here), and of each reply all but its last token, which predicts nothing."""
    monkeypatch.setattr(shared_prefix, "rounded", lambda count: count)
    sequences = random_sequences([3] * 11 + [1], [0] * 12, prompt_padding=2, response_padding=4)
    model = causal_lm()
    tokens: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, args, __: tokens.append(len(args[0])))
    shared(policy_of(model), sequences)
    assert tokens == [int(sequences.prompt_mask[0].sum()) + 11 * 2]
    assert isinstance(SharedPrefixForward.of(model), SharedPrefixForward)
    assert model.config.vocab_size == VOCAB


def test_rms_norm_passes_gradcheck_in_double() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(5, dtype=torch.double, generator=generator, requires_grad=True)
    torch.testing.assert_close(
        RMSNorm.apply(x, weight, 0.1), weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    )
    assert torch.autograd.gradcheck(lambda *given: RMSNorm.apply(*given, 0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda given: RMSNorm.apply(given, weight.detach(), 0.1), (x,))


@pytest.mark.parametrize("lengths", [LENGTHS, [9, 17, 18, 3, 5, 8, 1, 30]])
def test_products_are_of_round_sizes(lengths: list[int]) -> None:
    """Each size of a product is a kernel that oneDNN makes and keeps: whatever lengths come, sizes must be few."""
    sequences = random_sequences(lengths, GROUPS)
    model = causal_lm("llama", num_key_value_heads=4)
    config = model.config
    batches = {len(set(GROUPS)) * config.num_attention_heads, len(lengths) * config.num_attention_heads}  # of attention
    rotation = {1, config.head_dim // 2}  # transformers makes its angles by a product
    of_model = {config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim, *batches, *rotation}
    with ProductSizes() as sizes:
        naive_loss(shared(policy_of(model), sequences), sequences).backward()
    of_tokens = sizes.found - of_model
    assert of_tokens
    assert all(size % COLUMNS_BY == 0 for size in of_tokens), of_tokens
