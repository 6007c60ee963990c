"""The trainer as a whole on tiny models: it learns, the same seed gives the same run, its logs and policy are true."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import qwen_tokenizer
from tiny_training import UNKNOWN, SyntheticScorer, causal_lm, letter_share, prefers, tiny_recipe
from ups_rm.local.trainer import Trainer, TrainResult
from ups_rm.recipe import Recipe
from ups_rm.tracking import Trackers
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Conversation, Score

ACTOR, ROLLOUT, ALGORITHM = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "algorithm."
UNTIMED = ("timing", "perf/", "time")


def fit(recipe: Recipe, scorer: Any = None) -> tuple[TrainResult, list[dict[str, Any]]]:
    """Train; the result and the lines of metrics.jsonl."""
    result = Trainer(recipe, scorer).fit()
    return result, read_metrics(Path(recipe.trainer.default_local_dir) / "metrics.jsonl")


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without seconds; nan as text, so that equal runs compare equal."""
    return [
        {name: str(v) if math.isnan(v) else v for name, v in row.items() if not name.startswith(UNTIMED)}
        for row in rows
    ]


def series(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


LEARN = ["data.train_batch_size=8", f"{ACTOR}ppo_mini_batch_size=8", f"{ROLLOUT}n=8", f"{ACTOR}optim.lr=1e-2",
         "trainer.total_training_steps=24"]  # fmt: skip
VARIANTS = {
    "micro batches": [f"{ACTOR}ppo_micro_batch_size_per_gpu=8"],
    "one forward, the rollout's": [f"{ACTOR}ppo_micro_batch_size_per_gpu=64"],
    "Dr. GRPO": [
        f"{ALGORITHM}norm_adv_by_std_in_grpo=false",
        f"{ACTOR}loss_agg_mode=seq-mean-token-sum-norm",
    ],
    "two epochs, two mini batches": [f"{ACTOR}ppo_epochs=2", f"{ACTOR}ppo_mini_batch_size=4"],
    "KL as loss": [f"{ALGORITHM}use_kl_in_reward=false", f"{ACTOR}use_kl_loss=true"],
    "LoRA": ["actor_rollout_ref.model.lora_rank=8", f"{ACTOR}optim.lr=3e-2"],
    "bf16": [f"{ACTOR}fsdp_config.dtype=bfloat16"],
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_it_learns_what_the_scorer_likes(
    tmp_path: Path, policy_folder: Path, backbone_folder: Path, variant: list[str]
) -> None:
    """The letter e has a share of about 0.02 in the replies of the start; liked, it must come often.

    LoRA leaves the head alone, and the policy's own head is too narrow to say much: there the wide backbone learns, how
    much depends on rounding (0.26 to 0.38 with one form of a kernel and another).
    """
    lora = "lora" in str(variant)
    policy, least = (backbone_folder, 0.2) if lora else (policy_folder, 0.3)
    overrides = ["trainer.test_freq=24", "trainer.val_before_train=true", f"{ROLLOUT}val_kwargs.do_sample=true"]
    overrides += [f"{ROLLOUT}val_kwargs.temperature=1.0", f"{ROLLOUT}val_kwargs.n=4"]
    _, rows = fit(tiny_recipe(tmp_path, policy, *LEARN, *overrides, *variant), prefers("e"))
    scores = series(rows, "critic/score/mean")
    assert scores[0] < 0.1
    assert sum(scores[-4:]) / 4 > least, scores
    held_out = series(rows, "val-core/PKU-SafeRLHF/reward/mean@4")
    assert len(held_out) == 2  # before and at the end
    assert held_out[1] > held_out[0] + least - 0.1


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_an_architecture_without_fast_paths_learns_too(tmp_path: Path, architecture: str) -> None:
    """GPT-2 and GPT-NeoX go through transformers' own generate and forward."""
    tokenizer = qwen_tokenizer()
    model = causal_lm(architecture, vocab_size=len(tokenizer), initializer_range=0.05)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    recipe = tiny_recipe(tmp_path, tmp_path / "policy", *LEARN)
    trainer = Trainer(recipe, prefers("e"))
    assert trainer.engine.decoder is None
    result = trainer.fit()
    scores = series(read_metrics(tmp_path / "run/metrics.jsonl"), "critic/score/mean")
    assert sum(scores[-4:]) / 4 > scores[0] + 0.1, scores
    assert result.policy is not None
    assert_same_logits_elsewhere(result.policy, trainer)


def test_the_policy_is_saved_before_a_tracker_is_waited_for(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never returns costs nothing but Ctrl-C; a run that was asked to stop waits for a moment only."""
    seen: list[tuple[bool, bool]] = []
    finish, folder = Trackers.finish, tmp_path / "run" / "policy"

    def spy(self: Trackers, *, patient: bool = True) -> None:
        seen.append(((folder / "config.json").is_file(), patient))
        finish(self, patient=patient)

    monkeypatch.setattr(Trackers, "finish", spy)
    recipe = tiny_recipe(tmp_path, policy_folder, "trainer.total_training_steps=2")

    class Stops(SyntheticScorer):
        def score(self, conversations: list[Conversation]) -> list[Score]:
            signal.raise_signal(signal.SIGTERM)
            return super().score(conversations)

    assert Trainer(recipe, Stops(lambda text: float(len(text)))).fit().interrupted
    assert seen[0] == (False, False)
    seen.clear()
    assert not Trainer(recipe, SyntheticScorer(lambda text: float(len(text)))).fit().interrupted
    assert seen[0] == (True, True)


def test_it_does_not_move_where_there_is_nothing_to_learn(tmp_path: Path, policy_folder: Path) -> None:
    """The same score for everything: no advantage, no gradient, and without weight decay no change at all."""
    recipe = tiny_recipe(tmp_path, policy_folder, f"{ALGORITHM}use_kl_in_reward=false", f"{ACTOR}optim.weight_decay=0")
    trainer = Trainer(recipe, SyntheticScorer(lambda _: 0.5))
    start = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    result = trainer.fit()
    assert result.metrics["group/zero_std_share"] == 1
    assert result.metrics["actor/grad_norm"] == 0
    assert all(torch.equal(p, start[name]) for name, p in trainer.policy.model.named_parameters())


def test_every_step_draws_anew(tmp_path: Path, policy_folder: Path) -> None:
    """The same prompts and, with a rate of 0, the same policy: the replies are others in each step."""
    batch = ["data.train_batch_size=12", f"{ACTOR}ppo_mini_batch_size=12", "data.shuffle=false"]
    fit(tiny_recipe(tmp_path, policy_folder, *batch, f"{ACTOR}optim.lr=0"), prefers("e"))
    files = sorted((tmp_path / "run/groups").glob("step_*.jsonl"))
    steps = [[sample.response for group in read_group_log(file).groups for sample in group.samples] for file in files]
    assert len(steps) == 3
    for one, other in ((0, 1), (1, 2), (0, 2)):
        different = sum(a != b for a, b in zip(steps[one], steps[other], strict=True))
        assert different > 0.9 * len(steps[one])


@pytest.mark.parametrize("name", ["rloo", "opo", "grpo_passk", "reinforce_plus_plus_baseline"])
def test_other_estimators_reach_the_update_and_the_log(tmp_path: Path, policy_folder: Path, name: str) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, f"algorithm.adv_estimator={name}", "trainer.total_training_steps=1")
    fit(recipe, prefers("e"))
    read = read_group_log(tmp_path / "run/groups/step_000001.jsonl")
    logged = [[sample.advantage for sample in group.samples] for group in read.groups]
    assert read.adv_estimator == name
    if name == "reinforce_plus_plus_baseline":
        samples = [sample for group in read.groups for sample in group.samples]
        assert sum(one.advantage * one.length for one in samples) == pytest.approx(0, abs=1e-3)  # whitened over tokens
    else:
        assert read.recompute_advantages() == logged
    if name == "grpo_passk":
        assert all(sum(advantage != 0 for advantage in group) <= 1 for group in logged)


def test_the_same_seed_gives_the_same_run(tmp_path: Path, policy_folder: Path) -> None:
    def run(name: str, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        recipe = tiny_recipe(
            tmp_path, policy_folder, "trainer.test_freq=2", "trainer.val_before_train=true", *overrides
        )
        _, rows = fit(recipe, prefers("e"))
        files = sorted((tmp_path / "run" / "groups").glob("step_*.jsonl"))
        (tmp_path / "run").rename(tmp_path / name)
        return untimed(rows), {file.name: (tmp_path / name / "groups" / file.name).read_text() for file in files}

    first, second = run("first"), run("second")
    assert first == second
    assert len(first[0]) == 4  # step 0 (validation) and three steps
    assert run("other rollout", f"{ROLLOUT}seed=43")[0] != first[0]
    assert run("other order", "data.seed=2")[0] != first[0]


def test_policy_and_reward_model_of_different_tokenizers(tmp_path: Path, policy_folder: Path, rm_folder: Path) -> None:
    """The real scorer: it is handed messages, never the policy's token ids; scores are those of scoring the text."""
    from ups_rm.reward.scorer import RewardScorer

    validation = ["trainer.test_freq=3", "trainer.val_before_train=true"]
    recipe = tiny_recipe(tmp_path, policy_folder, f"reward_model.model.path={rm_folder}", *validation)
    result, rows = fit(recipe)
    assert result.steps == 3
    scorer = RewardScorer.load(rm_folder, dtype="float32")
    group = read_group_log(tmp_path / "run/groups/step_000002.jsonl").groups[1]
    conversations: list[Conversation] = [
        [*group.messages, {"role": "assistant", "content": sample.response}] for sample in group.samples
    ]
    expected = [score.logit for score in scorer.score(conversations)]
    assert [sample.logit for sample in group.samples] == pytest.approx(expected, abs=1e-3)
    assert len({round(sample.logit, 3) for sample in group.samples}) > 1
    assert "val-core/PKU-SafeRLHF/reward/mean@1" in rows[0]
    assert {"val-aux/unsafe/reward/mean@1", "val-aux/benign/refusal_rate"} <= rows[-1].keys()


# ---- logs


def documented() -> set[str]:
    import re

    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    return {re.sub(r"\{\w*\}", "{}", name) for name in re.findall(r"`([^`\s]+)`", text) if "/" in name}


def test_every_metric_of_a_run_is_documented_and_finite(tmp_path: Path, policy_folder: Path) -> None:
    import re

    recipe = tiny_recipe(
        tmp_path,
        policy_folder,
        *("trainer.test_freq=1", "trainer.val_before_train=true"),
        *(f"{ACTOR}use_kl_loss=true", f"{ACTOR}entropy_coeff=0.01"),
    )
    _, rows = fit(recipe, prefers("e"))
    patterns = [re.compile(re.escape(name).replace(r"\{\}", "[^/]+?")) for name in documented()]
    names = {name for row in rows for name in row} - {"step", "time"}
    unknown = {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}
    assert not unknown
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert not [name for name, value in row.items() if not math.isfinite(value)]
    contract = {
        "critic/score/mean", "critic/score/max", "critic/score/min", "critic/rewards/mean", "critic/advantages/mean",
        "actor/pg_loss", "actor/loss", "actor/ppo_kl", "actor/kl_loss", "actor/entropy", "actor/grad_norm", "actor/lr",
        "response_length/mean", "prompt_length/mean", "reward/mean", "kl/mean", "group/zero_std_share",
        "score/saturated_share", "text/refusal_rate", "text/distinct_2", "timing_s/step", "perf/throughput",
        "training/global_step", "training/epoch",
    }  # fmt: skip
    assert contract <= rows[1].keys()


@pytest.mark.parametrize("scaled", ["true", "false"])
def test_logged_advantages_recompute_exactly(tmp_path: Path, policy_folder: Path, scaled: str) -> None:
    coefficient = 0.05
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{ALGORITHM}norm_adv_by_std_in_grpo={scaled}", f"{ACTOR}optim.lr=1e-2",
        f"{ALGORITHM}kl_ctrl.kl_coef={coefficient}", "trainer.total_training_steps=5", "trainer.group_log_freq=2",
    )  # fmt: skip
    _, rows = fit(recipe, prefers("e"))
    files = sorted((tmp_path / "run/groups").glob("step_*.jsonl"))
    assert [file.name for file in files] == ["step_000002.jsonl", "step_000004.jsonl"]
    for file in files:
        log = read_group_log(file)
        metrics = rows[log.step - 1]
        assert log.scale_by_std == (scaled == "true")
        assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
        samples = [sample for group in log.groups for sample in group.samples]
        assert (len(log.groups), len(samples)) == (4, 16)
        for sample in samples:
            assert sample.reward == pytest.approx(sample.safe_score - coefficient * sample.kl, abs=1e-6)
            assert sample.safe_score == pytest.approx(1 / (1 + math.exp(sample.logit)))
            assert sample.logit == pytest.approx(3 - 6 * letter_share(sample.response))
        mean = sum(sample.reward for sample in samples) / 16
        assert metrics["critic/rewards/mean"] == pytest.approx(mean, abs=1e-6)
        assert metrics["kl/seq_mean"] == pytest.approx(sum(sample.kl for sample in samples) / 16, abs=1e-5)
        for group in log.groups:
            rewards = torch.tensor([sample.reward for sample in group.samples], dtype=torch.double)
            expected = rewards - rewards.mean()
            if scaled == "true":
                expected /= rewards.std() + 1e-6
            assert [sample.advantage for sample in group.samples] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_fresh_policy_has_no_kl_and_a_trained_one_has(
    tmp_path: Path, backbone_folder: Path, dtype: str, rank: int
) -> None:
    """Policy and reference start as the same function, in bf16 too: weights, rotary tables, adapters of nothing."""
    overrides = [
        f"{ACTOR}optim.lr=1e-2",
        f"{ACTOR}fsdp_config.dtype={dtype}",
        f"actor_rollout_ref.model.lora_rank={rank}",
    ]
    overrides += ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8", f"{ALGORITHM}kl_penalty=abs"]
    _, rows = fit(tiny_recipe(tmp_path, backbone_folder, *overrides), prefers("e"))
    kl = series(rows, "kl/mean")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-3


def test_lora_leaves_the_base_alone_and_is_its_own_reference(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, "actor_rollout_ref.model.lora_rank=4", f"{ACTOR}optim.lr=1e-2")
    trainer = Trainer(recipe, prefers("e"))
    assert trainer.reference is trainer.policy
    start = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    result = trainer.fit()
    for name, parameter in trainer.policy.model.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora_" not in name), name
    assert result.policy is not None
    assert_same_logits_elsewhere(result.policy, trainer)


# ---- the policy that is left


LOAD = """
import json, sys
sys.modules["ups_rm"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
ids = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)["input_ids"]
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
print(json.dumps({"ids": ids, "dtype": str(model.dtype), "logits": logits.double().tolist()}))
"""


def assert_same_logits_elsewhere(folder: Path, trainer: Trainer) -> None:
    """Plain transformers in a process without our package gives the logits that the trained policy has here."""
    text = "Tell me about the moon"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), text], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    policy = trainer.policy
    ids = policy.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert found["ids"] == ids["input_ids"]
    assert found["dtype"] == "torch.float32"
    with torch.no_grad():
        expected = policy.model(input_ids=torch.tensor([found["ids"]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected.float(), atol=1e-5, rtol=1e-4)


def test_the_final_policy_loads_in_plain_transformers(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, f"{ACTOR}optim.lr=1e-2", "trainer.save_freq=-1")
    trainer = Trainer(recipe, prefers("e"))
    result = trainer.fit()
    assert result.policy == tmp_path / "run/policy"
    assert_same_logits_elsewhere(result.policy, trainer)
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        *("metrics.jsonl", "policy", "recipe.yaml", "groups", "finished.json", "writer.lock", "made_with.json")
    }


def test_in_bf16_the_saved_policy_is_the_fp32_masters(tmp_path: Path, policy_folder: Path) -> None:
    """Small updates are in the masters only; a policy saved from the bf16 weights would have lost them."""
    from safetensors.torch import load_file

    recipe = tiny_recipe(tmp_path, policy_folder, f"{ACTOR}fsdp_config.dtype=bfloat16", f"{ACTOR}optim.lr=1e-6")
    trainer = Trainer(recipe, prefers("e"))
    result = trainer.fit()
    assert result.policy is not None
    saved, start = (load_file(folder / "model.safetensors") for folder in (result.policy, policy_folder))
    masters = {id(parameter): master for parameter, master in trainer.policy.masters}
    for name, parameter in trainer.policy.model.named_parameters():
        assert torch.equal(saved[name], masters[id(parameter)])
    moved = torch.cat([(saved[name] - start[name]).flatten() for name in saved])
    assert 0 < float(moved.abs().max()) < 1e-5
    assert float((moved != 0).float().mean()) > 0.5


# ---- settings that steer the loop


def test_the_adaptive_coefficient_follows_its_formula(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{ALGORITHM}kl_ctrl.type=adaptive", f"{ALGORITHM}kl_ctrl.kl_coef=0.2",
        f"{ALGORITHM}kl_ctrl.target_kl=0.01", f"{ALGORITHM}kl_ctrl.horizon=40", f"{ACTOR}optim.lr=1e-2",
        "trainer.total_training_steps=6",
    )  # fmt: skip
    _, rows = fit(recipe, prefers("e"))
    value = 0.2
    for row in rows:
        assert row["actor/reward_kl_penalty_coeff"] == pytest.approx(value)
        error = min(max(row["actor/reward_kl_penalty"] / 0.01 - 1, -0.2), 0.2)
        value *= 1 + error * 16 / 40
    assert rows[-1]["actor/reward_kl_penalty_coeff"] != pytest.approx(0.2)


def test_max_kl_stops_early_and_saves_the_policy(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, "trainer.max_kl=0.05", "trainer.total_training_steps=30", f"{ACTOR}optim.lr=2e-2",
        f"{ALGORITHM}use_kl_in_reward=false",
    )  # fmt: skip
    result, rows = fit(recipe, prefers("e"))
    kl = series(rows, "kl/mean")
    assert 1 < result.steps < 30
    assert not result.interrupted
    assert kl[-1] > 0.05
    assert all(value <= 0.05 for value in kl[:-1])
    assert result.policy is not None
    assert (result.policy / "model.safetensors").is_file()


def test_without_kl_there_is_no_reference(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, f"{ALGORITHM}use_kl_in_reward=false", "trainer.max_kl=-1")
    assert Trainer(recipe, prefers("e")).reference is None
    recipe = tiny_recipe(
        tmp_path, policy_folder, f"{ALGORITHM}use_kl_in_reward=false", f"{ACTOR}use_kl_loss=true",
        f"{ACTOR}kl_loss_coef=0",
    )  # fmt: skip
    assert Trainer(recipe, prefers("e")).fit().metrics["actor/kl_loss"] >= 0


def test_validation_before_at_its_steps_and_at_the_end(tmp_path: Path, policy_folder: Path) -> None:
    """With `test_freq=-1` there is no validation at all: `val_before_train` belongs to it."""
    name, steps = "val-core/PKU-SafeRLHF/reward/mean@1", "trainer.total_training_steps=5"
    for before, every, expected in (
        ("true", 2, [0, 2, 4, 5]), ("false", 2, [2, 4, 5]), ("true", -1, []), ("false", -1, []),
    ):  # fmt: skip
        overrides = [f"trainer.test_freq={every}", f"trainer.val_before_train={before}", steps]
        _, rows = fit(tiny_recipe(tmp_path / f"{before}{every}", policy_folder, *overrides), prefers("e"))
        assert [row["step"] for row in rows if name in row] == expected
    scorer = prefers("e")
    overrides = ["trainer.test_freq=5", "trainer.val_before_train=true", steps, "data.val_max_samples=2"]
    fit(tiny_recipe(tmp_path / "few", policy_folder, *overrides), scorer)
    assert len(scorer.seen) == 2 * 2 + 5 * 16


def test_every_batch_holds_the_asked_share_of_harmless_prompts(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, "data.benign_share=0.5", "trainer.total_training_steps=6", f"{ROLLOUT}n=1"
    )
    fit(recipe, prefers("e"))
    for step in range(1, 7):
        kinds = [group.kind for group in read_group_log(tmp_path / f"run/groups/step_{step:06d}.jsonl").groups]
        assert sorted(str(kind) for kind in kinds) == ["benign", "benign", "unsafe", "unsafe"]


class Broken:
    def score(self, conversations: list[Conversation]) -> list[Score]:
        return [Score(math.nan, math.nan, 1, False) for _ in conversations]


def test_a_score_that_is_not_a_number_stops_the_run_with_a_reason(tmp_path: Path, policy_folder: Path) -> None:
    from ups_rm.errors import RMError

    with pytest.raises(RMError, match="16 of 16 replies"):
        fit(tiny_recipe(tmp_path, policy_folder), Broken())


def test_an_update_that_is_left_out_is_said(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(math.inf))
    trainer = Trainer(tiny_recipe(tmp_path, policy_folder, "trainer.total_training_steps=1"), prefers("e"))
    before = [master.clone() for _, master in trainer.policy.masters]
    trainer.fit()
    told = capsys.readouterr().out
    assert "step 1: the gradient's norm is not finite" in told
    assert "the step is left out" in told
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, trainer.policy.masters, strict=True))


def test_epochs_are_counted_in_full_batches(tmp_path: Path, policy_folder: Path) -> None:
    """12 prompts are 2 batches of 5: the third step is in the next epoch, as in verl, and 2 prompts are left out."""
    recipe = tiny_recipe(
        tmp_path, policy_folder, "data.train_batch_size=5", f"{ACTOR}ppo_mini_batch_size=5",
        "trainer.total_training_steps=5", "data.max_response_length=2",
    )  # fmt: skip
    _, rows = fit(recipe, prefers("e"))
    assert series(rows, "training/epoch") == [0, 0, 1, 1, 2]
