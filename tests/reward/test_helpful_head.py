"""The head for helpfulness: learns from better_response_id alone, is measured on prompts it never saw, merges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from labelled_rows import make_features, make_rows
from tiny import tiny_backbone
from ups_rm.cli import app
from ups_rm.data.degenerate import DEGENERATE
from ups_rm.errors import RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.feature_set import FeatureSet, better_pairs
from ups_rm.reward.head import head_logits, train_head
from ups_rm.reward.head_files import read_head, read_heads
from ups_rm.reward.head_objective import HeadSettings, part_of
from ups_rm.reward.helpful_head import helpful_quality, train_heads, train_helpfulness
from ups_rm.reward.lora import train_lora
from ups_rm.reward.model_card import describe
from ups_rm.reward.scorer import RewardScorer

QUICK = HeadSettings(hidden_dims=(8,), lr=3e-3, max_epochs=60, patience=10, validation_share=0.2, test_share=0.2)


def with_better(features: FeatureSet, *, axis: int = 2, seed: int = 5) -> FeatureSet:
    """The same rows, the better reply being the one that lies further along `axis`, whatever its safety."""
    hidden = features.hidden.clone()
    generator = torch.Generator().manual_seed(seed)
    better = torch.randint(2, (features.rows,), generator=generator)
    texts = features.row_texts[torch.arange(features.rows), better]
    hidden[texts, axis] += 4 * hidden[:, axis].std()
    return replace(features, hidden=hidden, row_better=better.to(torch.int8))


def test_both_heads_learn_each_from_its_own_labels(tmp_path):
    """Better is drawn apart from safe, so that neither head could be the other; the other's axis says nothing."""
    features, other = with_better(make_features(200)), with_better(make_features(100, seed=1))
    report = train_heads(features, tmp_path, QUICK, target="both", extra={"other": other}, progress=False)
    safety, helpful = report.safety, report.helpfulness
    assert safety is not None
    assert helpful is not None
    assert safety.prompts == helpful.prompts
    assert helpful.quality.pairs == helpful.prompts["test"]
    assert helpful.quality.pairwise_accuracy > 0.9
    low, high = helpful.quality.pairwise_ci95
    assert low <= helpful.quality.pairwise_accuracy <= high
    assert abs(helpful.quality.safety_head - 0.5) < 0.25
    assert helpful.extra["other"].pairwise_accuracy > 0.9
    assert safety.quality.pairwise_accuracy > 0.75
    metrics = json.loads((tmp_path / "helpfulness" / "metrics.json").read_text())
    assert metrics["held_out"]["pairwise_accuracy"] == round(helpful.quality.pairwise_accuracy, 4)
    assert list(read_heads(tmp_path)) == ["unsafety", "helpfulness"]


def test_the_safety_head_is_the_same_with_a_helpfulness_head_beside_it(tmp_path):
    features = with_better(make_features(60))
    train_head(features, tmp_path / "alone", QUICK, progress=False)
    train_heads(features, tmp_path / "both", QUICK, target="both", progress=False)
    for name in ("head.safetensors", "head.json", "metrics.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()


def test_the_other_labels_turned_round_turn_the_logits(tmp_path):
    """An oracle of symmetry: with every better_response_id exchanged the head must prefer the other replies."""
    features = with_better(make_features(120))
    turned = replace(features, row_better=1 - features.row_better)
    one = train_helpfulness([features], tmp_path / "one", QUICK, progress=False)
    train_helpfulness([turned], tmp_path / "two", QUICK, progress=False)
    logits = head_logits(read_head(tmp_path / "two").tensors, features.hidden)
    prompts = features.prompt_id.unique()
    assert one.quality.pairwise_accuracy > 0.9
    assert helpful_quality(features, logits, prompts).pairwise_accuracy < 0.1


def test_logits_are_centred_and_their_differences_calibrated(tmp_path):
    """Labels that are wrong in one of five pairs: sigmoid of a difference must say about 0.8 on average."""
    features = with_better(make_features(600))
    wrong = torch.rand(features.rows, generator=torch.Generator().manual_seed(3)) < 0.2
    noisy = replace(features, row_better=torch.where(wrong, 1 - features.row_better, features.row_better))
    report = train_helpfulness([noisy], tmp_path, QUICK, progress=False)
    weights = read_head(tmp_path)
    assert weights.temperature == report.temperature
    logits = head_logits(weights.tensors, noisy.hidden, temperature=weights.temperature)
    assert abs(logits.mean()) < 0.3
    pairs = better_pairs(noisy, noisy.prompt_id.unique())
    confidence = (logits[pairs[:, 1]] - logits[pairs[:, 0]]).abs().sigmoid().mean()
    right = helpful_quality(noisy, logits, noisy.prompt_id.unique()).pairwise_accuracy
    assert confidence.item() == pytest.approx(right, abs=0.06)


def test_figures_by_hand():
    """Three prompts, four texts apart from each other; every figure counted on paper."""
    features = make_features(3)
    features = replace(
        features,
        row_better=torch.tensor([0, 1, 1], dtype=torch.int8),
        row_safer=torch.tensor([0, 0, -1], dtype=torch.int8),
        tokens=torch.tensor([9, 5, 5, 9, 7, 7], dtype=torch.int32),
    )
    logits = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 1.0])  # right, right, wrong
    found = helpful_quality(features, logits, features.prompt_id.unique())
    assert (found.prompts, found.pairs, found.worse_pairs) == (3, 3, 1)
    assert found.pairwise_accuracy == pytest.approx(2 / 3)
    assert found.longer_is_better == pytest.approx(2.5 / 3)  # the last pair is a tie
    assert (found.safer_is_better, found.safer_is_worse) == (1.0, 1.0)
    assert math.isnan(found.safety_head)
    none = helpful_quality(features, logits, torch.tensor([0]))
    assert none.pairs == 0
    assert none.as_dict()["pairwise_accuracy"] is None


