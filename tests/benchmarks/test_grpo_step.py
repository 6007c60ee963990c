"""The step's benchmark in small: both sides run on a tiny policy, and what is compared is the work of the case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.grpo_step import CASES, Case, LengthScorer, chats, measure, our_step, trl_steps

from benchmarks import machine, step_curve, trl_settings
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
    case = Case("tiny", prompts=2, n=3, new_tokens=5, model=str(policy))  # its process sees no monkeypatch
    wall, cpu, ours, theirs = measure(case, 1, None)
    assert wall.ratio == pytest.approx(wall.peer / wall.ours)
    assert cpu.peer is not None
    assert min(cpu.ours, cpu.peer) > 0
    assert all(2 * 3 <= count.ours <= 2 * 3 * 5 and count.ratio is None for count in (ours, theirs))


def test_trl_asks_the_reward_model_by_its_own_means(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    asked: list[int] = []

    class Watched(trl.GRPOTrainer):  # type: ignore[name-defined,misc]
        def __init__(self, *, reward_funcs: list[Any], **named: Any) -> None:
            assert type(reward_funcs[0]).__name__ == "MyRMForTokenClassification"
            reward_funcs[0].register_forward_hook(lambda model, given, out: asked.append(len(out.logits)))
            super().__init__(reward_funcs=reward_funcs, **named)
            assert self.reward_weights.tolist() == [-1, 0]

    monkeypatch.setattr(trl, "GRPOTrainer", Watched)
    case = Case("tiny", prompts=2, n=3, new_tokens=5, model=str(policy), with_rm=True, peer_scores=True)
    (cost,) = trl_steps(case, tmp_path, LengthScorer(), 1, lambda: None)
    assert asked == [2 * 3] * 2  # replies of a step of warm-up and of one that counts
    assert 2 * 3 <= cost.tokens <= 2 * 3 * 5


def test_prompts_are_distinct_and_enough_for_every_case() -> None:
    for case in CASES:
        texts = [messages[0]["content"] for messages in chats(case)]
        assert len(set(texts)) == len(texts) >= case.prompts


def test_the_curves_of_a_step_have_every_axis_and_a_picture(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_curve, "BASE", Case("tiny", prompts=2, n=2, new_tokens=4))
    for name, points in (("PROMPTS", (1, 2)), ("REPLIES", (2, 3)), ("TOKENS", (3, 4))):
        monkeypatch.setattr(step_curve, name, points)
    sizes = {"one": {"num_hidden_layers": 1}, "wide": {"hidden_size": 128, "num_attention_heads": 8}}
    monkeypatch.setattr(step_curve, "SIZES", sizes)
    found = step_curve.run(1, picture=tmp_path / "step.png")
    assert [result.name.rsplit(" ", 1)[0] for result in found[:2]] == ["GRPO step, 1", "GRPO step, 2"]
    assert len(found) == 8
    assert min(result.ours for result in found) > 0
    assert (tmp_path / "step.png").stat().st_size > 5_000


def test_the_floor_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"body": 10**6, "head": 10**5}
    one, more = (machine.step_floor(400 * k, 2000 * k, 64 * k, **sizes) for k in (1, 4))
    assert 0 < one < more
    monkeypatch.setattr(machine, "flops", lambda dtype: 1e12)
    monkeypatch.setattr(machine, "bandwidth", lambda: 1e13)
    step, with_rm, lora = (
        machine.step_floor(400, 2000, 64, **sizes, **given) for given in ({}, {"with_rm": True}, {"lora": True})
    )
    assert with_rm - step == pytest.approx(2 * 10**6 * 2400 / 1e12)
    assert step - lora == pytest.approx(2 * (10**6 * 2400 + 10**5 * 2000) / 1e12)


def test_trls_settings_are_taken_by_trl(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    case = Case("tiny", prompts=2, n=2, new_tokens=3, model=str(policy))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False}
    monkeypatch.setattr(trl_settings, "BASE", case)
    monkeypatch.setattr(trl_settings, "SETTINGS", {"halves": halves})
    (found,) = trl_settings.run(1)
    assert (found.name, found.ratio) == ("TRL's GRPO step, halves", None)
    assert found.ours > 0
