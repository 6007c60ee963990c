"""With the real 135M backbone: the whole examination in about the time it was given, and what it says of a real RM."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from time import perf_counter

import pytest

from ups_rm.data.rows import read_rows
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import extract_features
from ups_rm.reward.head import train_head
from ups_rm.reward.merge import merge

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

ROWS = 120
SECONDS = 30.0


def test_a_real_rm_is_examined_in_the_time_it_was_given(tmp_path: Path) -> None:
    from ups_rm.models import fetch

    rows = list(islice(read_rows("sample", split="train"), ROWS))
    features = extract_features(fetch(), rows, tmp_path / "features.safetensors", progress=False)
    train_head([FeatureSet.read(features.path)], tmp_path / "head", progress=False)
    merge(fetch(), tmp_path / "head", tmp_path / "rm")
    said: list[str] = []
    begun = perf_counter()
    report = check_rm(tmp_path / "rm", full=True, seconds=SECONDS, plot=tmp_path / "reliability.png", say=said.append)
    took = perf_counter() - begun
    print(f"{took:.0f} s; {said}")
    for check in report.checks:
        print(f"{check.name}: {check.verdict}: {check.finding}")
    assert report.ok
    assert said[0].startswith("about ")
    assert took < 10 * SECONDS  # loading twice, and whatever else runs on the cores; without a limit it would be more
    read = [check for check in report.checks if check.section in ("loaded exactly", "reads the right token")]
    assert {check.verdict for check in read} == {"pass"}
    assert report["left padding"].number is not None
    assert report["left padding"].number < 1e-4
    assert report["direction"].number is not None
    assert report["direction"].number > 0.5  # it was trained on rows of this data
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
