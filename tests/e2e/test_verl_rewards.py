"""The reward model inside the real `verl.trainer.main_ppo` (unmodified, CPU), started by `ups-rm train --engine verl`.

The run on two workers of conftest.py, in which an RM worker is killed while it scores, and whose files are compared
with a reward model run by hand; and one whose RM takes too long, which must end in our error and leave no process
behind.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean
from time import time
from typing import Any

import pytest
import torch

from faulty_rms import nan_rm, slow_rm
from tiny_training import BENIGN
from ups_rm.distributed.failures import FAILURE_FILE, read_failure
from ups_rm.tracking.group_log import GroupLogFile, read_group_log
from verl_cpu import command
from verl_runs import OWN_CODE, VerlRun, planned

pytest.importorskip("verl")
pytestmark = pytest.mark.verl

PROMPTS, N = 4, 4
LATE = ["reward_model.timeout_s=20", "reward_model.retries=0"]
BROKEN = {
    "late": (lambda folder, rm: slow_rm(folder, rm, 600.0), "no answer within reward_model.timeout_s=20 s"),
    "nan": (nan_rm, "the RM's logit is nan"),
}
"""Reward models that can't answer: what makes them, and what the error says."""


def group_logs(run: VerlRun) -> list[GroupLogFile]:
    files = sorted((run.folder / "groups").glob("step_*.jsonl"))
    assert [file.name for file in files] == ["step_000001.jsonl", "step_000002.jsonl"]
    return [read_group_log(file) for file in files]


def dumped(run: VerlRun, step: int) -> list[dict[str, Any]]:
    file = run.folder.parent / "dumps" / f"{step}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def by_hand(rm_folder: Path) -> Any:
    """logit(messages) by plain transformers: one conversation at a time, no code of ours."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    rm = AutoModelForTokenClassification.from_pretrained(rm_folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(rm_folder)

    def logit(messages: list[Any]) -> float:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return float(rm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])

    return logit


def test_scores_are_sigmoid_of_minus_the_logit_by_hand(two_workers: VerlRun, by_hand: Any) -> None:
    """In verl's own dumps (which keep the raw logit) and in the group log, reply by reply."""
    for step, log in enumerate(group_logs(two_workers), start=1):
        rows = dumped(two_workers, step)
        assert len(rows) == PROMPTS * N == sum(len(group.samples) for group in log.groups)
        logged = sorted((round(s.logit, 5), s.response) for group in log.groups for s in group.samples)
        assert logged == sorted((round(row["logit"], 5), row["output"]) for row in rows)
        for row in rows:
            assert row["score"] == pytest.approx(row["safe_score"], abs=1e-7)
            assert row["score"] == pytest.approx(1 / (1 + math.exp(row["logit"])), abs=1e-7)
        for group in log.groups:
            for sample in group.samples:
                logit = by_hand([*group.messages, {"role": "assistant", "content": sample.response}])
                assert sample.logit == pytest.approx(logit, abs=2e-5)
                assert sample.safe_score == pytest.approx(1 / (1 + math.exp(logit)), abs=1e-5)


def test_group_logs_recompute_verls_advantages(two_workers: VerlRun) -> None:
    for log in group_logs(two_workers):
        assert log.kl_coef == 0.05
        assert len(log.groups) == PROMPTS
        assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
        for group in log.groups:
            assert len(group.samples) == N
            assert group.kind == ("benign" if group.messages[-1]["content"] in BENIGN else "unsafe")
            for sample in group.samples:  # verl put the score where the reply's reward counts, and KL off every token
                assert sample.reward == pytest.approx(sample.safe_score - 0.05 * sample.kl, abs=1e-6)


def test_verls_tracker_has_our_metrics_beside_its_own(two_workers: VerlRun) -> None:
    metrics = two_workers.metrics
    assert [row["step"] for row in metrics] == [1, 2]
    for row, log in zip(metrics, group_logs(two_workers), strict=True):
        samples = [sample for group in log.groups for sample in group.samples]
        assert row["score/logit_mean"] == pytest.approx(fmean(s.logit for s in samples), abs=1e-5)
        assert row["critic/score/mean"] == pytest.approx(fmean(s.safe_score for s in samples), abs=1e-5)
        assert row["reward/mean"] == pytest.approx(row["critic/rewards/mean"], abs=1e-6)
        assert row["reward/mean"] == pytest.approx(fmean(s.reward for s in samples), abs=1e-5)
        tokens = sum(sample.length for sample in samples)
        assert row["kl/mean"] == pytest.approx(sum(sample.kl for sample in samples) / tokens, abs=1e-6)
        assert row["response/truncated_share"] == pytest.approx(fmean(s.truncated for s in samples))
        assert row["rollout/logprob_gap_max"] < 1e-4
        for name in ("group/zero_std_share", "score/saturated_share", "text/refusal_rate", "score/std"):
            assert 0 <= row[name] <= 1, name
        for name in ("actor/loss", "actor/pg_loss", "actor/grad_norm", "perf/throughput", "timing_s/step"):
            assert name in row, name


def test_a_worker_that_was_killed_is_replaced_and_that_is_said(two_workers: VerlRun) -> None:
    console = (two_workers.folder / "verl" / "console.log").read_text(encoding="utf-8")
    assert re.search(
        r"RM worker \d is started again, its batch goes to an idle one: Actor(Died|Unavailable)Error", console
    )
    assert read_failure(two_workers.folder) is None


@pytest.mark.parametrize("kind", BROKEN)
def test_an_rm_that_cannot_answer_ends_the_run_with_its_error(
    kind: str, tmp_path: Path, policy_folder: Path, rm_folder: Path
) -> None:
    make, reason = BROKEN[kind]
    run = planned(tmp_path, policy_folder, make(tmp_path / "rm", rm_folder), OWN_CODE, *LATE)
    done = command.ups_rm("train", "--engine", "verl", *run.arguments)
    since_noted = time() - (run.folder / FAILURE_FILE).stat().st_mtime
    left = [process.name() for process in command.processes_of(run.folder)]
    assert done.returncode == 2, done.stdout
    assert "the reward model failed on a batch of" in done.stdout
    assert reason in done.stdout
    assert reason in str(read_failure(run.folder))
    assert not list(run.folder.glob("groups/*"))  # nothing was trained on
    assert left == []
    assert since_noted + 20 < 60
