"""The recipe on stock verl: the real `verl.trainer.main_ppo`, through the project's own commands, on the CPU.

Two runs (conftest.py), shared with test_verl_rewards.py: two steps on one worker by the project's script, interrupted
in the second step and gone on with by the same command; and two steps on two FSDP2 workers by `ups-rm train`. What
verl sampled is replayed through the local engine, which runs through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ups_rm.data.prompts import read_prompts
from ups_rm.monitor.limits import LIMITS, Alarms
from ups_rm.monitor.watch import read_alarms
from ups_rm.report import read_run
from ups_rm.tracking.group_log import read_group_log
from verl_cpu import command
from verl_runs import STEPS, Interrupted, Replay, VerlRun, checkpoint_weights, replies_with

pytest.importorskip("verl", reason="verl is an extra")
pytestmark = pytest.mark.verl
LOCAL_ONLY = {"group/flat_share", "group/masked_share", "group/resampled"}
"""Of `algorithm.zero_std_groups`, which verl does not have."""


def test_the_script_leaves_the_local_engines_run_folder(one_worker: VerlRun) -> None:
    folder = one_worker.folder
    expected = {"metrics.jsonl", "recipe.yaml", "policy", "groups", "eval", "summary.json", "train_result.json"}
    assert expected <= {entry.name for entry in folder.iterdir()}
    assert [row["step"] for row in one_worker.metrics] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    assert json.loads((folder / "train_result.json").read_text())["steps"] == STEPS
    logs = sorted((folder / "groups").glob("step_*.jsonl"))
    assert [file.name for file in logs] == ["step_000001.jsonl", "step_000002.jsonl"]
    assert {"comparison.json", "pairs.jsonl"} <= {entry.name for entry in (folder / "eval").iterdir()}


def test_the_run_ends_with_the_report_of_a_local_one(one_worker: VerlRun) -> None:
    folder = one_worker.folder
    assert (folder / "report.html").stat().st_size > 50_000
    run = read_run(folder)
    assert run["problems"] == []
    assert run["finished"]
    assert run["made_with"]["engine"] == "verl"
    summary = json.loads((folder / "summary.json").read_text())
    assert run["outcome"]["score"]["after"] == pytest.approx(summary["safe_score"]["after"], rel=1e-4)
    shown = run["metrics"]["series"]["critic/score/mean"]
    assert shown == pytest.approx([row["critic/score/mean"] for row in one_worker.metrics], rel=1e-4)
    for step, group_step in enumerate(run["groups"]["steps"], start=1):
        log = read_group_log(folder / "groups" / f"step_{step:06d}.jsonl")
        assert len(group_step["groups"]) == len(log.groups)


def test_metrics_have_the_local_engines_names_and_values(run: VerlRun, replay: Replay) -> None:
    """Values: of all that says how the training goes. Times and throughput are only there."""
    for ours, theirs in zip(replay.metrics, run.metrics, strict=True):
        assert set(ours) - LOCAL_ONLY <= set(theirs)
        for name in set(ours) - LOCAL_ONLY:
            if name.startswith(
                (
                    "critic/",
                    "reward/",
                    "score/",
                    "kl/",
                    "group/",
                    "text/",
                    "response",
                    "prompt",
                    "train",
                    "rollout/e",
                    "objective/",
                )
            ):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5, nan_ok=True), name
        assert 0 < theirs["timing_s/reward"] < theirs["timing_s/step"]


def test_the_alarms_are_those_that_the_local_engine_would_raise(run: VerlRun, replay: Replay) -> None:
    """Their metrics are all there; the monitor beside verl reads what verl itself logged, under sharp thresholds."""
    raised, alarms = read_alarms(run.folder), Alarms(run.recipe.monitor)
    expected = []
    for ours, theirs in zip(replay.metrics, run.metrics, strict=True):
        watched = {limit.training for limit in LIMITS} & ours.keys()
        assert len(watched) >= 7
        assert watched <= theirs.keys()
        step = int(theirs["step"])
        last = replay.validation if step == STEPS else {}
        expected += alarms.see({name: value for name, value in {**ours, **last}.items() if name in theirs}, step)
        on = {name.removeprefix("alarm/") for name in theirs if name.startswith("alarm/")} - {"count"}
        assert (on, theirs["alarm/count"]) == (alarms.active, len(alarms.active))
    assert [(alarm.name, alarm.step, alarm.on) for alarm in raised] == [(a.name, a.step, a.on) for a in expected]
    assert [alarm.value for alarm in raised] == pytest.approx([a.value for a in expected], rel=1e-3, abs=1e-6)


def test_epochs_are_counted_though_verl_reads_one_file(two_workers: VerlRun) -> None:
    assert [row["training/epoch"] for row in two_workers.metrics] == [0, 1]


def test_a_validation_has_the_local_engines_names_and_values(
    two_workers: VerlRun, replay_of: Callable[[VerlRun], Replay]
) -> None:
    """Greedy replies of weights that agree to 1e-6."""
    replay = replay_of(two_workers)
    first, last = two_workers.metrics
    assert not any(name.startswith("val-") for name in first)
    assert {"val-aux/benign/reward/mean@1", "val-aux/response_length/mean"} <= set(replay.validation)
    texts_or_logprobs = {"val-aux/distinct_2", "val-aux/saturated_share", "val-aux/kl", "val-aux/entropy"}
    texts_or_logprobs.add("val-aux/dropped_replies")  # verl ends where the RM fails
    assert set(replay.validation) - set(last) == texts_or_logprobs  # of which verl's validation keeps none
    for name, value in replay.validation.items():
        if name.startswith("val-") and name in last:
            assert last[name] == pytest.approx(value, abs=1e-4), name


# ---- parity with the local engine


def test_the_same_rollouts_give_the_same_numbers(run: VerlRun, replay: Replay) -> None:
    for record, theirs in zip(replay.records, run.metrics, strict=True):
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
    assert float(replay.records[1].kl.abs().max()) > 2e-5, "the KL of step 2 shows nothing if it is 0"


def test_every_token_has_the_same_score_reward_advantage_and_logprobs(run: VerlRun, replay: Replay) -> None:
    """What verl's TransferQueue held, against the local engine's tensors."""
    for step, record in enumerate(replay.records, start=1):
        sequences, theirs = record.rollout.sequences, run.tokens(step)
        assert len(theirs) == len(sequences.responses)
        ours = []
        for i, length in enumerate(sequences.response_mask.sum(1).tolist()):
            prompt = sequences.prompts[i][sequences.prompt_mask[i].bool()].tolist()
            rewards = record.token_level_rewards
            if record.combined is not None:  # verl keeps its own rewards; ours are made of components beside them
                rewards = record.token_level_scores - 0.05 * record.kl
            columns = (record.token_level_scores, rewards, record.advantages, record.kl)
            ours.append(
                (prompt, sequences.responses[i, :length].tolist(), torch.stack([c[i, :length] for c in columns]))
            )
        for row, (prompt, response, expected) in zip(theirs, sorted(ours, key=lambda r: r[:2]), strict=True):
            assert (row["prompts"], row["responses"]) == (prompt, response)
            names = ("rm_scores", "token_level_rewards", "advantages", "old_log_probs", "ref_log_prob")
            scores, rewards, advantages, old, reference = (torch.tensor(row[name]) for name in names)
            assert scores[:-1].eq(0).all()
            found = torch.stack([scores, rewards, advantages, old - reference])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_reply_has_the_same_score_reward_and_advantage(run: VerlRun, replay: Replay) -> None:
    """By the group log, reply by reply; and its advantages recompute."""
    for step, record in enumerate(replay.records, start=1):
        log = read_group_log(run.folder / "groups" / f"step_{step:06d}.jsonl")
        theirs = sorted(
            (group.prompt_id, s.response, s.logit, s.safe_score, s.reward, s.advantage, s.kl / s.length)
            for group in log.groups
            for s in group.samples
        )
        prompt_ids = [row.index for row in record.prompts for _ in range(4)]
        mask = record.rollout.sequences.response_mask
        columns = (
            record.token_level_rewards.sum(1),
            record.advantages[:, 0],
            (record.kl * mask).sum(1) / mask.sum(1),
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


def test_a_step_leads_to_the_same_weights(run: VerlRun, replay: Replay) -> None:
    """Each weight, and the step as a whole: that one is the same to a hundredth of its length."""
    before, theirs_before = replay.start, replay.start
    for step, weights in enumerate(replay.weights, start=1):
        theirs = checkpoint_weights(run.folder / f"global_step_{step}" / "actor")
        assert theirs.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-5, msg=f"step {step}: {key}")
        moved, their_move = (
            torch.cat([(after[key] - start[key]).flatten() for key in weights])
            for after, start in ((weights, before), (theirs, theirs_before))
        )
        assert float(moved.abs().max()) > 5e-6, "nothing was learned"
        assert float((their_move - moved).norm()) < 1e-2 * float(moved.norm())
        before, theirs_before = weights, theirs


def test_the_multiplier_is_steered_logged_and_kept_over_a_resume(one_worker: VerlRun, replay_of: Any) -> None:
    first, second = one_worker.metrics
    assert first["objective/lambda"] == 1.0
    step = 0.5 * (first["objective/cost_mean"] - first["objective/cost_limit"])
    assert abs(step) > 1e-3, "it must move for this test to mean anything"
    assert second["objective/lambda"] == pytest.approx(math.exp(step), rel=1e-6)
    states = [
        json.loads((one_worker.folder / f"global_step_{n}" / "ups_rm_objective.json").read_text()) for n in (1, 2)
    ]
    assert states[0] == {"value": pytest.approx(second["objective/lambda"]), "updates": 1}
    assert states[1]["updates"] == 2
    log = read_group_log(one_worker.folder / "groups" / "step_000002.jsonl")
    for group in log.groups:
        bound = second["objective/lambda"] if group.kind == "unsafe" else 0.0
        assert group.weights == {"safety": pytest.approx(bound), "helpfulness": 1.0}
        for sample in group.samples:
            assert sample.components["helpfulness"] == pytest.approx(sample.helpfulness)
            assert sample.components["safety"] == pytest.approx(-sample.logit)
            assert sample.charge == pytest.approx(0.05 * sample.kl + max(0.0, (sample.length - 4) / 4), abs=1e-5)


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


def test_the_exported_policy_loads_in_plain_transformers(run: VerlRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
