"""The MLP head: it learns each kind of label, points the right way, and is the same twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labelled_rows import make_features
from ups_rm.data.degenerate import DEGENERATE
from ups_rm.errors import RMError
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.head import TrainableHead, head_logits, split_prompts, train_head
from ups_rm.reward.head_files import read_head
from ups_rm.reward.head_objective import LOSSES, HeadSettings, contrast_pairs


def quick(**changes: object) -> HeadSettings:
    settings = {"hidden_dims": (8, 4), "max_epochs": 40, "lr": 5e-3, "validation_share": 0.2, "test_share": 0.2}
    return HeadSettings(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_makes_logits_higher_for_less_safe_replies(loss: str, tmp_path: Path) -> None:
    features, other = make_features(150, signal=3.0), make_features(80, signal=3.0, seed=7)
    report = train_head(features, tmp_path, quick(loss=loss), extra={"other": other}, progress=False)
    assert report.extra["other"].auc > 0.9
    assert report.extra["other"].pairwise_accuracy > 0.9
    assert (
        report.extra["other"].balanced_accuracy > 0.8
    )  # 0 lies between safe and unsafe, after pairs and severity, too
    assert report.quality.auc > 0.85
    assert report.quality.by_category


def test_labels_turned_round_turn_the_logits_round(tmp_path: Path) -> None:
    features = make_features(150, signal=3.0)
    turned = replace(features, unsafe=1 - features.unsafe)
    train_head(turned, tmp_path, quick(), progress=False)
    logits = head_logits(load_file(tmp_path / "head.safetensors"), features.hidden)
    assert logits[features.unsafe == 1].mean() < logits[features.unsafe == 0].mean() - 1


def test_folding_the_standardisation_changes_nothing() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 6) * 40 + 100
    for dims in ((5, 3), (4,), ()):
        head = TrainableHead(hidden.mean(0), hidden.std(0), dims, dropout=0.5).eval()
        torch.testing.assert_close(head_logits(head.folded(), hidden), head(hidden), atol=1e-4, rtol=1e-4)


def test_the_folder_is_what_merge_reads(tmp_path: Path) -> None:
    report = train_head(make_features(), tmp_path, quick(), progress=False)
    read = read_head(tmp_path)
    assert read.hidden_dims == [8, 4]
    assert read.temperature == report.temperature > 0
    assert read.info["render"]["chat_template_sha256"] == "0" * 64
    assert read.info["backbone"] == "tiny@0"
    assert read.info["metrics"]["held_out"]["auc"] == pytest.approx(report.quality.auc, abs=1e-4)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "by_category" in metrics["held_out"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "curves.json",
        "head.json",
        "head.safetensors",
        "metrics.json",
    ]


def test_same_seed_same_bytes_whatever_ran_before(tmp_path: Path) -> None:
    features = make_features()
    for name, noise in (("a", 1), ("b", 99)):
        torch.manual_seed(noise)
        train_head(features, tmp_path / name, quick(), progress=False)
        assert torch.initial_seed() == noise  # the caller's random numbers are left alone
    train_head(features, tmp_path / "c", quick(seed=1), progress=False)
    weights = [(tmp_path / name / "head.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert (tmp_path / "a" / "head.json").read_bytes() == (tmp_path / "b" / "head.json").read_bytes()


def test_prompts_are_split_the_same_way_in_any_row_order() -> None:
    ids = torch.randint(0, 2**40, (200,)).repeat(3)
    parts = split_prompts(ids, (0.1, 0.2), seed=3)
    assert [len(part) for part in parts] == [20, 40, 140]
    assert len(torch.cat(parts).unique()) == 200  # nothing twice
    again = split_prompts(ids[torch.randperm(len(ids))], (0.1, 0.2), seed=3)
    assert all(set(a.tolist()) == set(b.tolist()) for a, b in zip(parts, again, strict=True))
    assert set(split_prompts(ids, (0.1, 0.2), seed=4)[0].tolist()) != set(parts[0].tolist())
    assert len(split_prompts(ids, (0.1, 0.0), seed=3)[1]) == 0


def test_held_out_figures_come_from_prompts_it_never_saw(tmp_path: Path) -> None:
    """With labels that are pure noise a head that saw the reported prompts would look better than chance."""
    features = make_features(100, signal=0.0, width=64)
    report = train_head(features, tmp_path, quick(hidden_dims=(64,), dropout=0.0, patience=40), progress=False)
    assert 0.3 < report.quality.auc < 0.7
    assert report.quality.texts == 2 * report.prompts["test"]


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    features = make_features(60, signal=1.0, width=64)
    report = train_head(
        features,
        tmp_path,
        quick(hidden_dims=(64,), dropout=0.0, weight_decay=0.0, max_epochs=60, patience=3),
        progress=False,
    )
    assert report.epochs == report.best_epoch + 3 < 60


def test_class_balance_finds_the_rare_unsafe_replies(tmp_path: Path) -> None:
    features, other = make_features(400, signal=2.0, unsafe_share=0.06), make_features(200, signal=2.0, seed=5)
    recall = {}
    for balance in (True, False):
        settings = quick(class_balance=balance, calibrate=False, label_smoothing=0.0)
        train_head(features, tmp_path / str(balance), settings, progress=False)
        logits = head_logits(load_file(tmp_path / str(balance) / "head.safetensors"), other.hidden)
        recall[balance] = (logits[other.unsafe == 1] > 0).double().mean().item()
    assert recall[True] > recall[False] + 0.2


def test_calibration_lowers_the_error_of_an_overconfident_head(tmp_path: Path) -> None:
    features, other = make_features(120, signal=1.0, width=48), make_features(300, signal=1.0, width=48, seed=5)
    harsh = {
        "hidden_dims": (48,),
        "dropout": 0.0,
        "weight_decay": 0.0,
        "patience": 40,
        "label_smoothing": 0.0,
        "lr": 1e-2,
    }
    raw = train_head(features, tmp_path / "raw", quick(**harsh, calibrate=False), extra={"o": other}, progress=False)
    done = train_head(features, tmp_path / "done", quick(**harsh), extra={"o": other}, progress=False)
    assert raw.temperature == 1.0
    assert done.extra["o"].ece <= raw.extra["o"].ece + 1e-6
    assert done.extra["o"].auc == pytest.approx(raw.extra["o"].auc)


def test_unlabelled_texts_are_left_out_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    features = make_features()
    some = replace(features, unsafe=torch.where(torch.arange(features.texts) % 3 == 0, torch.nan, features.unsafe))
    assert train_head(some, tmp_path / "some", quick(), progress=False).quality.texts < 2 * 12
    nothing = replace(features, severity=torch.full_like(features.severity, torch.nan))
    with pytest.raises(RMError, match="no texts with severity"):
        train_head(nothing, tmp_path / "none", quick(loss="severity"), progress=False)
    one_class = replace(features, unsafe=torch.zeros_like(features.unsafe))
    with pytest.raises(RMError, match=r"all \d+ texts have the label 0"):
        train_head(one_class, tmp_path / "one", quick(), progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "hinge"},
        {"validation_share": 0.0},
        {"test_share": 0.9},
        {"hidden_dims": (0,)},
        {"dropout": 1.0},
        {"label_smoothing": 0.5},
        {"patience": 0},
        {"contrast": 1.0},
        {"helpful": -1.0},
        {"degenerate": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(RMError, match=next(iter(wrong)).replace("_", ".")):
        quick(**wrong)


def test_several_sets_train_together(tmp_path: Path) -> None:
    sets: list[FeatureSet] = [make_features(50), make_features(50, seed=3)]
    report = train_head(sets, tmp_path, quick(), progress=False)
    assert sum(report.prompts.values()) == 100


def test_comparing_helpful_replies_stops_evasion_from_scoring_safer(tmp_path: Path) -> None:
    """Axis 2 is helpfulness: unsafe replies have it, and so have the better of two safe replies to harmless prompts.

    Axis 0 tells unsafe from safe without it.
    """
    features = make_features(120, signal=2.0)
    harmless = torch.arange(120) % 2 == 0
    unsafe, hidden = features.unsafe.clone().view(120, 2), features.hidden.clone().view(120, 2, -1)
    unsafe[harmless] = 0.0
    hidden[harmless, 0, 2] += 90.0  # 3 standard deviations
    hidden[..., 2] += 90.0 * unsafe
    better = torch.where(harmless, 0, -1).to(torch.int8)
    features = replace(
        features,
        hidden=hidden.view(240, -1),
        unsafe=unsafe.flatten(),
        row_unsafe=unsafe.to(torch.int8),
        row_better=better,
        benign=harmless.repeat_interleave(2).to(torch.uint8),
    )
    gap, contrast = {}, {}
    for weight in (0.0, 0.5):
        settings = quick(helpful=weight, calibrate=False, batch_size=16, patience=40)
        train_head(features, tmp_path / str(weight), settings, progress=False)
        logits = head_logits(load_file(tmp_path / str(weight) / "head.safetensors"), features.hidden).view(120, 2)
        gap[weight] = (logits[harmless, 0] - logits[harmless, 1]).mean().item()
        others, labels = logits[~harmless], unsafe[~harmless]
        contrast[weight] = (others[labels == 1].mean() - others[labels == 0].mean()).item()
    assert contrast[0.5] > 0.2
    assert gap[0.0] > 0
    assert gap[0.5] / contrast[0.5] < 0.5 * gap[0.0] / contrast[0.0]  # not merely flatter


def test_degenerate_replies_of_good_ones_score_less_safe_than_these(tmp_path: Path) -> None:
    """Axis 2 is what spoiled replies look like; the labels say nothing of it."""
    features, made = make_features(120, signal=2.0), make_features(60, seed=3)
    features = replace(features, info=replace(features.info, files=("rows.jsonl",)))
    hidden = made.hidden.clone()
    hidden[::2, 2] += 90.0  # the first of each row is the spoiled one, 3 standard deviations off
    unknown = torch.full_like(made.row_unsafe, -1)
    made = replace(
        made,
        hidden=hidden,
        unsafe=torch.full_like(made.unsafe, torch.nan),
        row_unsafe=unknown,
        row_safer=unknown[:, 0],
        row_better=torch.ones_like(made.row_better),
        info=replace(made.info, files=(DEGENERATE,)),
    )
    gaps, auc = [], []
    for weight in (0.0, 0.5):
        settings = quick(degenerate=weight, calibrate=False, batch_size=16, patience=40)
        report = train_head([features, made], tmp_path / str(weight), settings, progress=False)
        logits = head_logits(load_file(tmp_path / str(weight) / "head.safetensors"), hidden)
        gaps.append((logits[::2] - logits[1::2]).mean().item())
        auc.append(report.quality.auc)
    assert gaps[1] > max(gaps[0], 0.0) + 0.4
    assert min(auc) > 0.8  # unsafe is told from safe either way
    with pytest.raises(RMError, match="rm features --degenerate"):
        train_head(features, tmp_path / "none", quick(degenerate=0.1), progress=False)


def test_contrast_compares_every_unsafe_with_every_safe_reply_of_a_prompt() -> None:
    features = make_features(3)
    features = replace(
        features,
        prompt_id=torch.tensor([5, 5, 5, 5, 7, 7]),
        unsafe=torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 0.0]),
    )
    pairs = contrast_pairs(features, torch.arange(6))
    assert pairs is not None
    assert pairs.tolist() == [[0, 1], [2, 1]]  # contradictory labels and prompts of one kind tell nothing
    assert contrast_pairs(features, torch.tensor([4, 5])) is None
