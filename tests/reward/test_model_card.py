"""The page for people: it says what the card and the head's training say; plots are drawn from the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from labelled_rows import make_rows
from tiny import tiny_backbone, tiny_rm
from ups_rm.errors import RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import extract_features
from ups_rm.reward.head import HeadSettings, train_head
from ups_rm.reward.head_metrics import auc, curves, expected_calibration_error
from ups_rm.reward.merge import merge
from ups_rm.reward.model_card import MARK, PLOTS, write_model_card


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RM folder the whole way: features, head, merge."""
    here = tmp_path_factory.mktemp("trained")
    backbone = tiny_backbone(here / "backbone")
    extract_features(backbone, make_rows(120), here / "f.safetensors", device="cpu", dtype="float32", sources=["mine"])
    train_head(
        FeatureSet.read(here / "f.safetensors"), here / "head", HeadSettings(hidden_dims=(8,), max_epochs=3),
        progress=False,
    )  # fmt: skip
    merge(backbone, here / "head", here / "rm")
    return here / "rm"


def test_figures_of_the_training_reach_card_page_and_plots(trained: Path) -> None:
    page, card = (trained / "README.md").read_text(encoding="utf-8"), RMCard.read(trained)
    assert card is not None
    figures = json.loads((trained.parent / "head" / "metrics.json").read_text())["held_out"]
    assert card.head["metrics"]["held_out"]["auc"] == figures["auc"]
    _, matter, text = page.split("---\n", 2)
    index = yaml.safe_load(matter)["model-index"][0]["results"][0]
    assert {one["name"]: one["value"] for one in index["metrics"]}["AUC"] == figures["auc"]
    assert index["dataset"]["name"] == "mine"
    assert f"{figures['auc']:.3f}" in text
    for category in figures["by_category"]:
        assert f"| held_out: {category} |" in text
    assert "mine" in text.split("## Where it comes from")[1]
    for name in PLOTS:
        assert f"({name})" in text
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
        assert (trained / name).stat().st_size > 3000
    assert str(trained.parent) not in page, "no path of a machine"


def test_a_page_of_somebody_else_is_left_alone_and_ours_is_renewed(tmp_path: Path) -> None:
    rm = tiny_rm(tmp_path / "rm")
    page = (rm / "README.md").read_text()
    assert MARK in page
    assert "Not known: the card holds no figures" in page
    assert not list(rm.glob("*.png"))
    (rm / "README.md").write_text(page + "more")
    assert write_model_card(rm) == [rm / "README.md"]
    assert (rm / "README.md").read_text() == page
    (rm / "README.md").write_text("# Mine\n")
    assert write_model_card(rm) == []
    assert (rm / "README.md").read_text() == "# Mine\n"
    (rm / "rm_card.json").unlink()
    with pytest.raises(RMError, match=r"has no rm_card.json"):
        write_model_card(rm)


def test_describe_says_what_the_card_says(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_training import command

    assert command("rm", "card", trained, "--describe") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("higher = less safe", "exactly one at the start", "<|eot_id|>", "mine", "measured: held_out", "AUC"):
        assert words in shown
    before = (trained / "rm_card.json").read_text()
    assert command("rm", "card", trained, "--describe", "--force") == 0
    assert (trained / "rm_card.json").read_text() == before
    assert command("rm", "card", trained, "--force") == 0
    assert RMCard.read(trained).head == json.loads(before)["head"]  # type: ignore[union-attr]
    assert (trained / "rm_roc.png").is_file()


@given(st.lists(st.tuples(st.floats(-6, 6), st.booleans()), min_size=2, max_size=80))
@settings(deadline=None)
def test_curves_hold_the_same_figures_as_the_table(drawn: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([round(x, 1) for x, _ in drawn])
    labels = torch.tensor([float(unsafe) for _, unsafe in drawn])
    found = curves(logits, labels)
    if len(set(labels.tolist())) < 2:
        assert found == {}
        return
    x, y = zip(*found["roc"], strict=True)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert float(numpy.trapezoid(y, x)) == pytest.approx(auc(logits, labels), abs=2e-3)  # ties: straight lines
    gaps = sum(abs(p - share) * n for p, share, n in found["reliability"]) / len(drawn)
    assert gaps == pytest.approx(expected_calibration_error(logits, labels), abs=1e-3)
    counts = [sum(found["histogram"][kind]) for kind in ("safe", "unsafe")]
    assert counts == [int((labels == 0).sum()), int((labels == 1).sum())]


def test_curves_leave_unknown_and_contradictory_labels_out() -> None:
    nan = float("nan")
    logits, labels = torch.tensor([1.0, -1.0, 5.0, nan, 0.0]), torch.tensor([1.0, 0.0, nan, 1.0, 0.5])
    assert curves(logits, labels) == curves(logits[:2], labels[:2]) != {}
