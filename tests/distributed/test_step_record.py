"""What our verl trainer reads out of a step: the local engine's metrics, and groups whose advantages recompute."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ups_rm.distributed.step_record import (
    StepRecord,
    check_scores,
    read_step,
    step_groups,
    step_metrics,
    validation_metrics,
)
from ups_rm.errors import RunError
from ups_rm.reward.scorer import safe_score
from ups_rm.tracking.group_log import GroupLog, read_group_log

pytest.importorskip("verl")
pytestmark = pytest.mark.verl

P, N, LIMIT, KL_COEF = 5, 4, 9, 0.05


class Words:
    """A tokenizer of which only `decode` and the end token are needed: id 0 ends, id k is the word "w{k}", or a refusal
    where it begins the reply and k is even."""

    eos_token_id = 0

    def decode(self, ids: torch.Tensor, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        words = " ".join(f"w{int(i)}" for i in ids if int(i) != 0)
        return f"I can't help with {words}" if int(ids[0]) % 2 == 0 else words


def rows_of_a_step(seed: int) -> tuple[Any, list[str], list[dict[str, Any]]]:
    """A step as verl's TransferQueue gives it, in a shuffled order and with two padding rows; advantages by verl."""
    import numpy as np
    from tensordict import NonTensorStack, TensorDict
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(P * N, generator=draw).tolist()
    columns: dict[str, list[Any]] = {}
    keys, tags = [], []
    for i in order:
        length = int(torch.randint(1, LIMIT + 1, (1,), generator=draw))
        response = torch.randint(1, 50, (length,), generator=draw)
        if length < LIMIT or i % 2:
            response[-1] = 0  # ends by itself; else cut at the limit
        logit = float(torch.randn(1, generator=draw))
        scores = torch.zeros(length)
        scores[-1] = safe_score(logit)
        logprobs = -torch.rand(3, length, generator=draw)
        extra = {"logit": logit, "safe_score": safe_score(logit), "rm_tokens": 7.0, "rm_truncated": float(i == 3)}
        extra |= {"refusal": float(i % 3 == 0), "benign": float(i // N % 2)}
        row = {
            "uid": f"uid{i // N}",
            "prompts": torch.randint(1, 50, (3 + i // N,), generator=draw),
            "responses": response,
            "response_mask": torch.ones(length, dtype=torch.long),
            "rm_scores": scores,
            "token_level_rewards": scores - KL_COEF * (logprobs[0] - logprobs[1]),
            "old_log_probs": logprobs[0],
            "ref_log_prob": logprobs[1],
            "rollout_log_probs": logprobs[0] + 0.01,
            "raw_prompt": [{"role": "user", "content": f"prompt {i // N}"}],
            "extra_info": {
                "index": 100 + i // N,
                "kind": "benign" if i // N % 2 else "unsafe",
                "row": json.dumps({"categories": [f"harm {i // N}"]} if i // N else {}),
            },
            "extra_fields": {"reward_extra_info": extra},
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        keys.append(f"uid{i // N}_{i % N}_0")
        tags.append({})
    pad = lambda name: torch.nn.utils.rnn.pad_sequence(columns[name], batch_first=True)  # noqa: E731
    advantages, _ = compute_grpo_outcome_advantage(
        pad("token_level_rewards"), pad("response_mask"), np.array(columns["uid"], dtype=object)
    )
    columns["advantages"] = [row[: len(ids)] for row, ids in zip(advantages, columns["responses"], strict=True)]
    for values in columns.values():  # what verl appends where a batch can't be divided
        values += [values[0]] * 2
    keys += ["pad_0_0", "pad_1_0"]
    tags += [{"is_padding": True}] * 2
    made = {
        name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
        if isinstance(values[0], torch.Tensor)
        else NonTensorStack(*values)
        for name, values in columns.items()
    }
    return TensorDict(made, batch_size=len(keys)), keys, tags


def record_of(seed: int) -> StepRecord:
    return read_step(*rows_of_a_step(seed), Words(), limit=LIMIT, kl_estimator="kl")


@pytest.mark.parametrize("seed", range(5))
def test_the_group_log_recomputes_verls_advantages_bit_for_bit(seed: int, tmp_path: Path) -> None:
    record = record_of(seed)
    log = GroupLog(tmp_path, kl_coef=KL_COEF)
    written = log.write(1, step_groups(record))
    assert written is not None
    file = read_group_log(written)
    assert [group.prompt_id for group in file.groups] == [100 + i for i in range(P)]
    assert file.recompute_advantages() == [[s.advantage for s in group.samples] for group in file.groups]
    for group in file.groups:
        assert group.messages == [{"role": "user", "content": f"prompt {group.prompt_id - 100}"}]
        assert group.kind == ("benign" if (group.prompt_id - 100) % 2 else "unsafe")
        assert group.categories == ([f"harm {group.prompt_id - 100}"] if group.prompt_id > 100 else [])
        for sample in group.samples:
            assert sample.safe_score == safe_score(sample.logit)
            assert sample.reward == pytest.approx(sample.safe_score - KL_COEF * sample.kl, abs=1e-6)
            assert sample.truncated == (len(re.findall(r"\bw\d+", sample.response)) == LIMIT)


def test_padding_rows_are_left_out_and_metrics_are_those_of_the_replies() -> None:
    record = record_of(0)
    assert len(record.keys) == P * N
    assert not any(key.startswith("pad") for key in record.keys)
    metrics = step_metrics(record, max_prompt_length=20, max_response_length=LIMIT)
    logits = torch.tensor([extra["logit"] for extra in record.extras], dtype=torch.float64)
    assert metrics["score/logit_mean"] == pytest.approx(float(logits.mean()), abs=1e-6)
    assert metrics["critic/score/mean"] == pytest.approx(float(torch.sigmoid(-logits).mean()), abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(float(record.token_level_rewards.sum(1).mean()), abs=1e-6)
    kl = torch.cat([row[mask.bool()] for row, mask in zip(record.kl, record.response_mask, strict=True)])  # type: ignore[arg-type]
    assert metrics["kl/mean"] == pytest.approx(float(kl.mean()), abs=1e-6)
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(0.01, abs=1e-6)
    rows, _, tags = rows_of_a_step(0)
    sampled = [row for row, tag in zip(rows["rollout_log_probs"].unbind(), tags, strict=True) if not tag]
    assert metrics["rollout/entropy"] == pytest.approx(-float(torch.cat(sampled).mean()), abs=1e-6)
    refusals = [text.startswith("I can't") for text in record.texts]
    assert 0 < sum(refusals) < 20
    assert metrics["text/refusal_rate"] == pytest.approx(sum(refusals) / 20)
    assert metrics["score/rm_truncated_share"] == pytest.approx(1 / 20)
    assert metrics["response/truncated_share"] == pytest.approx(sum(record.truncated) / 20)
    assert metrics["group/zero_std_share"] == 0


MISPLACED = {
    "one token early": lambda scores: scores.roll(-1, dims=1),
    "on every token": lambda scores: scores.sum(1, keepdim=True).expand_as(scores),
    "sigmoid after placing": lambda scores: torch.where(scores == 0, 0.5, scores),
    "another reply's": lambda scores: scores.roll(1, dims=0),
}


@pytest.mark.parametrize("change", MISPLACED.values(), ids=MISPLACED.keys())
def test_a_score_that_is_not_on_the_last_token_alone_ends_the_run(change: Any) -> None:
    record = record_of(1)
    check_scores(record)
    with pytest.raises(RunError, match=r"of 20 replies do not carry their safe score on the last token alone"):
        check_scores(replace(record, token_level_scores=change(record.token_level_scores)))


def test_held_out_replies_are_split_by_kind() -> None:
    extras = {"benign": [0.0, 1.0, 1.0, 0.0], "refusal": [1.0, 0.0, 1.0, 0.0], "length": [4.0, 8.0, 6.0, 2.0]}
    extras |= {"repetition": [0.0, 0.0, 0.5, 0.5], "prompt_overlap": [0.0, 0.0, 0.0, 1.0]}
    assert validation_metrics([0.1, 0.2, 0.4, 0.5], extras, n=2) == pytest.approx(
        {
            "val-aux/unsafe/reward/mean@2": 0.3,
            "val-aux/unsafe/refusal_rate": 0.5,
            "val-aux/benign/reward/mean@2": 0.3,
            "val-aux/benign/refusal_rate": 0.5,
            "val-aux/benign/prompts": 1.0,
            "val-aux/refusal_rate": 0.5,
            "val-aux/response_length/mean": 5.0,
            "val-aux/repetition": 0.25,
            "val-aux/prompt_overlap": 0.25,
        }
    )
