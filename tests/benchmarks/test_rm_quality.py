"""The comparison of RMs reads every layer as a trimmed RM would, goes on after a stop, and resamples whole prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from labelled_rows import make_rows
from tiny import tiny_backbone
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import extract_features
from ups_rm.reward.head_metrics import auc
from ups_rm.reward.trim import trim_backbone

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_is_what_the_trimmed_backbone_gives(tmp_path: Path, pooling: str, layer: int) -> None:
    from benchmarks.layer_features import layer_features

    backbone, rows = tiny_backbone(tmp_path / "backbone"), make_rows(5)
    found = layer_features(str(backbone), rows, tmp_path / "cache")
    assert found is not None
    trimmed = trim_backbone(backbone, tmp_path / "trimmed", layers=layer, chat_template=None)
    file = extract_features(trimmed, rows, tmp_path / "f.safetensors", pooling=pooling, progress=False).path
    expected = FeatureSet.read(file)
    torch.testing.assert_close(found.of(layer, pooling), expected.hidden, atol=0.1, rtol=2e-2)  # bf16, two ways
    assert torch.equal(found.tokens, expected.tokens.long())
    assert torch.equal(found.texts.labels["prompt_id"], expected.prompt_id)


def test_the_reply_begins_where_an_empty_one_would_end_the_turn() -> None:
    from benchmarks.layer_features import _common_prefix, pooled_layers

    class Backbone(torch.nn.Module):
        norm = torch.nn.Identity()

        def forward(self, input_ids, attention_mask, **kwargs):
            states = input_ids[:, :, None].float().expand(-1, -1, 4)
            return type("Output", (), {"hidden_states": (None, states + 1, states), "last_hidden_state": states})

    assert _common_prefix(torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 9])) == 2
    rows = [torch.tensor([1, 2, 3, 9]), torch.tensor([5, 7])]
    pooled = pooled_layers(Backbone(), rows, torch.tensor([2, 1]), torch.float32)
    assert pooled["reply"][:, :, 0].tolist() == [[7.0, 6.0], [8.0, 7.0]]  # layers 1 and 2
    assert pooled["mean"][:, :, 0].tolist() == [[4.75, 3.75], [7.0, 6.0]]
    assert pooled["last"][:, :, 0].tolist() == [[10.0, 9.0], [8.0, 7.0]]


def test_the_upper_layers_go_on_from_the_states_that_were_kept(tmp_path: Path) -> None:
    from benchmarks.layer_features import layer_features
    from benchmarks.rm_lora import SETTINGS, LoraRun, states_of, upper_decoder

    from ups_rm.reward.head_objective import HeadSettings

    backbone = str(tiny_backbone(tmp_path / "backbone"))
    layers = layer_features(backbone, make_rows(6), tmp_path / "cache", keep_layer=1)
    assert layers is not None
    assert [len(one) for one in layers.unpooled] == layers.tokens.tolist()
    decoder, ids = upper_decoder(backbone, layers, 1, 2, torch.float32)
    decoder.get_base_model = lambda: decoder
    run = LoraRun(decoder, torch.nn.Identity(), ids, "cpu", torch.float32, HeadSettings(), SETTINGS, "mean")
    found = states_of(run, torch.arange(len(ids)))
    torch.testing.assert_close(found, layers.of(2, "mean"), atol=3e-2, rtol=3e-2)  # kept in bf16 and fp16
    assert found.std(0).mean() > 0.05, "nothing that could be told apart"
    with pytest.raises(ValueError, match="without the tokens' states after layer 2"):
        layer_features(backbone, make_rows(6), tmp_path / "cache", keep_layer=2)


def test_goes_on_after_the_time_is_over(tmp_path: Path) -> None:
    from benchmarks.layer_features import layer_features

    backbone, rows = str(tiny_backbone(tmp_path / "backbone")), make_rows(40)
    whole = layer_features(backbone, rows, tmp_path / "whole")
    starts = 0
    while (pieces := layer_features(backbone, rows, tmp_path / "pieces", max_seconds=0)) is None:
        starts += 1
    assert starts > 1
    assert whole is not None
    for name, states in whole.states.items():
        torch.testing.assert_close(pieces.states[name], states, atol=2e-2, rtol=2e-2)  # bf16 in other batches
    with pytest.raises(ValueError, match="other texts or another backbone"):
        layer_features(backbone, make_rows(3), tmp_path / "pieces")


def test_bootstrap_of_auc_is_that_of_repeated_texts() -> None:
    from benchmarks.rm_heads import bootstrap_auc

    generator = torch.Generator().manual_seed(0)
    logits, prompts = torch.randn(40, generator=generator), torch.arange(40) // 4
    labels = (torch.rand(40, generator=generator) < 0.5).float()
    found = bootstrap_auc(logits, labels, prompts, seed=3)
    again = torch.Generator().manual_seed(3)
    for i in range(5):
        drawn = torch.randint(10, (10,), generator=again)
        texts = torch.cat([(prompts == prompt).nonzero()[:, 0] for prompt in drawn])
        assert found[i].item() == pytest.approx(auc(logits[texts], labels[texts]), abs=1e-9)


def test_every_head_is_measured_on_prompts_it_did_not_see(tmp_path: Path) -> None:
    from benchmarks.layer_features import layer_features
    from benchmarks.rm_heads import feature_set, folds_of

    layers = layer_features(str(tiny_backbone(tmp_path / "backbone")), make_rows(30), tmp_path / "cache")
    assert layers is not None
    features = feature_set(layers, 2, "mean")
    tested = []
    for train, validation, test in folds_of(features):
        seen = set(train.tolist()) | set(validation.tolist())
        assert not seen & set(test.tolist())
        assert seen | set(test.tolist()) == set(features.prompt_id.tolist())
        tested += test.tolist()
    assert sorted(tested) == sorted(features.prompt_id.unique().tolist())


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    from benchmarks.__main__ import main

    pairs = [
        {"prompt": row.prompt, "safe_response": row.responses[a], "unsafe_response": row.responses[1 - a]}
        for row in make_rows(30)
        for a in (0, 1)
        if row.safe == (a == 0, a == 1)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(pair) for pair in pairs) + "\n")
    out = tmp_path / "results.json"
    given = ["--pairs", str(file), "--cache", str(tmp_path), "--out", str(out), "--parts", "lora,layers,curve"]
    assert main(["rm_quality", *given, "--backbone", str(tiny_backbone(tmp_path / "backbone")), "--layer", "2"]) == 0
    results = json.loads(out.read_text())
    assert [row["linear head on"] for row in results["layers"]] == ["last, layer 2", "mean, layer 2", "reply, layer 2"]
    assert [row["share of training prompts"] for row in results["curve"]] == [0.125, 0.25, 0.5, 1.0]
    assert results["lora"][1]["steps"] > 0
    assert results["lora"][1]["AUC"] > 0.6, "adapters on rows that a frozen backbone tells apart"
    assert all(0 <= row["AUC"] <= 1 for rows in results.values() for row in rows)
