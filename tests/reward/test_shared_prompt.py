"""Replies to one prompt score side by side as each does alone, and the prompt is computed once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_rm
from tiny_training import ProductSizes
from ups_rm.layers import decoder
from ups_rm.reward import shared_prompt
from ups_rm.reward.render import render
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.shared_prompt import can_share, shared_rows

FP32 = 2e-5  # rounding of float32; a token seen too much or at a wrong position moves these logits by 0.1 and more


@pytest.fixture(scope="module", params=[("llama", "last"), ("qwen2", "mean"), ("qwen3", "last")])
def scorer(request, tmp_path_factory) -> RewardScorer:
    architecture, pooling = request.param
    folder = tmp_path_factory.mktemp(f"{architecture}_{pooling}") / "rm"
    return RewardScorer.load(tiny_rm(folder, architecture=architecture, pooling=pooling), dtype="float32")


def conversations(groups: list[tuple[str, list[str]]]) -> list[Any]:
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for prompt, replies in groups
        for reply in replies
    ]


@given(
    groups=st.lists(st.tuples(st.text(max_size=60), st.lists(st.text(max_size=50), min_size=1, max_size=5)), max_size=4)
)
@settings(max_examples=25, deadline=None)
def test_side_by_side_as_alone(scorer, groups):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompt, "LEAST_SHARED", 1)
        talks = conversations(groups)
        together = [score.logit for score in scorer.score(talks)]
        alone = [scorer.batch_logits([row.input_ids])[0] for row in render(scorer.tokenizer, talks, scorer.policy)]
    assert together == pytest.approx(alone, abs=FP32)


@pytest.mark.parametrize("scores", [0, shared_prompt.SCORES_AT_ONCE], ids=["sdpa", "products"])
def test_long_texts_of_their_own_and_shared_ones_score_as_alone(scorer, monkeypatch, scores):
    """Without room for masks, texts of their own go through transformers' forward and shared ones through SDPA."""
    for module in (shared_prompt, decoder):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", scores)
    packed, pooled_rows = [], shared_prompt.pooled_rows
    monkeypatch.setattr(shared_prompt, "pooled_rows", lambda *given: packed.append(1) or pooled_rows(*given))
    talks = conversations([("a long question " * 8, ["yes", "no", "perhaps"])])
    apart = conversations([("one", ["1"]), ("two", ["22"])])
    for some, goes in ((talks, True), (apart, scores > 0)):
        packed.clear()
        found = [score.logit for score in scorer.score(some)]
        assert bool(packed) == goes
        rows = render(scorer.tokenizer, some, scorer.policy)
        assert found == pytest.approx([scorer.batch_logits([row.input_ids])[0] for row in rows], abs=FP32)


def test_a_long_text_of_its_own_does_not_join_those_that_share(scorer, monkeypatch):
    """In one batch, as requests of several clients come together: its mask would be the square of its length."""
    for module in (shared_prompt, decoder):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 0)
    packed, pooled_rows = [], shared_prompt.pooled_rows
    monkeypatch.setattr(
        shared_prompt, "pooled_rows", lambda _, rows, *given: packed.append(rows) or pooled_rows(_, rows, *given)
    )
    talks = conversations([("one", ["1"]), ("a long question " * 8, ["yes", "no"]), ("two", ["22"])])
    ids = [row.input_ids for row in render(scorer.tokenizer, talks, scorer.policy)]
    sharing, *alone = sorted(scorer.rows_of(ids, [0, 1, 1, 2]), key=lambda row: -len(row.texts))
    answers = scorer.row_answers([alone[0], sharing, alone[1]], ids)
    assert [[len(row.texts) for row in rows] for rows in packed] == [[2]]
    assert [answer[0] for answer in answers] == pytest.approx([scorer.batch_logits([one])[0] for one in ids], abs=FP32)


