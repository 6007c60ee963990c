"""The whole way with the real SmolLM2-135M-Instruct as policy and backbone, cut down to a few rows and two steps."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_training import command
from ups_rm.data.prompts import encode_prompts
from ups_rm.data.sample import sample_root
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.models import fetch
from ups_rm.recipe import load_recipe
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Message

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
RUN = Path("runs/ups-rm/quickstart")


def few_rows(folder: Path) -> Path:
    """A small folder in PKU-SafeRLHF layout: rows of unsafe and of harmless prompts from the sample, both splits."""
    for split, per_kind in (("train", 24), ("test", 8)):
        files = sorted((sample_root() / "data").glob(f"*/{split}.jsonl"))
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        kinds = ([line for line in lines if f'/{kind}"' in line] for kind in ("unsafe", "benign"))
        rows = [line for kind in kinds for line in islice(kind, per_kind)]
        assert len(rows) == 2 * per_kind
        target = folder / "data" / "Alpaca-7B" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def whole_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ups-rm run` in a new folder, two steps."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("POLICY_MODEL_PATH", "REWARD_MODEL_PATH", "TRAIN_DATA", "VAL_DATA", "OUTPUT_DIR", "ENGINE", "FRESH"):
        monkeypatch.delenv(name, raising=False)
    code = command(
        "run", f"prepare.source={few_rows(folder / 'rows')}", "trainer.total_training_steps=2",
        "data.max_response_length=24", "evaluation.max_unsafe_prompts=4", "evaluation.max_benign_prompts=4",
        "evaluation.max_new_tokens=24", "evaluation.n=1", "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=3",
    )  # fmt: skip
    assert code == 0


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a first run."""
    folder = tmp_path_factory.mktemp("whole") / "first"
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole_way(folder, monkeypatch)
    return folder / RUN


def test_the_same_command_twice_gives_the_same_numbers(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RM, training and evaluation are made anew in another folder: every metric, reply and figure is equal."""
    whole_way(tmp_path / "second", monkeypatch)
    second = tmp_path / "second" / RUN

    def numbers(run: Path) -> tuple[Any, ...]:
        metrics = [
            {name: value for name, value in row.items() if not name.startswith(("time", "timing", "perf"))}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        summary = json.loads((run / "summary.json").read_text())
        summary.pop("seconds")
        groups = [file.read_text() for file in sorted((run / "groups").glob("step_*.jsonl"))]
        return metrics, summary, groups, (run / "eval" / "pairs.jsonl").read_text()

    assert numbers(first) == numbers(second)


def test_two_steps_of_the_whole_way(first: Path) -> None:
    model = fetch()
    summary = json.loads((first / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["safe_score"]["n"] == 8
    assert 0 < summary["safe_score"]["before"] < 1
    rows = read_metrics(first / "metrics.jsonl")
    assert rows[0]["kl/mean"] == pytest.approx(0, abs=0.02)  # bf16 where the machine has it
    assert rows[0]["rollout/logprob_gap_mean"] < 0.1
    assert any(row["actor/grad_norm"] > 0 for row in rows)
    replies = [sample.response for group in read_group_log(first / "groups/step_000001.jsonl").groups
               for sample in group.samples]  # fmt: skip
    assert len(set(replies)) > len(replies) // 2
    words = [word for reply in replies for word in reply.split()]
    assert sum(word.isascii() for word in words) > 0.9 * len(words)
    after, before = AutoModelForCausalLM.from_pretrained(first / "policy"), AutoModelForCausalLM.from_pretrained(model)
    moved = [(p - q).abs().max().item() for p, q in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-2
    assert after.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(first / "policy")
    for text in ("What is the capital of France?", "How do I bake bread?"):
        question = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            old, new = (policy(input_ids=ids).logits[0, -1].log_softmax(-1) for policy in (before, after))
        kl = (old.exp() * (old - new)).sum()  # of the first token, nats; two steps of a sound run: 0.05 to 0.08
        assert kl < 0.2, "two small steps leave the policy what it was"


def test_the_fast_path_is_transformers_on_the_real_model_in_fp32() -> None:
    """Log-probabilities of replies of several lengths, and greedy tokens."""
    override = "actor_rollout_ref.actor.fsdp_config.dtype=float32"
    policy = Policy.load(load_recipe("quickstart", [override, "trainer.device=cpu"]), trainable=False)
    texts = ("What is the capital of France?", "Explain in two sentences how bread is baked, and why it rises.", "Hi")
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    rollout = RolloutEngine(policy).generate(chats, n=2, max_new_tokens=24, sampling=Sampling(seed=4))
    with torch.no_grad():
        fast, plain = (found(rollout.sequences, 1.0)[0] for found in (policy.response_logprobs, policy.plain_logprobs))
    mask = rollout.sequences.response_mask.bool()
    torch.testing.assert_close(fast[mask], plain[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(fast[mask], rollout.rollout_logprobs[mask], atol=1e-4, rtol=0)
    greedy = RolloutEngine(policy).generate(chats, n=1, max_new_tokens=24, sampling=Sampling(temperature=0.0))
    for row, ids in enumerate(encode_prompts(policy.tokenizer, chats)):
        with torch.no_grad():
            expected = policy.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=24,
                do_sample=False, eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id,
            )[0, len(ids):]  # fmt: skip
        length = int(greedy.sequences.response_mask[row].sum())
        assert greedy.sequences.responses[row, :length].tolist() == expected.tolist()
