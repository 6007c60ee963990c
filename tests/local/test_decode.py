"""The decode loop against transformers: same greedy tokens, same probabilities, nothing depends on the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tiny import qwen_tokenizer
from tiny_training import (
    FAST,
    UNKNOWN,
    ProductSizes,
    causal_lm,
    policy_of,
    random_prompts,
    slow_logprobs,
    with_adapters,
)
from ups_rm.errors import PolicyError
from ups_rm.layers.projection import Projection
from ups_rm.local.decode import FastDecoder, _beside, _side_by_side, _weight
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.sampling import Sampling, draw
from ups_rm.types import Message

GREEDY = Sampling(temperature=0.0)
EOS = [1]
Rows = list[tuple[Tensor, Tensor]]


def decode(model: object, prompts: list[list[int]], n: int, length: int, sampling: Sampling, eos: list[int]) -> Rows:
    decoder = FastDecoder.of(model)
    assert decoder is not None
    return decoder.generate(prompts, n, length, eos, sampling, sampling.uniforms(len(prompts) * n, length))


@pytest.mark.parametrize("architecture", FAST)
def test_greedy_tokens_equal_generate(architecture: str) -> None:
    """Some prompts begin alike, one is the beginning of another, two are the same."""
    model, prompts = causal_lm(architecture), random_prompts(7)
    prompts[1], prompts[2], prompts[3] = prompts[0] + prompts[1], prompts[0] + prompts[2], prompts[4]
    rows = decode(model, prompts, 2, 20, GREEDY, EOS)
    assert len(rows) == 14
    for i, (tokens, logprobs) in enumerate(rows):
        prompt = prompts[i // 2]
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False,
            eos_token_id=EOS, pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        assert tokens.tolist() == expected.tolist()
        torch.testing.assert_close(logprobs, slow_logprobs(model, prompt, tokens.tolist()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", FAST)
def test_logprobs_of_sampled_tokens_are_the_tempered_policys(architecture: str) -> None:
    model, prompts = causal_lm(architecture, seed=3), random_prompts(5, seed=4)
    rows = decode(model, prompts, 3, 16, Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=5), EOS)
    for i, (tokens, logprobs) in enumerate(rows):
        expected = slow_logprobs(model, prompts[i // 3], tokens.tolist(), temperature=0.7)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


def test_models_with_parts_that_the_decoder_does_not_compute_are_left_to_generate() -> None:
    assert (
        FastDecoder.of(causal_lm("qwen2 tied", use_sliding_window=True, sliding_window=8, max_window_layers=0)) is None
    )
    assert FastDecoder.of(causal_lm("llama", hidden_act="gelu")) is None
    assert FastDecoder.of(causal_lm("llama", mlp_bias=True)) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert FastDecoder.of(causal_lm("llama", rope_parameters=dynamic)) is None
    assert all(FastDecoder.of(causal_lm(name)) is None for name in UNKNOWN)


# ---- the distribution


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after transformers' own temperature, top-k and top-p (an oracle that we did not write)."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits.clone()[None])
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores[0].softmax(-1)


def chi_square_fits(counts: Tensor, probs: Tensor) -> bool:
    """Pearson's test at a level of about 1e-4 (Wilson-Hilferty); no draw may fall on an impossible token."""
    possible = probs > 0
    if bool(counts[~possible].any()):
        return False
    expected = probs[possible] * counts.sum()
    assert float(expected.min()) > 5, "too few draws for the test"
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    return statistic <= limit


