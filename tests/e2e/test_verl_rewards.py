"""The reward model inside the real `verl.trainer.main_ppo` (unmodified, CPU), started by `ups-rm train --engine verl`.

One run of two steps, in which an RM worker is killed while it scores, and whose files are compared with a reward model
run by hand; and two at the same time that must end in our error and leave no process behind: one whose RM answers nan,
one whose RM takes too long.
"""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import sleep, time
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from faulty_rms import nan_rm, slow_rm
from tiny import tiny_policy, tiny_rm
from ups_rm.distributed.failures import FAILURE_FILE, read_failure
from ups_rm.tracking.group_log import GroupLogFile, read_group_log
from ups_rm.tracking.jsonl import read_metrics
from verl_cpu import command

pytest.importorskip("verl")
pytestmark = pytest.mark.verl

PROMPTS, N, LIMIT = 4, 4, 8
OWN_CODE = "reward_model.model.trust_remote_code=true"
LATE = ["reward_model.timeout_s=20", "reward_model.retries=0", "reward_model.num_workers=1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, `rm` (another tokenizer) and `prompts.parquet`."""
    folder = tmp_path_factory.mktemp("verl")
    tiny_policy(folder / "policy")
    tiny_rm(folder / "rm")
    rows = [
        {
            "data_source": "PKU-SafeRLHF",
            "prompt": [{"role": "user", "content": f"Tell me about the planets, number {i}."}],
            "ability": "safety",
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": i, "prompt_source": "hand-benign" if i % 2 else "hand-unsafe"},
        }
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    return folder


def train(models: Path, rm: Path, out: Path, *changes: str, meanwhile: Any = None) -> Any:
    recipe = {
        "data": {
            "train_files": str(models / "prompts.parquet"),
            "val_files": str(models / "prompts.parquet"),
            "val_max_samples": 4,
            "train_batch_size": PROMPTS,
            "max_prompt_length": 96,
            "max_response_length": LIMIT,
        },
        "actor_rollout_ref": {
            "model": {"path": str(models / "policy")},
            "actor": {
                "ppo_mini_batch_size": PROMPTS,
                "ppo_micro_batch_size_per_gpu": 8,
                "optim": {"lr": 1e-3},
                "fsdp_config": {"dtype": "float32"},
            },
            "rollout": {"n": N},
        },
        "algorithm": {"kl_ctrl": {"kl_coef": 0.05}},
        "reward_model": {
            "model": {"path": str(rm), "dtype": "float32"},
            "num_workers": 2,
            "max_batch_tokens": 600,
            "timeout_s": 120.0,
            "retries": 1,
        },
        "trainer": {
            "total_training_steps": 2,
            "default_local_dir": str(out),
            "logger": ["console"],
            "val_before_train": False,
        },
    }
    file = models / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    more = f",trainer.rollout_data_dir={out}/dumps,actor_rollout_ref.rollout.calculate_log_probs=true]"
    settings = [
        re.sub(r"\]$", more, text) if text.startswith("verl.overrides=") else text for text in command.settings()
    ]
    arguments = ["train", "--engine", "verl", "--recipe", file, *settings, *changes]
    return command.ups_rm(*arguments, "--skip-rm-check", meanwhile=meanwhile)


@pytest.fixture(scope="module")
def run(models: Path) -> Path:
    """The run folder of two steps, validated after the last; the first RM worker that scores is killed in mid-call."""
    out = models / "run"
    killed = []

    def kill_one(process: Any) -> None:
        while not killed and process.poll() is None:
            for worker in command.processes_of(out):
                with suppress(psutil.Error):
                    if worker.name().startswith("ray::RMWorker.score") and not killed:
                        worker.kill()
                        killed.append(worker.pid)
            sleep(0.05)

    slow = slow_rm(models / "slow", models / "rm", 0.5)  # long enough to be caught scoring
    done = train(models, slow, out, OWN_CODE, "trainer.test_freq=2", meanwhile=kill_one)
    assert done.returncode == 0, done.stdout
    assert killed
    return out


def group_logs(run: Path) -> list[GroupLogFile]:
    files = sorted((run / "groups").glob("step_*.jsonl"))
    assert [file.name for file in files] == ["step_000001.jsonl", "step_000002.jsonl"]
    return [read_group_log(file) for file in files]


def dumped(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "dumps" / f"{step}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def by_hand(models: Path) -> Any:
    """logit(messages) by plain transformers: one conversation at a time, no code of ours."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    rm = AutoModelForTokenClassification.from_pretrained(
        models / "rm", trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "rm")

    def logit(messages: list[Any]) -> float:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return float(rm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])

    return logit


def test_scores_are_sigmoid_of_minus_the_logit_by_hand(run: Path, by_hand: Any) -> None:
    """In verl's own dumps (which keep the raw logit) and in the group log, reply by reply."""
    for step, log in enumerate(group_logs(run), start=1):
        rows = dumped(run, step)
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


def test_group_logs_recompute_verls_advantages(run: Path) -> None:
    for log in group_logs(run):
        assert log.kl_coef == 0.05
        assert len(log.groups) == PROMPTS
        assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
        for group in log.groups:
            assert len(group.samples) == N
            assert group.kind == ("benign" if int(group.messages[0]["content"][-2]) % 2 else "unsafe")
            for sample in group.samples:  # verl put the score where the reply's reward counts, and KL off every token
                assert sample.reward == pytest.approx(sample.safe_score - 0.05 * sample.kl, abs=1e-6)


def test_verls_tracker_has_our_metrics_beside_its_own(run: Path) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row, log in zip(metrics, group_logs(run), strict=True):
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
    assert {"val-aux/benign/reward/mean@1", "val-aux/unsafe/refusal_rate"} <= metrics[-1].keys()


def test_a_worker_that_was_killed_is_replaced_and_that_is_said(run: Path) -> None:
    console = (run / "verl" / "console.log").read_text(encoding="utf-8")
    assert re.search(
        r"RM worker \d is started again, its batch goes to an idle one: Actor(Died|Unavailable)Error", console
    )
    assert read_failure(run) is None


@dataclass(frozen=True)
class Failed:
    """How a run with a faulty RM ended."""

    out: Path
    printed: str
    code: int
    seconds: float
    """From the moment when the failure was noted to the end of the command."""
    left: list[str]


@pytest.fixture(scope="module")
def failed(models: Path) -> dict[str, Failed]:
    """Two runs at the same time on one machine, each with a Ray of its own."""
    runs = {
        "nan": (nan_rm(models / "nan", models / "rm"), []),
        "late": (slow_rm(models / "late", models / "rm", 600.0), [OWN_CODE, *LATE]),
    }

    def end(name: str) -> Failed:
        out, (rm, changes) = models / f"run-{name}", runs[name]
        done = train(models, rm, out, *changes)
        noted = (out / FAILURE_FILE).stat().st_mtime
        left = [process.name() for process in command.processes_of(out)]
        return Failed(out, done.stdout, done.returncode, time() - noted, left)

    with ThreadPoolExecutor(len(runs)) as threads:
        return dict(zip(runs, threads.map(end, runs), strict=True))


@pytest.mark.parametrize(
    ("name", "message", "lasts"),
    [("nan", "the RM's logit is nan", 0.0), ("late", "no answer within reward_model.timeout_s=20 s", 20.0)],
)
def test_a_faulty_rm_ends_the_run_with_its_error(
    name: str, message: str, lasts: float, failed: dict[str, Failed]
) -> None:
    run = failed[name]
    assert run.code == 2, run.printed
    assert "the reward model failed on a batch of" in run.printed
    assert message in run.printed
    assert message in str(read_failure(run.out))
    assert not list(run.out.glob("groups/*"))  # nothing was trained on
    assert run.left == []
    assert run.seconds + lasts < 60
