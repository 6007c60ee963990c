"""The head's figures against brute force, and calibration against logits whose temperature is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.reward.head_metrics import (
    accuracy,
    auc,
    class_weights,
    cluster_interval,
    expected_calibration_error,
    fit_temperature,
    pair_wins,
    quality,
)

LOGITS = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 4.0])  # few values, so that ties are common
TEXTS = st.lists(st.tuples(LOGITS, st.booleans()), min_size=1, max_size=30)


@given(TEXTS)
@settings(deadline=None)
def test_auc_counts_pairs_with_half_for_ties(texts: list[tuple[float, bool]]) -> None:
    unsafe, safe = ([x for x, label in texts if label is wanted] for wanted in (True, False))
    found = auc(torch.tensor([x for x, _ in texts]), torch.tensor([float(y) for _, y in texts]))
    if not unsafe or not safe:
        assert math.isnan(found)
        return
    wins = sum((u > s) + 0.5 * (u == s) for u in unsafe for s in safe)
    assert found == pytest.approx(wins / (len(unsafe) * len(safe)))


@given(TEXTS)
@settings(deadline=None)
def test_ece_and_accuracy_equal_loops(texts: list[tuple[float, bool]]) -> None:
    logits, labels = torch.tensor([x for x, _ in texts]), torch.tensor([float(y) for _, y in texts])
    bins: dict[int, list[tuple[float, bool]]] = {}
    for x, y in texts:
        p = 1 / (1 + math.exp(-x))
        bins.setdefault(min(int(p * 15), 14), []).append((p, y))
    gap = sum(abs(sum(p for p, _ in one) - sum(y for _, y in one)) for one in bins.values()) / len(texts)
    assert expected_calibration_error(logits, labels) == pytest.approx(gap, abs=1e-6)
    assert accuracy(logits, labels)[0] == pytest.approx(sum((x > 0) == y for x, y in texts) / len(texts))


def test_balanced_accuracy_does_not_reward_saying_safe_to_everything() -> None:
    plain, balanced = accuracy(torch.tensor([-1.0] * 10), torch.tensor([0.0] * 9 + [1.0]))
    assert (plain, balanced) == (pytest.approx(0.9), 0.5)


def test_pair_wins() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0])
    assert pair_wins(logits, torch.tensor([[0, 1], [1, 0], [1, 2]])).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (3.0, 0.0), (0.4, 0.0), (2.0, -1.5)])
def test_calibration_finds_the_temperature_that_made_the_labels(temperature: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < ((logits + shift) / temperature).sigmoid()).float()
    found, offset = fit_temperature(logits, labels, shift=bool(shift))
    assert found == pytest.approx(temperature, rel=0.06)
    assert offset == pytest.approx(shift, abs=0.1)


def test_calibration_of_logits_that_say_nothing_or_the_opposite_flattens_them() -> None:
    logits = torch.linspace(-3, 3, 100)
    assert fit_temperature(logits, (logits < 0).float())[0] == 20.0
    assert fit_temperature(logits, torch.ones(100)) == (1.0, 0.0)
    assert 0.05 <= fit_temperature(logits, (logits > 0).float())[0] < 1  # separable: sharper, but bounded


def test_class_weights_give_both_classes_the_same_total() -> None:
    labels = torch.tensor([1.0] * 2 + [0.0] * 8)
    weights = class_weights(labels)
    assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum())
    assert weights.mean() == pytest.approx(1)


def test_interval_widens_when_replies_share_prompts() -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.rand(50, generator=generator) < 0.6).double().repeat_interleave(20)  # 50 prompts, 20 equal answers
    alone = cluster_interval(values, torch.arange(1000))
    shared = cluster_interval(values, torch.arange(50).repeat_interleave(20))
    assert shared[0] < values.mean() < shared[1]
    assert shared[1] - shared[0] > 3 * (alone[1] - alone[0])
    assert cluster_interval(values, torch.arange(1000)) == alone  # seeded
    assert all(math.isnan(x) for x in cluster_interval(torch.empty(0), torch.empty(0)))


def test_quality_by_category_takes_all_replies_to_the_prompts_it_touches() -> None:
    prompts = torch.arange(12).repeat_interleave(2)
    labels = torch.tensor([0.0, 1.0] * 12)
    logits = torch.where(labels > 0, 1.0, -1.0)
    logits[12:] *= -1  # the second category's prompts are judged the wrong way round
    bits = torch.where(labels > 0, torch.where(prompts < 6, 1, 2), 0)
    pairs = torch.arange(24).view(12, 2)
    found = quality(logits, labels, pairs, prompts, bits, ["first", "second", "third"])
    assert set(found.by_category) == {"first", "second"}
    first, second = found.by_category["first"], found.by_category["second"]
    assert (first.texts, first.pairs, first.auc, first.pairwise_accuracy) == (12, 6, 1.0, 1.0)
    assert (second.auc, second.pairwise_accuracy, second.accuracy) == (0.0, 0.0, 0.0)
    assert found.auc == found.pairwise_accuracy == 0.5
    plain = found.as_dict()
    assert plain["by_category"]["second"]["accuracy"] == 0
    assert quality(logits[:1], labels[:1], pairs[:0], prompts[:1], bits[:1]).as_dict()["auc"] is None
