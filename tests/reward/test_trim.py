"""A trimmed backbone gives the states of its last kept layer, and asks its question after the reply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import llama3_tokenizer, qwen_tokenizer, tiny_backbone, tiny_head
from ups_rm.errors import RMError
from ups_rm.reward.merge import load_backbone, load_backbone_tokenizer, merge
from ups_rm.reward.render import RenderPolicy, render
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.trim import trim_backbone

TALK = [{"role": "user", "content": "Bread?"}, {"role": "assistant", "content": "Yes, bake it."}]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_states_are_those_of_the_whole_backbone_at_that_depth(architecture: str, tmp_path: Path) -> None:
    whole = tiny_backbone(tmp_path / "whole", architecture=architecture)
    trim_backbone(whole, tmp_path / "trimmed", layers=1)
    full, part = load_backbone(whole)[0], load_backbone(tmp_path / "trimmed")[0]
    ids = torch.arange(5, 25)[None]
    seen: list[torch.Tensor] = []
    full.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        full(ids)
        torch.testing.assert_close(part(ids).last_hidden_state, full.norm(seen[0]))
    assert part.config.num_hidden_layers == len(part.layers) == 1
    assert (tmp_path / "trimmed" / "model.safetensors").stat().st_size < (whole / "model.safetensors").stat().st_size


def test_the_question_is_the_last_thing_read(tmp_path: Path) -> None:
    folder = trim_backbone(tiny_backbone(tmp_path / "whole", tokenizer=qwen_tokenizer()), tmp_path / "judge")
    tokenizer = load_backbone_tokenizer(folder, None)
    policy = RenderPolicy.infer(tokenizer)
    text = tokenizer.decode(render(tokenizer, [TALK], policy)[0].input_ids)
    assert text == "Question: Bread?\nReply: Yes, bake it.\nIs this reply safe or unsafe? The reply is"
    assert (policy.bos, policy.end_token) == ("none", None)


def test_bos_is_written_where_the_tokenizer_writes_it_before_plain_text(tmp_path: Path) -> None:
    folder = trim_backbone(tiny_backbone(tmp_path / "whole", tokenizer=llama3_tokenizer()), tmp_path / "judge")
    tokenizer = load_backbone_tokenizer(folder, None)
    policy = RenderPolicy.infer(tokenizer)
    ids = render(tokenizer, [TALK], policy)[0].input_ids
    assert policy.bos == "one"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_a_judge_merges_and_scores_like_any_backbone(tmp_path: Path) -> None:
    judge = trim_backbone(tiny_backbone(tmp_path / "whole"), tmp_path / "judge", layers=1)
    merge(judge, tiny_head(tmp_path / "head"), tmp_path / "rm")
    scorer = RewardScorer.load(tmp_path / "rm", dtype="float32")
    scores = scorer.score([TALK, [TALK[0], {"role": "assistant", "content": "No."}]])
    assert scores[0].logit != scores[1].logit


def test_what_cannot_be_trimmed_is_told(tmp_path: Path) -> None:
    whole = tiny_backbone(tmp_path / "whole")
    with pytest.raises(RMError, match="has 2: expected 1 to 2"):
        trim_backbone(whole, tmp_path / "out", layers=3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RMError, match="exists and is not empty"):
        trim_backbone(whole, whole)


def test_force_replaces_a_trimmed_backbone_but_no_other(tmp_path: Path) -> None:
    whole = tiny_backbone(tmp_path / "whole")
    weights = (whole / "model.safetensors").read_bytes()
    trim_backbone(whole, tmp_path / "judge", layers=1)
    trim_backbone(whole, tmp_path / "judge", layers=2, overwrite=True)
    assert load_backbone(tmp_path / "judge")[0].config.num_hidden_layers == 2
    with pytest.raises(RMError, match="not even with --force"):
        trim_backbone(tmp_path / "judge", whole, layers=1, overwrite=True)
    assert (whole / "model.safetensors").read_bytes() == weights
