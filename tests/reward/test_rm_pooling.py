"""Mean pooling: the head is given the mean over all attended tokens, the same wherever it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rm_folder import TALKS, run_plain
from transformers import AutoModel

from labelled_rows import make_rows
from tiny import head_tensors, tiny_backbone, tiny_head, tiny_rm
from ups_rm.errors import RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.feature_set import FeatureSet, join, read_info
from ups_rm.reward.features import collect_texts, extract_features
from ups_rm.reward.head import head_logits, train_head
from ups_rm.reward.head_files import read_head
from ups_rm.reward.head_objective import HeadSettings
from ups_rm.reward.merge import merge
from ups_rm.reward.myrm.modeling_myrm import pooled_hidden
from ups_rm.reward.render import render
from ups_rm.reward.scorer import RewardScorer


@pytest.fixture(scope="module")
def rm(tmp_path_factory) -> Path:
    return tiny_rm(tmp_path_factory.mktemp("pooled") / "rm", pooling="mean")


def pooling_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["pooling"]


def test_logits_are_those_of_backbone_pooling_and_head_by_hand(rm):
    scorer = RewardScorer.load(rm, dtype="float32")
    backbone = AutoModel.from_pretrained(rm.parent / "rm-parts" / "backbone")
    head = head_tensors(seed=2)
    for talk, row in zip(TALKS, render(scorer.tokenizer, TALKS, scorer.policy), strict=True):
        with torch.inference_mode():
            x = backbone(torch.tensor([row.input_ids])).last_hidden_state[0].mean(0)
        for i in range(2):
            x = F.leaky_relu(F.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"]))
        expected = F.linear(x, head["output_layer.weight"], head["output_layer.bias"]).item()
        assert scorer.score([talk])[0].logit == pytest.approx(expected, abs=1e-5)


def test_pooling_makes_a_difference(tmp_path):
    last, mean = (tiny_rm(tmp_path / str(name), pooling=name) for name in (None, "mean"))
    assert pooling_of(last) == "last"
    a, b = ([s.logit for s in RewardScorer.load(one, dtype="float32").score(TALKS)] for one in (last, mean))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    pads=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    pad_id=st.integers(0, 300),
    seed=st.integers(0, 2**16),
)
def test_padding_on_both_sides_and_the_batch_are_never_read(rm, lengths, pads, pad_id, seed):
    """Rows of any length, any number of pad tokens of any id on either side: the logit of each row alone."""
    model = RewardScorer.load(rm, dtype="float32").model
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 300, (length,), generator=generator) for length in lengths]
    width = max(lengths) + sum(pads)
    input_ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = pads[0] if seed % 2 else width - pads[1] - len(row)
        input_ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    with torch.inference_mode():
        together = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
        alone = torch.cat([model(input_ids=row[None]).logits[:, 0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_states_at_padding_may_be_anything():
    """Some attention kernels leave NaN where nothing is attended."""

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs):
            states = input_ids[:, :, None].float().expand(-1, -1, 4).clone()
            states[attention_mask == 0] = torch.nan
            return type("Output", (), {"last_hidden_state": states})

    ids, mask = torch.tensor([[9, 1, 3], [2, 4, 9]]), torch.tensor([[0, 1, 1], [1, 1, 0]])
    hidden, _ = pooled_hidden(Backbone(), ids, mask, pooling="mean")
    assert hidden.tolist() == [[2.0] * 4, [3.0] * 4]


def test_plain_transformers_gives_the_same_logits(rm, tmp_path):
    answer = run_plain(rm, tmp_path)
    expected = [score.logit for score in RewardScorer.load(rm, dtype="float32").score(TALKS)]
    assert answer["missing"] == answer["unexpected"] == []
    for side in ("left", "right"):
        assert answer["logits"][side] == pytest.approx(expected, abs=1e-4)


def test_a_head_trained_on_pooled_features_scores_so_once_merged(tmp_path):
    backbone, rows = tiny_backbone(tmp_path / "backbone"), make_rows(30)
    file = extract_features(
        backbone, rows, tmp_path / "f.safetensors", dtype="float32", pooling="mean", progress=False
    ).path
    features = FeatureSet.read(file)
    settings = HeadSettings(hidden_dims=(8,), max_epochs=2)
    report = train_head(features, tmp_path / "head", settings, progress=False)
    merge(backbone, tmp_path / "head", tmp_path / "rm")
    card = RMCard.read(tmp_path / "rm")
    assert card is not None
    assert card.pooling == pooling_of(tmp_path / "rm") == "mean"
    weights = read_head(tmp_path / "head")
    expected = head_logits(weights.tensors, features.hidden, temperature=report.temperature)
    texts = collect_texts(rows)
    scores = RewardScorer.load(tmp_path / "rm", dtype="float32").score(
        [texts.conversation(i) for i in range(features.texts)]
    )
    torch.testing.assert_close(torch.tensor([score.logit for score in scores]), expected, atol=1e-4, rtol=1e-4)


def test_features_of_another_pooling_do_not_join_and_old_files_mean_last(tmp_path):
    backbone, rows = tiny_backbone(tmp_path / "backbone"), make_rows(4)
    sets = [
        FeatureSet.read(
            extract_features(backbone, rows, tmp_path / f"{name}.safetensors", pooling=name, progress=False).path
        )
        for name in ("last", "mean")
    ]
    with pytest.raises(RMError, match="differ in pooling can't be joined: 'last' and 'mean'"):
        join(sets)
    old = json.loads(sets[0].info.to_json())
    del old["pooling"]
    assert type(sets[0].info).from_json(json.dumps(old)).pooling == "last"
    assert read_info(tmp_path / "mean.safetensors").pooling == "mean"


def test_a_pooling_that_there_is_not_is_refused_by_name(tmp_path):
    with pytest.raises(RMError, match="pooling is 'max', expected one of last, mean"):
        extract_features(
            tiny_backbone(tmp_path / "b"), make_rows(2), tmp_path / "f.safetensors", pooling="max", progress=False
        )
    with pytest.raises(RMError, match="pooling is 'max', expected one of last, mean"):
        merge(tmp_path / "b", tiny_head(tmp_path / "head", pooling="max"), tmp_path / "rm")


def test_a_changed_pooling_is_named_by_the_card(rm, tmp_path):
    folder = shutil.copytree(rm, tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pooling": "last"}))
    with pytest.raises(RMError, match="pooling is 'mean', the folder has 'last'"):
        RewardScorer.load(folder)


def test_a_card_and_a_config_from_before_pooling_mean_last(tmp_path):
    folder = tiny_rm(tmp_path / "rm")
    before = [score.logit for score in RewardScorer.load(folder).score(TALKS)]
    for name in ("config.json", "rm_card.json"):
        values = json.loads((folder / name).read_text())
        assert values.pop("pooling") == "last"
        if values.pop("digests", None):
            values["format"] = 1
        (folder / name).write_text(json.dumps(values))
    assert [score.logit for score in RewardScorer.load(folder).score(TALKS)] == before
