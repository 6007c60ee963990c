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
    blocked, wall, size = run(1, Case("tiny", prompts=2, n=3, new_tokens=5))
    assert blocked.peer is not None
    assert 0 < blocked.ours < wall.ours
    assert 0 < blocked.peer < wall.peer
    assert wall.floor is not None
    parameters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 4
    assert size.ours * 1e6 == pytest.approx(12 * parameters, rel=0.5)
