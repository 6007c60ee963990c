"""The checkpoint benchmark in small: both ways write the same, and every figure is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.checkpoint import run
from benchmarks.grpo_step import Case

from tiny import tiny_policy


def test_both_ways_are_measured_on_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_policy(tmp_path / "policy")
    monkeypatch.setattr("ups_rm.models.fetch", lambda: folder)
    step, blocked, cost, beside, size = run(1, Case("tiny", prompts=2, n=3, new_tokens=5))
    assert step.ours > 0
    assert blocked.peer is not None
    assert blocked.peer == cost.peer
    assert blocked.ratio == blocked.peer / blocked.ours
    assert 0 < blocked.ours < beside.ours * step.ours + cost.ours
    assert beside.ours >= 0
    parameters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 4
    assert size.ours * 1e6 == pytest.approx(12 * parameters, rel=0.5)


def test_a_write_that_fails_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ups_rm.errors import RunError

    folder = tiny_policy(tmp_path / "policy")
    monkeypatch.setattr("ups_rm.models.fetch", lambda: folder)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("ups_rm.local.checkpoint.publish_folder", full)
    with pytest.raises(RunError, match="no space left"):
        run(1, Case("tiny", prompts=2, n=3, new_tokens=5))
