"""LoRA: adapters and head learn together, small pieces give the same gradient, the merged backbone is what scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from labelled_rows import make_rows
from tiny import tiny_backbone
from ups_rm.errors import RMError
from ups_rm.reward import lora as module
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import collect_texts, extract_features, load_decoder, render_texts
from ups_rm.reward.head import TrainableHead, head_logits
from ups_rm.reward.head_files import read_head
from ups_rm.reward.head_objective import HeadSettings, Part, part_of
from ups_rm.reward.lora import LoraReport, LoraSettings, train_lora
from ups_rm.reward.merge import load_backbone_tokenizer, merge
from ups_rm.reward.scorer import RewardScorer

HEAD = HeadSettings(hidden_dims=(8,), max_epochs=3, validation_share=0.2, test_share=0.2)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture(scope="module")
def trained(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraReport:
    settings = LoraSettings(rank=4, alpha=8, epochs=6, lr=5e-3, head_lr=5e-3, batch_size=8, max_batch_tokens=400)
    out = tmp_path_factory.mktemp("lora") / "out"
    return train_lora(backbone, make_rows(30), out, HEAD, settings, device="cpu", dtype="float32", progress=False)


def test_backbone_and_head_learn_what_the_frozen_one_does_not(trained: LoraReport) -> None:
    assert trained.head.quality.auc >= trained.frozen.auc
    assert trained.head.quality.auc > 0.9
    assert trained.head.extra["frozen backbone"] == trained.frozen
    assert trained.steps == 6 * 9  # 18 of 30 prompts train, with 4 different replies each, 8 texts a step


def test_what_is_written_merges_and_scores_as_reported(trained: LoraReport, tmp_path: Path) -> None:
    merge(trained.backbone, trained.head.folder, tmp_path / "rm")
    scorer = RewardScorer.load(tmp_path / "rm", dtype="float32")
    features = FeatureSet.read(trained.backbone.parent / "features_lora.safetensors")
    texts, head = collect_texts(make_rows(30)), read_head(trained.head.folder)
    scored = torch.tensor([s.logit for s in scorer.score([texts.conversation(i) for i in range(features.texts)])])
    logits = head_logits(head.tensors, features.hidden, temperature=head.temperature)
    torch.testing.assert_close(scored, logits, atol=1e-3, rtol=1e-3)
    assert scored[features.unsafe == 1].mean() > scored[features.unsafe == 0].mean()


def test_merged_weights_are_base_plus_adapter(backbone: Path, trained: LoraReport) -> None:
    base, merged = load_file(backbone / "model.safetensors"), load_file(trained.backbone / "model.safetensors")
    adapter = load_file(trained.backbone.parent / "adapter" / "adapter_model.safetensors")
    name = "layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"model.{name}.weight"] + 2 * b @ a, atol=1e-6, rtol=1e-5)
    assert b.abs().max() > 0
    assert torch.equal(merged["embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("loss", ["bce", "severity", "pairs"])
def test_gradient_does_not_hang_on_the_size_of_the_pieces(backbone: Path, tmp_path: Path, loss: str) -> None:
    rows = make_rows(6)
    extract_features(backbone, rows, tmp_path / "f.safetensors", dtype="float32", device="cpu", progress=False)
    features = FeatureSet.read(tmp_path / "f.safetensors")
    head_settings = HeadSettings(loss=loss, hidden_dims=(8,), dropout=0.0)  # type: ignore[arg-type]
    part = part_of(features, features.prompt_id.unique(), head_settings)
    ids, _ = render_texts(load_backbone_tokenizer(backbone, None), collect_texts(rows), features.info.render)
    gradients = []
    for max_batch_tokens in (1, 150, 100_000):
        torch.manual_seed(0)
        settings = LoraSettings(rank=2, dropout=0.0, max_batch_tokens=max_batch_tokens)
        model = module.with_adapters(load_decoder(backbone, torch.float32), settings, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        head = TrainableHead(features.hidden.mean(0), features.hidden.std(0), (8,), dropout=0.0)
        run = module.LoraRun(model, head, ids, "cpu", torch.float32, head_settings, settings)
        module._gradient(run, part, module._units(part, torch.arange(len(part))))
        trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert gradients[2].abs().max() > 1e-4
    for other in gradients[:2]:
        torch.testing.assert_close(other, gradients[2], atol=1e-5, rtol=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_an_epoch_has_each_text_once_and_opposites_side_by_side(prompts: list[tuple[int, int]], seed: int) -> None:
    """Whatever numbers of unsafe and safe replies the prompts have, and in whatever order they are drawn."""
    targets, prompt_of, contrast = [], [], []
    for prompt, (unsafe, safe) in enumerate(prompts):
        start = len(targets)
        targets += [0.95] * unsafe + [0.05] * safe
        prompt_of += [prompt] * (unsafe + safe)
        contrast += [(start + u, start + unsafe + s) for u in range(unsafe) for s in range(safe)]
    texts = torch.arange(len(targets)) + 100  # items are texts of a larger set
    pairs = torch.tensor(contrast) + 100 if contrast else None
    part = Part(texts, torch.tensor(targets), torch.ones(len(targets)), pairs)
    torch.manual_seed(seed)
    steps = list(module._steps(part, batch_size=4))
    units = [unit for step in steps for unit in step]
    assert sorted(item for unit in units for item in unit) == list(range(len(targets)))
    assert sum(len(unit) == 2 for unit in units) == sum(min(counts) for counts in prompts)
    for unsafe, safe in (unit for unit in units if len(unit) == 2):
        assert prompt_of[unsafe] == prompt_of[safe]
        assert (targets[unsafe], targets[safe]) == (0.95, 0.05)
    assert all(sum(map(len, step)) <= 5 for step in steps)


def test_contrast_moves_the_replies_of_one_prompt_apart(backbone: Path, tmp_path: Path) -> None:
    """The loss of a pair is that of rm train: (1 - contrast) * cross-entropy + contrast * Bradley-Terry."""
    rows = make_rows(2)
    extract_features(backbone, rows, tmp_path / "f.safetensors", dtype="float32", device="cpu", progress=False)
    features = FeatureSet.read(tmp_path / "f.safetensors")
    head_settings = HeadSettings(hidden_dims=(8,), dropout=0.0, contrast=0.3)
    part = part_of(features, features.prompt_id.unique(), head_settings)
    head = TrainableHead(features.hidden.mean(0), features.hidden.std(0), (8,), dropout=0.0)
    model = module.with_adapters(load_decoder(backbone, torch.float32), LoraSettings(rank=2), seed=0)
    ids, _ = render_texts(load_backbone_tokenizer(backbone, None), collect_texts(rows), features.info.render)
    run = module.LoraRun(model, head, ids, "cpu", torch.float32, head_settings, LoraSettings())
    units = module._units(part, torch.arange(len(part)))
    logits = head(features.hidden)[part.items]
    plain = F.binary_cross_entropy_with_logits(logits, part.targets, weight=part.weights)
    apart = torch.stack([-F.logsigmoid(logits[unsafe] - logits[safe]) for unsafe, safe in units]).mean()
    assert module._check(run, part) == pytest.approx((0.7 * plain + 0.3 * apart).item(), abs=1e-5)


def test_adapters_only_from_a_layer_on(backbone: Path) -> None:
    model = module.with_adapters(load_decoder(backbone, torch.float32), LoraSettings(from_layer=1), seed=0)
    trained = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1"}
    with pytest.raises(RMError, match="from_layer is 2, but the backbone has 2 layers"):
        module.with_adapters(load_decoder(backbone, torch.float32), LoraSettings(from_layer=2), seed=0)


def test_same_seed_same_merged_weights(backbone: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, alpha=4, epochs=1, lr=1e-2, batch_size=8)
    for name in "ab":
        torch.manual_seed(ord(name))
        train_lora(
            backbone, make_rows(10), tmp_path / name, HEAD, settings, device="cpu", dtype="float32", progress=False
        )
    files = [(tmp_path / name / "backbone" / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_what_stands_in_the_way_is_named(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.txt").write_text("dear to me")
    with pytest.raises(RMError, match="exists"):
        train_lora(backbone, make_rows(4), tmp_path, HEAD)
    with pytest.raises(RMError, match="not even with --force"):
        train_lora(backbone, make_rows(4), tmp_path, HEAD, overwrite=True)
    with pytest.raises(RMError, match="LoRA can't be put"):
        module.with_adapters(load_decoder(backbone, torch.float32), LoraSettings(target_modules="c_attn"), 0)
    with pytest.raises(RMError, match="adapters do not learn from that comparison"):
        train_lora(backbone, make_rows(4), tmp_path / "new", replace(HEAD, helpful=0.3))
    with pytest.raises(RMError, match=r"degenerate is 0\.1, but adapters do not learn"):
        train_lora(backbone, make_rows(4), tmp_path / "new", replace(HEAD, degenerate=0.1))
    with pytest.raises(RMError, match="rank"):
        LoraSettings(rank=0)