def test_the_prompt_is_computed_once(scorer, monkeypatch):
    seen: list[int] = []
    layer = scorer.model.model.layers[0].mlp.up_proj
    hook = layer.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    monkeypatch.setattr(type(scorer), "enough_tokens", 1)  # no row waits for another
    monkeypatch.setattr(shared_prompt, "rounded", lambda count, by=1: count)
    talks = conversations([("a long question " * 8, ["yes", "no", "perhaps", "never"])])
    rows = render(scorer.tokenizer, talks, scorer.policy)
    scorer.score(talks)
    hook.remove()
    each = [len(row.input_ids) for row in rows]
    (row,) = shared_rows([row.input_ids for row in rows], ["same"] * 4, 10**6)
    assert row.length == sum(each) - 3 * row.shared < sum(each) / 2
    assert sum(seen) == beginnings(rows) <= row.length  # two replies may begin alike


def beginnings(rows: list[Any]) -> int:
    """Tokens of which each differs from the others in itself or in what is before it."""
    return len({tuple(row.input_ids[: j + 1]) for row in rows for j in range(len(row.input_ids))})


def test_what_conversations_begin_with_is_computed_once(scorer, monkeypatch):
    """The template's words, where no prompt is shared."""
    monkeypatch.setattr(shared_prompt, "rounded", lambda count, by=1: count)
    seen: list[int] = []
    hook = scorer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    talks = [
        [{"role": "system", "content": "You are kind."}, *talk]
        for talk in conversations([("one", ["1"]), ("two", ["22"]), ("one and two", ["3", "12"])])
    ]
    found = [score.logit for score in scorer.score(talks)]
    hook.remove()
    rows = render(scorer.tokenizer, talks, scorer.policy)
    assert seen == [beginnings(rows)]
    assert seen[0] < sum(len(row.input_ids) for row in rows) - 3 * 10
    assert found == pytest.approx([scorer.batch_logits([row.input_ids])[0] for row in rows], abs=FP32)


@given(
    ids=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12),
    least=st.integers(1, 5),
    longest=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_text_once_and_keep_their_limit(ids, least, longest, data):
    prompts = data.draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompt, "LEAST_SHARED", least)
        rows = shared_rows([torch.tensor(one) for one in ids], prompts, longest)
    assert sorted(i for row in rows for i in row.texts) == list(range(len(ids)))
    for row in rows:
        assert row.length == row.shared + sum(len(ids[i]) - row.shared for i in row.texts)
        assert len(row.texts) == 1 or row.length <= longest
        assert all(ids[i][: row.shared] == ids[row.texts[0]][: row.shared] for i in row.texts)
        assert all(len(ids[i]) > row.shared for i in row.texts)
        assert len({prompts[i] for i in row.texts}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"sliding_window": 8},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"_attn_implementation": "eager"},
    ],
)
def test_what_a_mask_or_positions_would_change_is_scored_one_by_one(tmp_path, monkeypatch, changes):
    scorer = RewardScorer.load(tiny_rm(tmp_path / "rm"), dtype="float32")
    assert can_share(scorer.model.model)
    for name, value in changes.items():
        setattr(scorer.model.model.config, name, value)
    assert not can_share(scorer.model.model)
    monkeypatch.setattr(shared_prompt, "pooled_rows", None)  # calling it would fail
    assert len(scorer.score(conversations([("a long question " * 8, ["yes", "no"])]))) == 2


def test_replies_of_other_lengths_are_not_padded_to_each_other(scorer, monkeypatch):
    """One long reply beside short ones: each length attends in a block of its own."""
    shapes: list[list[tuple[int, ...]]] = []
    attention = shared_prompt.SharedAttention
    monkeypatch.setattr(
        shared_prompt,
        "SharedAttention",
        lambda layers, grid, seen, replies, dtype: (
            shapes.append([tuple(block.read.shape) for block in replies])
            or attention(layers, grid, seen, replies, dtype)
        ),
    )
    talks = conversations(
        [("a long question " * 8, ["yes", "word " * 60, "no"]), ("another " * 9, ["an answer " * 30])]
    )
    found = [score.logit for score in scorer.score([*talks, *conversations([("another " * 9, ["no"])])])]
    ids = [row.input_ids for row in render(scorer.tokenizer, talks, scorer.policy)]
    assert found[:4] == pytest.approx([scorer.batch_logits([one])[0] for one in ids], abs=FP32)
    (blocks,) = shapes
    assert len(blocks) >= 2
    assert blocks[0][0] == 3, "the short ones together"
    assert blocks[0][1] < blocks[-1][1] / 4