SAMPLINGS = [
    Sampling(1.0, 1.0, -1, 11),
    Sampling(0.6, 1.0, -1, 12),
    Sampling(1.7, 0.8, -1, 13),
    Sampling(1.0, 1.0, 5, 14),
    Sampling(0.8, 0.7, 6, 15),
    Sampling(1.0, 0.01, -1, 16),
    Sampling(1.0, 1.0, 1, 17),
    Sampling(1.3, 0.95, 100, 18),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_warped_distribution(sampling: Sampling) -> None:
    logits = torch.linspace(-2.0, 2.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    draws = 60_000
    tokens, logprobs, norms = draw(logits.repeat(draws, 1), sampling, sampling.uniforms(draws, 1)[:, 0])
    counts = torch.bincount(tokens, minlength=12).float()
    assert chi_square_fits(counts, warped(logits, sampling))
    tempered = logits / sampling.temperature
    torch.testing.assert_close(logprobs, tempered.log_softmax(-1)[tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(norms, tempered.logsumexp(-1).expand(draws), atol=1e-5, rtol=0)


def test_the_chi_square_would_notice_a_wrong_temperature() -> None:
    logits = torch.linspace(-2.0, 2.0, 12)
    tokens, _, _ = draw(logits.repeat(60_000, 1), Sampling(1.05), Sampling().uniforms(60_000, 1)[:, 0])
    assert not chi_square_fits(torch.bincount(tokens, minlength=12).float(), warped(logits, Sampling(1.0)))


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.5, 3.0]), st.sampled_from([1.0, 0.9, 0.3]), st.integers(-1, 9))
@settings(max_examples=60, deadline=None)
def test_the_extreme_draws_fall_on_tokens_that_are_allowed(seed: int, temperature: float, top_p: float, k: int) -> None:
    """0 and the largest float below 1: not on a token that top-k or top-p took out, however the sum was rounded."""
    logits = 6 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature, top_p, k)
    extremes = torch.tensor([0.0, 1.0 - 2.0**-24, 0.5])
    tokens, _, _ = draw(logits.repeat(3, 1), sampling, extremes)
    assert bool((warped(logits, sampling)[tokens] > 0).all())


def test_the_whole_decoder_samples_the_policys_distribution() -> None:
    """The second token given the first, over a vocabulary of 12, with top-p and temperature."""
    model = causal_lm("llama", vocab_size=12, initializer_range=0.4)
    sampling, prompt, n = Sampling(1.2, 0.9, -1, 3), [3, 4, 5], 12_000
    rows = decode(model, [prompt], n, 2, sampling, [11])
    pairs = torch.tensor([tokens.tolist() for tokens, _ in rows if len(tokens) == 2])
    first = int(pairs[:, 0].mode().values)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, first]])).logits[0]
    firsts = torch.bincount(torch.tensor([int(tokens[0]) for tokens, _ in rows]), minlength=12).float()
    seconds = torch.bincount(pairs[pairs[:, 0] == first][:, 1], minlength=12).float()
    expected_first, expected_second = warped(logits[-2], sampling), warped(logits[-1], sampling)
    assert chi_square_fits(firsts, expected_first)
    frequent = expected_second * seconds.sum() > 6
    assert int(frequent.sum()) > 4
    assert not seconds[expected_second == 0].any()
    assert chi_square_fits(seconds * frequent, expected_second * frequent / expected_second[frequent].sum())


# ---- nothing depends on the batch


def same(a: Rows, b: Rows) -> bool:
    return all(
        x[0].tolist() == y[0].tolist() and torch.allclose(x[1], y[1], atol=1e-4) for x, y in zip(a, b, strict=True)
    )


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_a_reply_does_not_depend_on_its_batch(order: list[int], size: int, seed: int) -> None:
    """Any order, any neighbours, early ends among them: row i with draws i gives the same reply."""
    model, prompts, n, length = causal_lm("qwen2 untied", seed=2), random_prompts(6, seed=seed), 2, 12
    eos = list(range(1, 9))  # many end tokens: replies end early and at different times
    sampling = Sampling(1.0, seed=seed)
    uniforms = sampling.uniforms(6 * n, length)
    decoder = FastDecoder.of(model)
    assert decoder is not None
    whole = decoder.generate(prompts, n, length, eos, sampling, uniforms)
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, 6, size):
        chosen = list(order)[start : start + size]
        draws = torch.cat([uniforms[i * n : (i + 1) * n] for i in chosen])
        rows = decoder.generate([prompts[i] for i in chosen], n, length, eos, sampling, draws)
        parts |= {i * n + k: rows[j * n + k] for j, i in enumerate(chosen) for k in range(n)}
    assert same(whole, [parts[i] for i in range(6 * n)])
    assert len({len(tokens) for tokens, _ in whole}) > 1


