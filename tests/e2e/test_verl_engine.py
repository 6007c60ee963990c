"""The recipe on stock verl: the real `verl.trainer.main_ppo`, through the project's own command, on the CPU.

Two runs, shared by all tests: two steps on one worker by `ups-rm run`, interrupted in its second step and gone on with
by the same command, and two steps on two FSDP2 workers by `ups-rm train`. What verl sampled is replayed through the
local engine, which runs through.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from tiny_training import base_overrides, recipe_yaml
from ups_rm.data.batches import prompt_batches
from ups_rm.data.prompts import read_prompts
from ups_rm.local.rollout import encode_prompts
from ups_rm.local.step_metrics import StepRecord, step_metrics
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics
from verl_cpu import command

pytest.importorskip("verl", reason="verl is an extra")
pytestmark = pytest.mark.verl
STEPS = 2


@dataclass(frozen=True)
class VerlRun:
    """A run: its folder, what each start of its command sampled, and the recipe settings without those of the shims."""

    folder: Path
    dumps: list[Path]
    given: list[str]
    file: Path
    arguments: list[str | Path]

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.file, self.given)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")


def planned(folder: Path, policy: Path, rm: Path, *, verb: str, workers: int) -> VerlRun:
    given = [
        *base_overrides(folder, policy),
        f"reward_model.model.path={rm}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=1",
        "trainer.logger=[console]",
        "algorithm.kl_ctrl.kl_coef=0.05",
        *(f"actor_rollout_ref.{part}.log_prob_micro_batch_size_per_gpu=8" for part in ("rollout", "ref")),
        # AdamW's first step is lr * g / (|g| + 1e-8): where g is rounding, a larger lr would show it in the weights
        # (1e-4 did on a machine that sampled other replies)
        "actor_rollout_ref.actor.optim.lr=2e-5",
        *(f"evaluation.{key}" for key in ("max_unsafe_prompts=2", "max_benign_prompts=2", "n=1", "max_new_tokens=4")),
    ]
    file, data = recipe_yaml(folder), ["--train-data", folder / "train.parquet", "--val-data", folder / "val.parquet"]
    arguments = [verb, "--engine", "verl", "--recipe", file, *data, *given, *command.settings(workers)]
    dumps = [folder / f"dump_{start}.jsonl" for start in range(2 if verb == "run" else 1)]
    return VerlRun(folder / "run", dumps, given, file, [*arguments, "--skip-rm-check"])


@dataclass(frozen=True)
class Interrupted:
    """How a start of the command ended that got a Ctrl-C."""

    printed: str
    code: int
    seconds: float
    """From the signal to the end of the command."""
    left: list[str]
    found: list[str]
    """What stood in the run folder after it."""


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, rm_folder: Path
) -> tuple[VerlRun, Interrupted]:
    """The run on one worker, after a Ctrl-C while the replies of step 2 are sampled."""
    run = planned(tmp_path_factory.mktemp("one"), policy_folder, rm_folder, verb="run", workers=1)
    asked_at = 0.0

    def ctrl_c(process: subprocess.Popen[str]) -> None:
        nonlocal asked_at
        while process.poll() is None and not replies_with(run.dumps[0], weights=1):
            sleep(0.1)
        asked_at = monotonic()
        process.send_signal(signal.SIGINT)

    done = command.ups_rm(*run.arguments, dump=run.dumps[0], hold=1, meanwhile=ctrl_c)
    seconds, left = monotonic() - asked_at, [process.name() for process in command.processes_of(run.folder)]
    found = sorted(entry.name for entry in run.folder.iterdir())
    return run, Interrupted(done.stdout, done.returncode, seconds, left, found)


@pytest.fixture(scope="module")
def one_worker(interrupted: tuple[VerlRun, Interrupted]) -> VerlRun:
    """The same command again."""
    run, _ = interrupted
    done = command.ups_rm(*run.arguments, dump=run.dumps[1])
    assert done.returncode == 0, done.stdout[-5000:]
    return run


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, rm_folder: Path) -> VerlRun:
    run = planned(tmp_path_factory.mktemp("two"), policy_folder, rm_folder, verb="train", workers=2)
    done = command.ups_rm(*run.arguments, dump=run.dumps[0])
    assert done.returncode == 0, done.stdout[-5000:]
    return run


RUNS = pytest.mark.parametrize("name", ["one_worker", "two_workers"])


def test_the_run_folder_is_the_local_engines(one_worker: VerlRun) -> None:
    folder = one_worker.folder
    expected = {"metrics.jsonl", "recipe.yaml", "policy", "groups", "eval", "summary.json", "train_result.json"}
    assert expected <= {entry.name for entry in folder.iterdir()}
    assert [row["step"] for row in one_worker.metrics] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    assert json.loads((folder / "train_result.json").read_text())["steps"] == STEPS
    assert [file.name for file in sorted((folder / "groups").iterdir())] == ["step_000001.jsonl", "step_000002.jsonl"]


def test_metrics_have_the_local_engines_names(one_worker: VerlRun, replays: dict[Path, Any]) -> None:
    """And, where they say how the training goes, its values; verl measures two of them otherwise (docs/guides/verl.md),
    and has no time of scoring alone, since it scores while others still generate."""
    otherwise = {"prompt_length/clip_ratio", "response/aborted_ratio"}
    records, _ = replayed(one_worker, replays)
    for number, (record, theirs) in enumerate(zip(records, one_worker.metrics, strict=True), start=1):
        ours = step_metrics(record, one_worker.recipe, number=number, epoch=0.0, kl_coef=0.05)
        assert set(ours) - set(theirs) == {"timing_s/reward"}
        for name in set(ours) - otherwise:
            if name.startswith(("critic/", "reward/", "score/", "kl/", "group/", "text/", "response", "prompt")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5, nan_ok=True), name


# ---- parity with the local engine


Replies = dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]]
"""By prompt, in the order of sampling: (tokens, log-probabilities as sampled)."""


def replies_with(dump: Path, *, weights: int) -> Replies:
    """What was sampled with the weights of that step; the last line may still be on its way."""
    replies: Replies = defaultdict(list)
    text = dump.read_text() if dump.is_file() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = json.loads(line)
        if row["weights"] == weights:
            replies[tuple(row["prompt"])].append((torch.tensor(row["tokens"]), torch.tensor(row["logprobs"])))
    return replies


def sampled(run: VerlRun, step: int) -> Replies:
    """The replies that a step was made of: those of the last start that came to it."""
    return next(found for dump in reversed(run.dumps) if (found := replies_with(dump, weights=step - 1)))


@pytest.fixture(scope="module")
def replays() -> dict[Path, tuple[list[StepRecord], list[dict[str, torch.Tensor]]]]:
    return {}


def replayed(run: VerlRun, cache: dict[Path, Any]) -> tuple[list[StepRecord], list[dict[str, torch.Tensor]]]:
    """What verl sampled, through the local engine: a record per step, and the weights after each."""
    if run.folder in cache:
        return cache[run.folder]
    trainer = Trainer(run.recipe)
    batches = prompt_batches(trainer.train_rows, run.recipe.data)
    records, weights = [], []
    for step in range(1, STEPS + 1):
        prompts, replies = next(batches), sampled(run, step)
        messages = [row.messages for row in prompts]
        ids = encode_prompts(trainer.policy.tokenizer, messages)
        assert set(replies) == {tuple(row) for row in ids}, "verl saw other prompts than the local engine would"
        rows = [reply for row in ids for reply in replies[tuple(row)]]
        n = run.recipe.actor_rollout_ref.rollout.n
        assert len(rows) == n * len(prompts)
        rollout = trainer.engine._pack(messages, ids, rows, n)
        trainer._rollout = lambda prompts, number, rollout=rollout: rollout  # type: ignore[method-assign]
        records.append(trainer.step(prompts, step))
        weights.append({name: value.detach().clone() for name, value in trainer.policy.model.state_dict().items()})
    cache[run.folder] = records, weights
    return cache[run.folder]


@RUNS
def test_the_same_rollouts_give_the_same_numbers(
    name: str, request: pytest.FixtureRequest, replays: dict[Path, Any]
) -> None:
    run = request.getfixturevalue(name)
    records, _ = replayed(run, replays)
    for record, theirs in zip(records, run.metrics, strict=True):
        scores, rewards = record.token_level_scores.sum(1), record.token_level_rewards.sum(1)
        mask = record.rollout.sequences.response_mask
        advantages = record.advantages[mask.bool()]
        ours = {
            "critic/score/mean": scores.mean(), "critic/score/max": scores.max(), "critic/score/min": scores.min(),
            "critic/rewards/mean": rewards.mean(), "critic/rewards/max": rewards.max(),
            "critic/rewards/min": rewards.min(), "critic/advantages/max": advantages.max(),
            "critic/advantages/min": advantages.min(), "response_length/mean": mask.sum(1).float().mean(),
            "actor/pg_loss": record.update["actor/pg_loss"], "actor/grad_norm": record.update["actor/grad_norm"],
            "actor/reward_kl_penalty": ((record.kl * mask).sum(1) / mask.sum(1)).mean(),
        }  # fmt: skip
        for metric, value in ours.items():
            assert theirs[metric] == pytest.approx(float(value), rel=1e-4, abs=1e-6), metric
    assert float(records[1].kl.abs().max()) > 2e-5, "the KL of step 2 shows nothing if it is 0"


@RUNS
def test_every_reply_has_the_same_score_reward_and_advantage(
    name: str, request: pytest.FixtureRequest, replays: dict[Path, Any]
) -> None:
    """By the group log, reply by reply; and its advantages recompute."""
    run = request.getfixturevalue(name)
    for step, record in enumerate(replayed(run, replays)[0], start=1):
        log = read_group_log(run.folder / "groups" / f"step_{step:06d}.jsonl")
        theirs = sorted(
            (group.prompt_id, s.response, s.logit, s.safe_score, s.reward, s.advantage, s.kl)
            for group in log.groups
            for s in group.samples
        )
        prompt_ids = [row.index for row in record.prompts for _ in range(4)]
        first = record.advantages[:, 0]
        columns = (
            record.token_level_rewards.sum(1),
            first,
            (record.kl * record.rollout.sequences.response_mask).sum(1),
        )
        ours = sorted(
            (prompt_id, text, score.logit, score.safe_score, *numbers)
            for prompt_id, text, score, *numbers in zip(
                prompt_ids, record.rollout.texts, record.scores, *(column.tolist() for column in columns), strict=True
            )
        )
        assert [row[:2] for row in theirs] == [row[:2] for row in ours]
        torch.testing.assert_close(
            torch.tensor([row[2:] for row in theirs]), torch.tensor([row[2:] for row in ours]), rtol=1e-4, atol=1e-5
        )
        for group, advantages in zip(log.groups, log.recompute_advantages(), strict=True):
            assert advantages == pytest.approx([sample.advantage for sample in group.samples], rel=1e-5, abs=1e-6)


@RUNS
def test_a_step_leads_to_the_same_weights(name: str, request: pytest.FixtureRequest, replays: dict[Path, Any]) -> None:
    """verl's sharded checkpoints, put together in float32 without its merger."""
    run = request.getfixturevalue(name)
    for step, weights in enumerate(replayed(run, replays)[1], start=1):
        theirs = checkpoint_weights(run.folder / f"global_step_{step}" / "actor")
        assert theirs.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-5, msg=f"step {step}: {key}")
    start = torch.nn.utils.parameters_to_vector(Trainer(run.recipe).policy.model.parameters())
    moved = torch.cat([value.flatten() for value in weights.values()])[: len(start)]
    assert len(moved) == len(start)
    assert float((moved - start).abs().max()) > 1e-5, "nothing was learned"