def test_spoiled_replies_are_no_pairs_but_are_learnt_from_where_asked():
    features = with_better(make_features(40))
    info = replace(features.info, files=("rows", DEGENERATE))
    made = (torch.arange(features.rows) % 2).long()
    features = replace(features, row_file=made, info=info)
    prompts = features.prompt_id.unique()
    part = part_of(features, prompts, HeadSettings(loss="better"))
    assert len(part) == int((made == 0).sum())
    assert part.degenerate is not None
    good, spoiled = part.degenerate[0].tolist()
    row = int((features.row_texts == good).any(1).nonzero()[0])
    assert features.row_texts[row, features.row_better[row].long()] == good != spoiled


def test_what_can_not_be_trained_says_so(tmp_path):
    features = make_features(60)  # no better_response_id
    with pytest.raises(RMError, match=r"no texts with pairs with a better reply \(better_response_id\)"):
        train_heads(features, tmp_path, QUICK, target="both", progress=False)
    with pytest.raises(RMError, match="target is 'usefulness', expected one of safety, helpfulness, both"):
        train_heads(features, tmp_path, QUICK, target="usefulness", progress=False)  # type: ignore[arg-type]
    with pytest.raises(RMError, match=r"(?s)loss is 'better', expected one of bce.*--target"):
        train_head(features, tmp_path, replace(QUICK, loss="better"), progress=False)
    with pytest.raises(RMError, match=r"(?s)target is 'helpfulness', but adapters .*--target both"):
        train_lora(tmp_path, make_rows(4), tmp_path / "out", target="helpfulness", progress=False)


def test_a_helpfulness_head_of_an_earlier_training_is_not_merged(tmp_path):
    features = with_better(make_features(60))
    train_heads(features, tmp_path, QUICK, target="both", progress=False)
    train_heads(features, tmp_path, QUICK, target="safety", progress=False)
    assert list(read_heads(tmp_path)) == ["unsafety"]


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def labelled(file: Path, prompts: int = 24) -> Path:
    """Rows in the full schema: the longer reply is the better one, safe or not."""
    rows = []
    for row in make_rows(prompts):
        line = {name: getattr(row, name) for name in ("prompt", "response_0", "response_1", "safer_response_id")}
        line |= {f"is_response_{i}_safe": row.safe[i] for i in range(2)}
        rows.append(line | {"better_response_id": int(len(row.response_1) > len(row.response_0))})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_from_rows_to_an_rm_folder_with_two_heads_by_the_commands(tmp_path):
    rows, backbone = labelled(tmp_path / "rows.jsonl"), tiny_backbone(tmp_path / "backbone")
    features, head, rm = tmp_path / "f.safetensors", tmp_path / "head", tmp_path / "rm"
    invoke("rm", "features", "--backbone", backbone, "--data", rows, "--split", "all", "--out", features)
    shares = ("--validation-share", 0.2, "--test-share", 0.2, "--hidden-dims", "8")
    shown = invoke("rm", "train", features, "--target", "both", "--out", head, *shares)
    assert "helpfulness head after epoch" in shown
    merged = ("rm", "merge", "--backbone", backbone, "--head")
    assert "outputs: unsafety, helpfulness" in invoke(*merged, head, "--out", rm)
    card = RMCard.read(rm)
    assert card is not None
    assert card.helpfulness_head["metrics"]["held_out"]["pairs"] > 0
    described = invoke("rm", "card", rm, "--describe")
    assert "measured: helpfulness, held_out" in described
    assert "of always taking the longer reply" in dict(describe(card))["measured: helpfulness, held_out"]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert RewardScorer.load(rm, dtype="float32").score([talk])[0].helpfulness is not None
    alone = tmp_path / "alone"
    invoke("rm", "train", features, "--target", "helpfulness", "--out", alone, *shares)
    invoke("rm", "train", features, "--out", tmp_path / "safety", *shares)
    invoke(*merged, tmp_path / "safety", "--helpfulness-head", alone, "--out", tmp_path / "rm2")
    one, two = (RewardScorer.load(folder, dtype="float32").score([talk])[0] for folder in (rm, tmp_path / "rm2"))
    assert one == two