def chat(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


CHATS = [chat(text) for text in ("bake", "Tell me about the sun and the moon", "I can't help with that", "piano")]


def engine_of(model: object, max_num_seqs: int = 256) -> RolloutEngine:
    return RolloutEngine(policy_of(model), max_num_seqs=max_num_seqs)


def chat_model(architecture: str = "qwen2 untied", **changes: object) -> object:
    return causal_lm(architecture, vocab_size=len(qwen_tokenizer()), **changes)


def replies(rollout: Rollout) -> list[list[int]]:
    sequences = rollout.sequences
    return [row[mask.bool()].tolist() for row, mask in zip(sequences.responses, sequences.response_mask, strict=True)]


@pytest.mark.parametrize("architecture", ["qwen2 untied", "gpt2"])
def test_max_num_seqs_only_changes_what_decodes_at_the_same_time(architecture: str) -> None:
    model = chat_model(architecture)
    sampling = Sampling(seed=9)
    whole = engine_of(model).generate(CHATS, n=5, max_new_tokens=10, sampling=sampling)
    for size in (1, 3, 5, 11):
        decoded: list[int] = []
        engine = engine_of(model, size)
        inner = engine.decoder.generate if engine.decoder is not None else engine._generate_plain

        def counted(
            prompts: list[list[int]], n: int, *rest: Any, inner: Any = inner, seen: Any = decoded, **more: Any
        ) -> Any:
            seen.append(len(prompts) * n)
            return inner(prompts, n, *rest, **more)

        if engine.decoder is not None:
            engine.decoder.generate = counted  # type: ignore[method-assign]
        else:
            engine._generate_plain = counted  # type: ignore[method-assign]
        rollout = engine.generate(CHATS, n=5, max_new_tokens=10, sampling=sampling)
        assert replies(rollout) == replies(whole)
        torch.testing.assert_close(rollout.rollout_logprobs, whole.rollout_logprobs, atol=1e-4, rtol=0)
        assert max(decoded) <= size
        assert sum(decoded) == 20


def test_the_plain_way_draws_the_same_tokens_as_the_fast_one() -> None:
    model = chat_model("llama")
    fast, plain = engine_of(model), engine_of(model)
    plain.decoder = None
    for sampling in (Sampling(0.9, 0.9, 30, 4), GREEDY):
        a, b = (engine.generate(CHATS, n=3, max_new_tokens=12, sampling=sampling) for engine in (fast, plain))
        assert replies(a) == replies(b)
        torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, atol=1e-4, rtol=0)
        assert (a.texts, a.finished) == (b.texts, b.finished)


# ---- the end of a reply


def test_every_way_of_naming_end_tokens_ends_a_reply() -> None:
    """generation_config as a number, a list or nothing; the tokenizer's own end token always counts too."""
    tokenizer = qwen_tokenizer()
    for configured, expected in ((7, [2, 7]), ([7, 9], [2, 7, 9]), (None, [2]), (2, [2])):
        model = chat_model()
        model.generation_config.eos_token_id = configured  # type: ignore[attr-defined]
        policy = policy_of(model)
        assert policy.eos_ids == expected
        assert tokenizer.eos_token_id == 2
        rollout = RolloutEngine(policy).generate(CHATS, n=8, max_new_tokens=30, sampling=Sampling(3.0, seed=1))
        rows = replies(rollout)
        for row, finished, text in zip(rows, rollout.finished, rollout.texts, strict=True):
            assert finished == (row[-1] in expected)
            assert not set(row[:-1]) & set(expected)
            assert len(row) == 30 or finished
            assert text == policy.tokenizer.decode(row, skip_special_tokens=True)
        assert any(rollout.finished)


