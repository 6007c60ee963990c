"""The step's benchmark in small: both sides run on a tiny policy, and what is compared is the work of the case."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.grpo_step import CASES, Case, LengthScorer, chats, measure, our_step

from tiny import tiny_policy


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tiny_policy(tmp_path / "policy")
    monkeypatch.setattr("ups_rm.models.fetch", lambda: folder)
    return folder


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_our_half_makes_the_replies_of_the_case(tmp_path: Path, policy: Path, lora_rank: int) -> None:
    case = Case("tiny", prompts=2, n=3, new_tokens=5, lora_rank=lora_rank)
    cost = our_step(case, tmp_path, LengthScorer())()
    assert 2 * 3 <= cost.tokens <= 2 * 3 * 5
    assert cost.wall > 0
    assert cost.cpu > 0


def test_trl_and_we_take_turns_on_the_same_work(policy: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    case = Case("tiny", prompts=2, n=3, new_tokens=5)
    wall, cpu, ours, theirs = measure(case, 1, None)
    assert wall.ratio == pytest.approx(wall.peer / wall.ours)
    assert cpu.peer is not None
    assert min(cpu.ours, cpu.peer) > 0
    assert all(2 * 3 <= count.ours <= 2 * 3 * 5 and count.ratio is None for count in (ours, theirs))


def test_prompts_are_distinct_and_enough_for_every_case() -> None:
    for case in CASES:
        texts = [messages[0]["content"] for messages in chats(case)]
        assert len(set(texts)) == len(texts) >= case.prompts
