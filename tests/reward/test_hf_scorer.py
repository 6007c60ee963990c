"""Sequence and token classifiers of plain transformers: the logits are transformers' own on one unpadded row."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from tiny import llama3_tokenizer, tiny_backbone, tiny_encoder_rm, tiny_hf_rm
from ups_rm.errors import RMError
from ups_rm.reward.hf_scorer import load_hf_scorer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.types import Conversation


def conversations(count: int = 24, seed: int = 0, *, special: bool = True) -> list[Conversation]:
    """Random ones: one to three turns, replies of 0 to 60 words, letters of several scripts."""
    draw = random.Random(seed)
    special_tokens = ["<|eot_id|>", "</s>"] if special else []
    words = ["bread", "piano", "Sun", "12.5", "“no”", "你好", "🙂", "I", "can't", *special_tokens]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randrange(most)))

    found = []
    for _ in range(count):
        turns = draw.choice([1, 1, 3])
        messages = [{"role": ("user", "assistant")[i % 2], "content": text(12)} for i in range(turns)]
        found.append([*messages, {"role": "assistant", "content": text(60)}])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("hf")
    pad_is_eos = llama3_tokenizer(pad_token="<|eot_id|>")  # every reply ends in the pad token
    return {
        "sequence": tiny_hf_rm(here / "sequence", kind="sequence"),
        "token": tiny_hf_rm(here / "token", kind="token"),
        "pad_is_eos": tiny_hf_rm(here / "pad_is_eos", kind="sequence", tokenizer=pad_is_eos),
        "encoder": tiny_encoder_rm(here / "encoder"),
    }


@pytest.mark.parametrize("name", ["sequence", "token", "pad_is_eos"])
def test_logits_are_those_of_transformers_on_one_row(folders, name):
    kind = "token" if name == "token" else "sequence"
    scorer = load_hf_scorer(folders[name], kind, dtype="float32")
    auto = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folders[name]).eval()
    model.config.pad_token_id = None  # transformers then reads the last position: right for one row without padding
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    asked = conversations(special=False)
    expected = []
    for one in asked:
        text = tokenizer.apply_chat_template(one, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(ids).logits
        expected.append(float(logits[0, -1, 0] if kind == "token" else logits[0, 0]))
    assert [score.logit for score in scorer.score(asked)] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("name", ["sequence", "token", "pad_is_eos", "encoder"])
def test_logits_do_not_hang_on_padding_or_neighbours(folders, name):
    scorer = load_hf_scorer(folders[name], "token" if name == "token" else "sequence", dtype="float32")
    asked = conversations(16, seed=1)
    together = [score.logit for score in scorer.score(asked)]
    alone = [scorer.score([one])[0].logit for one in asked]
    backwards = [score.logit for score in scorer.score(asked[::-1])][::-1]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(backwards, abs=1e-4)


def test_an_encoder_gets_prompt_and_reply_as_a_pair(folders):
    scorer = load_hf_scorer(folders["encoder"], "sequence", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(folders["encoder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["encoder"])
    asked = [one for one in conversations(20, seed=2, special=False) if len(one) == 2]
    encoded = tokenizer([one[0]["content"] for one in asked], [one[1]["content"] for one in asked], padding=True,
                        truncation="longest_first", return_tensors="pt")  # fmt: skip
    with torch.inference_mode():
        expected = model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0].tolist()
    whole = [(s.logit, e) for s, e in zip(scorer.score(asked), expected, strict=True) if not s.truncated]
    assert len(whole) >= 4
    assert [ours for ours, _ in whole] == pytest.approx([theirs for _, theirs in whole], abs=1e-4)
    long = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bread " * 300}]
    (cut,) = scorer.score([long])
    assert cut.truncated
    assert cut.tokens == 200


def test_a_head_that_would_be_drawn_at_random_is_an_error_by_name(folders, tmp_path):
    backbone = tiny_backbone(tmp_path / "backbone")
    with pytest.raises(RMError, match=r"missing: score.weight"):
        load_hf_scorer(backbone, "sequence")
    with pytest.raises(RMError, match=r"missing: score.bias"):
        load_hf_scorer(folders["sequence"], "token")
    broken = shutil.copytree(folders["sequence"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight2"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RMError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight.*unexpected: .*weight2"):
        load_hf_scorer(broken, "sequence")


def test_what_is_no_reward_model_is_told(tmp_path):
    two = tiny_hf_rm(tmp_path / "two", labels=2)
    with pytest.raises(RMError, match="has 2 labels"):
        load_hf_scorer(two, "sequence")
    no_template = tiny_hf_rm(tmp_path / "none", tokenizer=llama3_tokenizer(chat_template=None))
    with pytest.raises(RMError, match="no chat template"):
        load_hf_scorer(no_template, "sequence")
    template = str(llama3_tokenizer().chat_template)
    scorer = load_hf_scorer(no_template, "sequence", chat_template=template)
    assert isinstance(scorer, RewardScorer)
    assert scorer.score(conversations(2))[0].tokens > 0
    typed = tiny_encoder_rm(tmp_path / "typed", type_vocab_size=2)
    tokenizer = json.loads((typed / "tokenizer.json").read_text())
    pair = tokenizer["post_processor"]["pair"]
    pair[3:] = [{kind: value | {"type_id": 1} for kind, value in piece.items()} for piece in pair[3:]]
    (typed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RMError, match="token types"):
        load_hf_scorer(typed, "sequence").score(conversations(1))