@pytest.mark.parametrize("architecture", ["llama", "gpt neox"])
def test_one_token_replies(architecture: str) -> None:
    rollout = engine_of(chat_model(architecture)).generate(CHATS, n=2, max_new_tokens=1, sampling=Sampling(seed=2))
    assert rollout.sequences.responses.shape == (8, 1)
    assert rollout.sequences.response_mask.sum(1).tolist() == [1] * 8
    assert rollout.finished == [row[-1] in (1, 2) for row in replies(rollout)]


def test_a_rollout_is_packed_as_promised() -> None:
    engine = engine_of(chat_model())
    rollout = engine.generate(CHATS, n=3, max_new_tokens=9, sampling=Sampling(seed=3))
    sequences = rollout.sequences
    assert sequences.group_ids.tolist() == [i // 3 for i in range(12)]
    for i, conversation in enumerate(rollout.conversations):
        assert conversation[:-1] == CHATS[i // 3]
        assert conversation[-1] == {"role": "assistant", "content": rollout.texts[i]}
        ids = engine.policy.tokenizer.apply_chat_template(CHATS[i // 3], add_generation_prompt=True)["input_ids"]
        assert sequences.prompts[i][sequences.prompt_mask[i].bool()].tolist() == ids
        assert sequences.prompt_mask[i].tolist() == sorted(sequences.prompt_mask[i].tolist())  # padding on the left
        mask = sequences.response_mask[i].tolist()
        assert mask == sorted(mask, reverse=True)  # padding on the right
    assert bool((rollout.rollout_logprobs[sequences.response_mask == 0] == 0).all())


def test_a_rollout_without_prompts_is_an_error() -> None:
    with pytest.raises(PolicyError, match="at least one prompt"):
        engine_of(chat_model()).generate([], n=1, max_new_tokens=1, sampling=GREEDY)


def test_an_end_token_drawn_at_once_leaves_an_empty_text() -> None:
    model = chat_model()
    prompt_end = replies(engine_of(model).generate(CHATS[:1], n=1, max_new_tokens=1, sampling=GREEDY))[0]
    model.generation_config.eos_token_id = prompt_end  # type: ignore[attr-defined]
    engine = engine_of(model)
    rollout = engine.generate(CHATS[:1], n=2, max_new_tokens=5, sampling=GREEDY)
    assert replies(rollout) == [prompt_end, prompt_end]
    assert rollout.finished == [True, True]


# ---- weights that change


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "gate_proj"]], ids=["all", "some"])
def test_refresh_takes_over_new_weights_of_adapters(targets: str | list[str]) -> None:
    model = with_adapters(causal_lm("qwen2 untied"), target_modules=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    decoder = FastDecoder.of(model)
    assert decoder is not None
    prompts, uniforms = random_prompts(4), torch.zeros(4, 12)
    before = decoder.generate(prompts, 1, 12, EOS, GREEDY, uniforms)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    assert same(before, decoder.generate(prompts, 1, 12, EOS, GREEDY, uniforms))
    decoder.refresh()
    after = decoder.generate(prompts, 1, 12, EOS, GREEDY, uniforms)
    assert [tokens.tolist() for tokens, _ in before] != [tokens.tolist() for tokens, _ in after]
    with torch.no_grad():
        for prompt, (tokens, logprobs) in zip(prompts, after, strict=True):
            expected = slow_logprobs(model, prompt, tokens.tolist())
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    with model.disable_adapter(), torch.no_grad():
        expected = slow_logprobs(model, prompts[0], before[0][0].tolist())
        decoder.refresh()
        assert same(before, decoder.generate(prompts, 1, 12, EOS, GREEDY, uniforms))
    torch.testing.assert_close(before[0][1], expected, atol=1e-4, rtol=0)


def test_several_active_adapters_and_merged_ones_are_decoded_as_peft_computes_them() -> None:
    from peft import LoraConfig

    model = with_adapters(causal_lm("llama"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.base_model.set_adapter(["default", "second"])
    prompts, uniforms = random_prompts(4), torch.zeros(4, 12)
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        decoder = FastDecoder.of(model)
        assert decoder is not None
        with torch.no_grad():
            for prompt, (tokens, logprobs) in zip(
                prompts, decoder.generate(prompts, 1, 12, EOS, GREEDY, uniforms), strict=True
            ):
                torch.testing.assert_close(logprobs, slow_logprobs(model, prompt, tokens.tolist()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias"])
def test_adapters_that_do_more_than_to_be_added_are_left_to_generate(settings: dict[str, bool]) -> None:
    assert FastDecoder.of(with_adapters(causal_lm("llama"), **settings)) is None


@pytest.mark.parametrize(
    ("targets", "count"), [(None, 1), ("all-linear", 9), (["q_proj", "down_proj"], 4)], ids=["none", "all", "some"]
)
def test_copies_are_what_is_not_the_models_own(
    targets: str | list[str] | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("can_pack", "multiplier"):  # as on a GPU: packed weights have no storage that could be looked at
        monkeypatch.setattr(f"ups_rm.layers.projection.{name}", lambda *_: None)
    model = causal_lm("llama") if targets is None else with_adapters(causal_lm("llama"), target_modules=targets)
    decoder = FastDecoder.of(model)
    assert decoder is not None
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = [
        part.weight
        for layer in decoder.layers
        for part in vars(layer).values()
        if isinstance(part, Projection) and part.weight.untyped_storage().data_ptr() not in own
    ]
    copies = decoder.copies(packed=False)
    assert sorted(map(id, copies)) == sorted(map(id, held))
    assert len(copies) == count * len(decoder.layers)


def test_small_adapters_do_not_round_away_in_bf16() -> None:
    """A thousandth beside weights of 1 is less than bf16 can tell: merged, nothing of it would be left."""
    from peft import LoraConfig, inject_adapter_in_model

    layer = inject_adapter_in_model(
        LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    )[0].bfloat16()
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat(32).expand(32, 64))
        layer.lora_A["default"].weight.fill_(1 / 1024)
        layer.lora_B["default"].weight.fill_(1.0)
        (weight,), low = _side_by_side([layer])
        x = torch.ones(1, 64, dtype=torch.bfloat16)
        assert low is not None
        assert torch.equal(Projection(weight)(_beside(x, low)), torch.full((1, 32), 1 / 16, dtype=torch.bfloat16))
        assert not Projection(_weight(layer))(x).any()


# ---- architectures that the decoder does not know


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_an_unknown_architecture_goes_through_generate(architecture: str) -> None:
    model = chat_model(architecture)
    model.generation_config.repetition_penalty = 5.0  # type: ignore[attr-defined]  # would change the distribution
    model.generation_config.top_k = 3  # type: ignore[attr-defined]
    engine = engine_of(model)
    assert engine.decoder is None
    for sampling in (GREEDY, Sampling(0.8, 0.9, 40, 7), Sampling(seed=8)):
        rollout = engine.generate(CHATS, n=2, max_new_tokens=10, sampling=sampling)
        for i, row in enumerate(replies(rollout)):
            prompt = rollout.sequences.prompts[i][rollout.sequences.prompt_mask[i].bool()].tolist()
            with torch.no_grad():
                expected = slow_logprobs(model, prompt, row, sampling.temperature or 1.0)
            torch.testing.assert_close(rollout.rollout_logprobs[i, : len(row)], expected, atol=1e-4, rtol=0)
    assert model.generation_config.repetition_penalty == 5.0  # type: ignore[attr-defined]


def test_products_of_prompts_are_of_round_sizes() -> None:
    """As in training: 30 distinct tokens here, 32 rows in each product."""
    decoder = FastDecoder.of(causal_lm("llama"))
    assert decoder is not None
    with ProductSizes() as sizes:
        decoder._prefill([list(range(5, 5 + length)) for length in (3, 12, 30)], 2, 4)
    assert 32 in sizes.found
    assert 30 not in sizes.found