def checkpoint_weights(actor: Path) -> dict[str, torch.Tensor]:
    """All shards of a checkpoint that this test made itself, joined on their first dimension."""
    files = sorted(actor.glob("model_world_size_*_rank_*.pt"), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
    shards = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    joined = {}
    for key in shards[0]:
        parts = [getattr(shard[key], "_local_tensor", shard[key]) for shard in shards]
        joined[key] = torch.cat(parts) if hasattr(shards[0][key], "_local_tensor") else parts[0]
    return joined


# ---- resume and export


def test_ctrl_c_ends_verl_with_its_checkpoint_named_and_no_process_left(
    interrupted: tuple[VerlRun, Interrupted],
) -> None:
    run, end = interrupted
    assert end.code == 130, end.printed
    assert f"the same command goes on from {run.folder / 'global_step_1'}" in end.printed
    assert end.left == []
    assert end.seconds < 60
    assert {"global_step_1", "metrics.jsonl"} <= set(end.found)
    assert not {"global_step_2", "policy", "eval", "summary.json"} & set(end.found)


def test_the_same_command_goes_on_at_the_right_step_with_the_right_prompts(one_worker: VerlRun) -> None:
    """That weights, optimizer and schedule are the right ones too is seen by the replay above, which ran through."""
    assert [row["step"] for row in one_worker.metrics] == [1, 2]
    first, second = one_worker.dumps
    assert replies_with(second, weights=0) == {}, "step 1 was done again"
    again = replies_with(second, weights=1)
    cut_short = replies_with(first, weights=1)
    assert cut_short, "the run was interrupted too early to see what step 2 began with"
    assert not cut_short.keys() & replies_with(first, weights=0).keys()
    for prompt, replies in cut_short.items():
        for (tokens, _), (same, _) in zip(replies, again[prompt][: len(replies)], strict=True):
            assert tokens.tolist() == same.tolist()


@RUNS
def test_the_exported_policy_loads_in_plain_transformers(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = request.getfixturevalue(name)
    model, loading = AutoModelForCausalLM.from_pretrained(
        run.folder / "policy", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    trained = checkpoint_weights(run.folder / f"global_step_{STEPS}" / "actor")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[key].bfloat16().float(), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "policy")
    prompt = read_prompts(run.folder.parent / "train.parquet")[0].messages
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert model.generate(torch.tensor([ids]), max_new_tokens=2).shape[1] > len(ids)


def test_a_finished_run_is_not_overwritten(one_worker: VerlRun) -> None:
    anew = ["train", "--engine", "verl", "--recipe", one_worker.file, *one_worker.given, *command.settings()]
    done = command.ups_rm(*anew, "--resume", "never", "--skip-rm-check")
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stdout
    assert (one_worker.folder / "policy").is_dir()
