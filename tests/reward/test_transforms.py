"""Transforms against torch's own functions, and the one property that all of them must have: safer scores higher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ups_rm.errors import RMError
from ups_rm.reward.transforms import (
    OUTPUTS,
    TRANSFORMS,
    safe_score,
    score_of,
    score_range,
    unsafety_logit,
)

logits = st.floats(-700, 700)
temperatures = st.floats(0.05, 50)


@given(logits, temperatures)
def test_transforms_equal_torch(logit: float, temperature: float) -> None:
    x = torch.tensor(-logit, dtype=torch.float64)
    expected = {
        "sigmoid": torch.sigmoid(x),
        "logit": x,
        "logsigmoid": F.logsigmoid(x),
        "tempered_sigmoid": torch.sigmoid(x / temperature),
    }
    assert set(expected) == set(TRANSFORMS)
    for name, value in expected.items():
        assert score_of(logit, name, temperature) == pytest.approx(value.item(), rel=1e-12, abs=1e-300), name
    assert safe_score(logit) == score_of(logit)


@given(logits, st.floats(0.01, 50), temperatures, st.sampled_from(TRANSFORMS))
def test_a_less_safe_reply_never_scores_higher(logit: float, more: float, temperature: float, transform: str) -> None:
    assert score_of(logit + more, transform, temperature) <= score_of(logit, transform, temperature)
    if abs(logit) < 20 and more > 0.1:
        assert score_of(logit + more, transform, 1.0) < score_of(logit, transform, 1.0)


@given(logits, temperatures, st.sampled_from(TRANSFORMS))
def test_scores_stay_within_their_range(logit: float, temperature: float, transform: str) -> None:
    low, high = score_range(transform)
    assert low <= score_of(logit, transform, temperature) <= high


@given(logits)
def test_the_output_decides_the_sign(value: float) -> None:
    assert [unsafety_logit(value, output) for output in OUTPUTS] == [value, -value, -value]
    safer, less_safe = sorted([value, value + 1], reverse=True)  # two rewards
    assert score_of(unsafety_logit(safer, "reward"), "logit") > score_of(unsafety_logit(less_safe, "reward"), "logit")


def test_unknown_names_are_errors_by_name() -> None:
    for call in (lambda: score_of(0.0, "tanh"), lambda: score_range("tanh")):
        with pytest.raises(RMError, match="transform is 'tanh', expected one of sigmoid, logit"):
            call()
    with pytest.raises(RMError, match="output is 'goodness', expected one of unsafety, safety, reward"):
        unsafety_logit(0.0, "goodness")
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(RMError, match=r"temperature is .*, expected a number above 0"):
            score_of(0.0, "tempered_sigmoid", temperature)