@given(
    texts=st.lists(st.tuples(st.integers(1, 300), st.integers(-1, 3)), max_size=20),
    width=st.integers(16, 400),
    most=st.sampled_from([2**15, 1000]),
)
def test_blocks_hold_each_text_once_and_bound_padding_and_copies(texts, width, most):
    own, group = [length for length, _ in texts], [prompt for _, prompt in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompt, "KEYS_AT_ONCE", most)
        blocks = shared_prompt._blocks(own, group, width)
    assert sorted(n for block in blocks for n in block) == list(range(len(texts)))
    for block in blocks:
        longest = max(own[n] for n in block)
        assert longest <= 1.5 * max(16, min(own[n] for n in block))
        assert len({group[n] < 0 for n in block}) == 1, "what follows on a prompt, or what does not"
        keys = longest + (width if group[block[0]] >= 0 else 0)
        assert len(block) == 1 or len(block) * keys <= most


def test_many_replies_to_a_long_prompt_attend_in_several_blocks(scorer, monkeypatch):
    monkeypatch.setattr(shared_prompt, "KEYS_AT_ONCE", 300)
    talks = conversations([("a long question " * 8, ["yes", "no", "perhaps", "never", "always", "now"])])
    found = [score.logit for score in scorer.score(talks)]
    rows = render(scorer.tokenizer, talks, scorer.policy)
    assert found == pytest.approx([scorer.batch_logits([row.input_ids])[0] for row in rows], abs=FP32)


def test_a_long_text_of_its_own_widens_no_prompt(scorer, monkeypatch):
    """It is a block without a prompt: prompts beside it stay as narrow as they are."""
    seen: list[tuple[tuple[int, ...], list[Any]]] = []
    attention = shared_prompt.SharedAttention
    monkeypatch.setattr(
        shared_prompt,
        "SharedAttention",
        lambda layers, grid, prompts, replies, dtype: (
            seen.append((tuple(prompts.shape), [(tuple(block.read.shape), block.group) for block in replies]))
            or attention(layers, grid, prompts, replies, dtype)
        ),
    )
    talks = conversations([("question " * 9, ["yes", "no"]), ("another", ["word " * 90])])
    ids = [row.input_ids for row in render(scorer.tokenizer, talks, scorer.policy)]
    rows = scorer.rows_of(ids, [0, 0, 1])
    answers = scorer.row_answers(rows, ids)
    order = [i for row in rows for i in row.texts]
    assert [answer[0] for answer in answers] == pytest.approx(
        [scorer.batch_logits([ids[i]])[0] for i in order], abs=FP32
    )
    (((prompts, width), blocks),) = seen
    assert prompts == 1
    assert width < len(ids[2]) / 2
    assert [group is None for _, group in blocks] == [False, True]


@pytest.mark.parametrize("seed", range(3))
def test_products_are_of_round_sizes(scorer, seed):
    """As in training; how many texts come together is left as it is."""
    draw = random.Random(seed)
    talks = conversations([("why " * draw.randint(8, 30), ["so " * draw.randint(1, 40) for _ in range(3)])])
    talks += conversations([("why not " * draw.randint(8, 30), ["no " * draw.randint(1, 40)])])
    config = scorer.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model = {config.hidden_size, config.intermediate_size, size, size // 2, 1}
    model |= {heads * size for heads in (config.num_attention_heads, config.num_key_value_heads)}
    rows = scorer.rows_of([row.input_ids for row in render(scorer.tokenizer, talks, scorer.policy)], [0, 0, 0, 1])
    ids = [row.input_ids for row in render(scorer.tokenizer, talks, scorer.policy)]
    with torch.inference_mode(), ProductSizes() as sizes:
        shared_prompt.pooled_rows(scorer.model.model, rows, ids, "last", "cpu")
    texts = {count * heads for count in range(1, 5) for heads in (1, config.num_key_value_heads)}
    of_tokens = sizes.found - model - texts
    assert of_tokens
    assert all(size % 16 == 0 for size in of_tokens), of_tokens
