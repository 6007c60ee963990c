"""Scores do not depend on padding, on the batch, or on the order; the sign is turned once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import head_tensors, tiny_rm
from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import RMError, RunError
from ups_rm.reward.card import GOLDEN_CONVERSATIONS
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.render import render
from ups_rm.reward.scorer import RewardScorer, pad_batch, safe_score

FP32 = 2e-5  # rounding of float32 through two layers; a wrong position moves these logits by 0.1 and more

talks = st.lists(
    st.tuples(st.text(max_size=40), st.text(max_size=80)).map(
        lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    ),
    min_size=1,
    max_size=7,
)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def scorer(request, tmp_path_factory) -> RewardScorer:
    return RewardScorer.load(
        tiny_rm(tmp_path_factory.mktemp(request.param) / "rm", architecture=request.param), dtype="float32"
    )


def alone(scorer, conversations) -> list[float]:
    return [scorer.score([conversation])[0].logit for conversation in conversations]


@given(conversations=talks)
@settings(max_examples=40, deadline=None)
def test_left_right_and_no_padding_agree(scorer, conversations):
    rows = [row.input_ids for row in render(scorer.tokenizer, conversations, scorer.policy)]
    none = [scorer.batch_logits([row])[0] for row in rows]
    assert scorer.batch_logits(rows, side="right") == pytest.approx(none, abs=FP32)
    assert scorer.batch_logits(rows, side="left") == pytest.approx(none, abs=FP32)


@given(conversations=talks, pads=st.tuples(st.integers(0, 9), st.integers(0, 9)), pad_id=st.integers(0, 329))
@settings(max_examples=40, deadline=None)
def test_padding_of_any_id_on_both_sides_is_never_read(scorer, conversations, pads, pad_id):
    rows = [row.input_ids for row in render(scorer.tokenizer, conversations, scorer.policy)]
    ids, mask = pad_batch(rows)
    ids = torch.nn.functional.pad(torch.where(mask.bool(), ids, pad_id), pads, value=pad_id)
    mask = torch.nn.functional.pad(mask, pads, value=0)
    for kind in (mask, mask.bool(), mask.float()):
        with torch.inference_mode():
            logits = scorer.model(input_ids=ids, attention_mask=kind).logits
        assert logits[:, 0].tolist() == pytest.approx([scorer.batch_logits([row])[0] for row in rows], abs=FP32)


@given(conversations=talks, limit=st.integers(1, 400), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_batch_and_any_order_give_the_same_scores_in_input_order(scorer, conversations, limit, data):
    expected = alone(scorer, conversations)
    order = data.draw(st.permutations(range(len(conversations))))
    scorer.max_batch_tokens = limit
    try:
        found = scorer.score([conversations[i] for i in order])
    finally:
        scorer.max_batch_tokens = 8192
    assert [score.logit for score in found] == pytest.approx([expected[i] for i in order], abs=FP32)


def test_logits_tell_conversations_apart(scorer):
    """The tolerance above means something: these conversations differ by far more."""
    logits = alone(scorer, GOLDEN_CONVERSATIONS)
    differences = [abs(a - b) for i, a in enumerate(logits) for b in logits[:i]]
    assert min(differences) > 50 * FP32
    assert max(differences) > 0.1


def test_an_empty_reply_is_scored(scorer):
    empty, blank = scorer.score(
        [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}] for reply in ("", "a")]
    )
    assert math.isfinite(empty.logit)
    assert empty.logit != blank.logit
    assert empty.tokens == blank.tokens - 1


def test_nothing_to_score(scorer):
    assert scorer.score([]) == []


def test_tokens_and_truncation_are_told(tmp_path):
    from ups_rm.reward.merge import merge

    parts = tiny_rm(tmp_path / "rm").parent / "rm-parts"
    merge(parts / "backbone", parts / "head", tmp_path / "short", max_length=24)
    scorer = RewardScorer.load(tmp_path / "short", dtype="float32")
    short, long = scorer.score(
        [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}] for reply in ("", "word " * 50)]
    )
    assert (short.truncated, long.truncated) == (False, True)
    assert short.tokens < 24
    assert long.tokens == 24


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_sign_is_turned_here(logit):
    assert 0.0 <= safe_score(logit) <= 1.0
    assert safe_score(logit) == pytest.approx(
        float(torch.sigmoid(-torch.tensor(logit, dtype=torch.float64))), abs=1e-12
    )


def test_higher_logit_is_less_safe(scorer):
    scores = scorer.score(list(GOLDEN_CONVERSATIONS))
    by_logit = sorted(scores, key=lambda score: score.logit)
    assert [s.safe_score for s in by_logit] == sorted((s.safe_score for s in scores), reverse=True)


def test_a_logit_that_is_not_finite_is_an_error_not_a_reward(tmp_path):
    scorer = RewardScorer.load(tiny_rm(tmp_path / "rm"), dtype="float32")
    with torch.no_grad():
        scorer.model.myscore.output_layer.bias.fill_(torch.nan)
    with pytest.raises(RMError, match="nan for conversation 0"):
        scorer.score(list(GOLDEN_CONVERSATIONS))


def test_a_model_with_one_logit_per_token_is_refused(scorer):
    class PerToken(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 1)})

    wrong = RewardScorer(PerToken(), scorer.tokenizer, scorer.policy, dtype=torch.float32)
    with pytest.raises(RMError, match="expected \\(1, 1\\)"):
        wrong.score([GOLDEN_CONVERSATIONS[0]])


def test_bfloat16_is_near_float32_and_its_head_stays_float32(tmp_path):
    rm = tiny_rm(tmp_path / "rm")
    scorer, exact = RewardScorer.load(rm, dtype="bfloat16"), RewardScorer.load(rm, dtype="float32")
    assert {p.dtype for p in scorer.model.myscore.parameters()} == {torch.float32}
    assert scorer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert scorer.model.model.norm.weight.dtype == torch.float32
    found = [score.logit for score in scorer.score(list(GOLDEN_CONVERSATIONS))]
    expected = [score.logit for score in exact.score(list(GOLDEN_CONVERSATIONS))]
    assert found == pytest.approx(expected, abs=0.15)
    assert found != pytest.approx(expected, abs=1e-6)  # it does compute in bfloat16
    head = {name.removeprefix("myscore."): t for name, t in scorer.model.state_dict().items() if "myscore" in name}
    assert all(torch.equal(head[name], tensor) for name, tensor in head_tensors(seed=2).items())


def test_the_folders_own_code_answers_as_ours(tmp_path, monkeypatch):
    rm: Path = tiny_rm(tmp_path / "own-code")
    ours = RewardScorer.load(rm, dtype="float32").score(list(GOLDEN_CONVERSATIONS))
    theirs = RewardScorer.load(rm, dtype="float32", trust_remote_code=True)
    assert type(theirs.model).__module__.startswith("transformers_modules.")
    found = [score.logit for score in theirs.score(list(GOLDEN_CONVERSATIONS))]
    assert found == pytest.approx([score.logit for score in ours], abs=1e-5)  # transformers' layers, and ours


def test_dtype_names():
    assert compute_dtype("fp32") == compute_dtype("float32") == torch.float32
    assert compute_dtype("bf16", "cuda") == torch.bfloat16
    assert compute_dtype("auto", "cpu") in (torch.bfloat16, torch.float32)
    with pytest.raises(RunError, match="int4"):
        compute_dtype("int4")
    with pytest.raises(RunError, match="float16"):
        compute_dtype("float16", "cpu")


def test_a_device_that_is_not_here_is_said(rm_folder):
    count = torch.cuda.device_count()
    with pytest.raises(RunError, match=f"torch sees {count or 'no'} CUDA devices\n  fix: cpu, or auto"):
        RewardScorer.load(rm_folder, device=f"cuda:{count}")
    with pytest.raises(RunError, match="device 'gpu' is not known; choose auto, cpu"):
        torch_device("gpu")
    assert torch_device("auto") == torch_device("cuda" if count else "cpu")
    assert RewardScorer.load(rm_folder, device="auto").device == str(torch_device("auto"))
    with pytest.raises(RunError, match="torch sees"):
        check_rm(rm_folder, device=f"cuda:{count}")
