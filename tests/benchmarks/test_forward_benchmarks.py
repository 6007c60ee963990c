"""The benchmarks of rollout and RM scoring in small: both sides do the same work and are counted alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rm_features, rm_scoring, rollout
from tiny import tiny_policy, tiny_rm


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tiny_policy(tmp_path / "policy")
    monkeypatch.setattr("ups_rm.models.fetch", lambda: folder)
    return folder


@pytest.mark.parametrize("early", [False, True])
def test_both_sides_of_the_rollout_make_the_tokens_of_the_case(policy: Path, monkeypatch: Any, early: bool) -> None:
    monkeypatch.setattr(rollout, "ENDS", tuple("etaoin"))
    ours, plain, floor = rollout.sides(case := rollout.Case("float32", early, prompts=3, n=40, new_tokens=6))
    made, most = [side(0) for side in (ours, plain)], 3 * 40 * 6
    assert floor > 0
    if early:
        assert all(3 * 40 < count < most for count in made)
        assert made[0] == pytest.approx(made[1], rel=0.3)  # the same distribution of lengths
    else:
        assert made == [most, most]
        assert all(one.ratio > 0 for one in rollout.measure(case, 1))


def test_all_scorers_score_the_same_conversations_alike(tmp_path: Path) -> None:
    talks = rm_scoring.conversations(3, 4)
    found = rm_scoring.measure("tiny", tiny_rm(tmp_path / "rm"), talks, 1)
    speeds = [one for one in found if one.unit in rm_scoring.UNITS]
    assert [one.peer_name for one in speeds[::2]] == [peer.name for peer in rm_scoring.peers()]
    assert all(one.ratio > 0 for one in speeds)
    assert [one.floor is not None and one.floor > 0 for one in speeds] == [True, False] * 2
    differences = [one.ours for one in found if one.unit == "logit"]
    assert len(differences) == 2
    assert max(differences) < 0.3  # bf16 against fp32 on weights this wide


def test_features_are_those_of_plain_transformers(policy: Path, monkeypatch: Any) -> None:
    found = rm_features.run(1, rows=3)
    assert [one.peer_name for one in found] == [peer.name for peer in rm_scoring.peers()]
    assert all(one.ratio is not None and one.ratio > 0 for one in found)
    other = rm_features.plain_states

    def wrong(*given: Any) -> Any:
        states = other(*given)
        return lambda: states().flip(0)

    monkeypatch.setattr(rm_features, "plain_states", wrong)
    with pytest.raises(RuntimeError, match="other work"):
        rm_features.run(1, rows=3)
