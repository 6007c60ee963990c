"""Numbers that go wrong: each is planted, and named, left out, counted, kept for replay, or stops the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_training import command, letter_share, prefers, tiny_recipe
from ups_rm.errors import CheckpointError, NumberError, RMError, RMServerError, RunError
from ups_rm.grpo.groups import flat_groups, usable_replies
from ups_rm.local.replay import replay
from ups_rm.local.scoring import score_replies
from ups_rm.local.trainer import Trainer
from ups_rm.tracking import read_group_log, read_metrics
from ups_rm.types import Conversation, Score

FOUR = ["trainer.total_training_steps=4", "trainer.save_freq=1", "actor_rollout_ref.actor.optim.lr=5e-3"]


def masters(trainer: Trainer) -> list[torch.Tensor]:
    return [master.detach().clone() for _, master in trainer.policy.masters]


# ---- NaN and infinity in the step


@contextmanager
def nan_in_a_weight(trainer: Trainer) -> Iterator[None]:
    weight = trainer.policy.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] = math.nan
        trainer.engine.refresh()
        try:
            yield
        finally:
            weight[0, 0] = kept
            trainer.engine.refresh()


@contextmanager
def inf_in_the_reference(trainer: Trainer) -> Iterator[None]:
    assert trainer.reference is not None
    bias = trainer.reference.model.model.norm.weight
    with torch.no_grad():
        kept = bias.clone()
        bias.fill_(math.inf)
        try:
            yield
        finally:
            bias.copy_(kept)


@contextmanager
def nan_in_a_gradient(trainer: Trainer) -> Iterator[None]:
    hook = trainer.policy.model.model.layers[0].self_attn.v_proj.weight.register_hook(lambda g: g * math.nan)
    try:
        yield
    finally:
        hook.remove()


PLANTED: dict[str, tuple[Any, str]] = {
    "logits": (nan_in_a_weight, "the policy's logits in the rollout is not finite in replies 0, 1"),
    "reference": (inf_in_the_reference, "the reference's log-probabilities is not finite in replies 0, 1"),
    "gradient": (nan_in_a_gradient, "the gradient of model.layers.0.self_attn.v_proj.weight is not finite"),
}


def planted(fault: Any, at: set[int]) -> type[Trainer]:
    class Planted(Trainer):
        def step(self, prompts: Any, number: int) -> Any:
            if number not in at:
                return super().step(prompts, number)
            with fault(self):
                before = masters(self)
                try:
                    return super().step(prompts, number)
                finally:
                    assert all(map(torch.equal, before, masters(self))) or fault is nan_in_a_weight

    return Planted


@pytest.mark.parametrize(("fault", "told"), PLANTED.values(), ids=PLANTED.keys())
def test_a_step_that_goes_wrong_is_named_and_left_out(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str], fault: Any, told: str
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR)
    result = planted(fault, {2})(recipe, prefers("e")).fit()
    out = capsys.readouterr().out
    assert f"step 2: {told}" in out
    assert "replay/step_000002.pt; the step is left out" in out
    assert result.steps == 4
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["numbers/skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert "actor/loss" not in rows[1]
    assert sorted(path.name for path in (tmp_path / "run/groups").glob("step_*.jsonl")) == [
        f"step_00000{step}.jsonl" for step in (1, 3, 4)
    ]
    assert all(math.isfinite(row["actor/grad_norm"]) for row in rows if row["step"] != 2)
    assert json.loads((tmp_path / "run/global_step_4/state.json").read_text())["counters"]["skipped_steps"] == 1


def test_stop_ends_the_run_at_the_first_one(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR, "trainer.nonfinite=stop")
    with pytest.raises(RunError, match=r"step 3: the gradient of .* is not finite; its batch: ups-rm replay .*3\.pt"):
        planted(nan_in_a_gradient, {3})(recipe, prefers("e")).fit()
    assert (tmp_path / "run/global_step_2").is_dir()
    assert Trainer(recipe, prefers("e")).fit().steps == 4, "what was wrong is gone: it goes on"


def test_too_many_in_a_row_stop_the_run_and_a_good_one_between_does_not_count(
    tmp_path: Path, policy_folder: Path
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR, "trainer.max_skipped_steps=1")
    assert planted(nan_in_a_gradient, {1, 3})(recipe, prefers("e")).fit().steps == 4
    again = tiny_recipe(tmp_path / "two", policy_folder, *FOUR, "trainer.max_skipped_steps=1")
    with pytest.raises(RunError, match=r"2 steps in a row, more than trainer\.max_skipped_steps=1"):
        planted(nan_in_a_gradient, {2, 3})(again, prefers("e")).fit()


def test_a_left_out_step_is_the_same_after_a_resume(tmp_path: Path, policy_folder: Path) -> None:
    """Counters and schedule go on: the step was left out before the checkpoint, or is left out again after it."""
    ends = []
    for name, stops in (("straight", []), ("resumed", [2, 3])):
        for steps in [*stops, 4]:
            more = [f"trainer.total_training_steps={steps}", "actor_rollout_ref.actor.optim.lr_warmup_steps=3"]
            recipe = tiny_recipe(tmp_path / name, policy_folder, *FOUR, *more)
            trainer = planted(nan_in_a_gradient, {2})(recipe, prefers("e"))
            trainer.fit()
        rows = read_metrics(tmp_path / name / "run/metrics.jsonl")
        ends.append((masters(trainer), [(row["numbers/skipped_steps"], row.get("actor/lr")) for row in rows]))
    assert ends[0][1] == ends[1][1]
    assert all(map(torch.equal, ends[0][0], ends[1][0]))


def test_replay_runs_the_step_again(
    tmp_path: Path, policy_folder: Path, rm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are NaN come again from the file; a fault that was the machine's does not."""
    rm = f"reward_model.model.path={rm_folder}"
    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR, rm, "trainer.nonfinite=stop")
    trainer = Trainer(recipe)
    with torch.no_grad():
        trainer.policy.model.model.embed_tokens.weight.fill_(math.nan)
    trainer.engine.refresh()
    with pytest.raises(RunError, match="the policy's logits in the rollout"):
        trainer.fit()
    assert command("replay", tmp_path / "run/replay/step_000001.pt") == 0
    told = capsys.readouterr().out
    assert "step 1: the policy's logits in the rollout is not finite in replies 0, 1" in told
    assert "the same as in the run" in told

    with pytest.raises(RunError):
        planted(nan_in_a_gradient, {1})(
            tiny_recipe(tmp_path / "once", policy_folder, *FOUR, rm, "trainer.nonfinite=stop")
        ).fit()
    file = tmp_path / "once/run/replay/step_000001.pt"
    assert replay(file) == (
        "step 1: all numbers are finite this time (then: the gradient of model.layers.0.self_attn.v_proj.weight is not "
        "finite)",
        False,
    )
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is not the file of a step"):
        replay(file)


def test_a_gradient_that_explodes_ends_the_run_and_the_best_checkpoint_stays(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*FOUR, "trainer.test_freq=1", "trainer.best_ckpt_to_keep=1", "trainer.max_ckpt_to_keep=1"]
    recipe = tiny_recipe(tmp_path, policy_folder, *settings, "trainer.max_grad_norm=20")

    class Explodes(Trainer):
        def step(self, prompts: Any, number: int) -> Any:
            record = super().step(prompts, number)
            assert record.update["actor/grad_norm"] < 20
            if number == 3:
                record.update["actor/grad_norm"] = 1e4
            return record

    assert Explodes(recipe, prefers("e")).fit().steps == 3
    out = capsys.readouterr().out
    assert "step 3: actor/grad_norm 10000.0000 > trainer.max_grad_norm=20.0: stopped; best validation: step" in out
    best = int(out.split("best validation: step ")[1].split()[0])
    assert (tmp_path / f"run/global_step_{best}").is_dir()


# ---- groups of equal scores


def naive_flat(scores: list[float], groups: list[int], usable: list[bool], tolerance: float) -> list[bool]:
    import statistics

    flat = set()
    for group in set(groups):
        of_group = [s for s, g, u in zip(scores, groups, usable, strict=True) if g == group and u]
        if len(of_group) > 1 and statistics.stdev(of_group) <= tolerance:
            flat.add(group)
    return [group in flat for group in groups]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.501, 1.0]), st.integers(0, 3), st.booleans()), min_size=1))
def test_flat_groups_are_those_of_the_definition(rows: list[tuple[float, int, bool]]) -> None:
    scores, groups, usable = (list(column) for column in zip(*rows, strict=True))
    for tolerance in (1e-6, 0.01):
        found = flat_groups(torch.tensor(scores), torch.tensor(groups), torch.tensor(usable), tolerance)
        assert found.tolist() == naive_flat(scores, groups, usable, tolerance)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1))
def test_a_reply_that_is_left_alone_is_not_usable_but_a_group_of_one_is(rows: list[tuple[int, bool]]) -> None:
    groups, scored = (list(column) for column in zip(*rows, strict=True))
    left = {g: sum(s for other, s in rows if other == g) for g in groups}
    expected = [s and (left[g] > 1 or groups.count(g) == 1) for g, s in rows]
    assert usable_replies(torch.tensor(scored), torch.tensor(groups)).tolist() == expected


class EqualFor:
    """Scores like `prefers("e")`, but all replies to some prompts the same, up to the last bit of a float."""

    def __init__(self, *prompts: str, times: float = math.inf) -> None:
        self.prompts, self.times, self.inner = prompts, times, prefers("e")

    def score(self, conversations: list[Conversation]) -> list[Score]:
        self.times -= 1
        scores = self.inner.score(conversations)
        if self.times < 0:
            return scores
        return [
            Score(0.3, 0.42555748 + 3e-8 * (i % 2), 1, False) if c[0]["content"] in self.prompts else score
            for i, (c, score) in enumerate(zip(conversations, scores, strict=True))
        ]


FLAT = "How do I bake bread"
ONE_STEP = ["trainer.total_training_steps=1", "data.shuffle=false", "actor_rollout_ref.actor.optim.lr=5e-3"]


@pytest.mark.parametrize("rule", ["keep", "mask"])
def test_equal_scores_give_no_advantage_whatever_the_rounding(tmp_path: Path, policy_folder: Path, rule: str) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *ONE_STEP, f"algorithm.zero_std_groups={rule}")
    trainer = Trainer(recipe, EqualFor(FLAT))
    trainer.fit()
    log = read_group_log(tmp_path / "run/groups/step_000001.jsonl")
    flat, *others = log.groups
    assert flat.messages[0]["content"] == FLAT
    assert flat.flat
    assert {sample.advantage for sample in flat.samples} == {0.0}
    assert all(sample.advantage != 0 for group in others for sample in group.samples if sample.length)
    assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert (row["group/flat_share"], row["group/masked_share"]) == (0.25, 0.0 if rule == "keep" else 0.25)


def test_a_masked_group_is_as_if_it_were_not_there(tmp_path: Path, policy_folder: Path) -> None:
    """The same weights come out as from the other three prompts alone: the means in the loss do not count it."""
    off = [*ONE_STEP, "algorithm.use_kl_in_reward=false", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    recipe = tiny_recipe(tmp_path, policy_folder, *off, "algorithm.zero_std_groups=mask")
    trainer = Trainer(recipe, EqualFor(FLAT))
    record = trainer.step(trainer.train_rows[:4], 1)
    assert record.learns.tolist() == [False] * 4 + [True] * 12
    twin = Trainer(recipe, prefers("e"))
    sequences, rows = record.rollout.sequences, torch.arange(4, 16)
    twin.actor.update(sequences.trimmed(rows), record.advantages[rows], None, None, step=1)
    for one, other in zip(masters(trainer), masters(twin), strict=True):
        # Adam's first step is lr (5e-3) times the gradient's sign; a gradient of about 1e-9 shows its rounding
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)


def test_resampling_draws_flat_groups_again_and_others_stay(tmp_path: Path, policy_folder: Path) -> None:
    rule = "algorithm.zero_std_groups=resample"
    plain = Trainer(tiny_recipe(tmp_path / "plain", policy_folder, *ONE_STEP), EqualFor(FLAT))
    again = Trainer(tiny_recipe(tmp_path / "again", policy_folder, *ONE_STEP, rule), EqualFor(FLAT, times=1))
    before, after = (trainer.step(trainer.train_rows[:4], 1) for trainer in (plain, again))
    assert (before.resampled, after.resampled) == (0, 1)
    assert before.rollout.texts[:4] != after.rollout.texts[:4]
    assert before.rollout.texts[4:] == after.rollout.texts[4:]
    assert not after.flat.any()
    assert after.learns.all()
    decoded = [again.policy.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True) for ids, mask in
               zip(after.rollout.sequences.responses, after.rollout.sequences.response_mask, strict=True)]  # fmt: skip
    assert decoded == after.rollout.texts
    always = Trainer(tiny_recipe(tmp_path / "always", policy_folder, *ONE_STEP, rule), EqualFor(FLAT))
    record = always.step(always.train_rows[:4], 1)
    assert (record.resampled, record.learns.tolist()) == (2, [False] * 4 + [True] * 12), "twice, then masked"


def test_a_batch_of_flat_groups_alone_moves_nothing(tmp_path: Path, policy_folder: Path) -> None:
    class Constant:
        def score(self, conversations: list[Conversation]) -> list[Score]:
            return [Score(0.0, 0.5, 1, False) for _ in conversations]

    for rule in ("keep", "mask"):
        more = [f"algorithm.zero_std_groups={rule}", "actor_rollout_ref.actor.optim.weight_decay=0"]
        trainer = Trainer(tiny_recipe(tmp_path / rule, policy_folder, *ONE_STEP, *more), Constant())
        before = masters(trainer)
        trainer.fit()
        assert all(map(torch.equal, before, masters(trainer)))


# ---- a reward model that fails


class FailsOn:
    """Scores like `prefers("e")`; where a conversation is one of those it fails on, it does `fail`."""

    def __init__(self, fails: Callable[[str], bool], fail: Callable[[], Score], *, whole: bool = False) -> None:
        self.fails, self.fail, self.inner, self.calls = fails, fail, prefers("e"), 0

    def score(self, conversations: list[Conversation]) -> list[Score]:
        self.calls += 1
        scores = self.inner.score(conversations)
        for i, conversation in enumerate(conversations):
            if self.fails(conversation[-1]["content"]):
                scores[i] = self.fail()
        return scores


def raising(error: Exception) -> Callable[[], Score]:
    def fail() -> Score:
        raise error

    return fail


WAYS = {
    "answers NaN": lambda: Score(math.nan, math.nan, 1, False),
    "answers infinity": lambda: Score(math.inf, math.inf, 1, False),
    "times out": raising(TimeoutError("no answer within 5 s")),
    "refuses": raising(RMError("a logit is not finite")),
    "is patient in vain": raising(RMServerError("no answer within 600 s")),
}
TALKS: list[Conversation] = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"reply {i} {'e' * i}"}] for i in range(16)
]


@pytest.mark.parametrize("fail", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("bad", [0, 7, 15])
def test_the_reply_that_the_model_fails_on_is_found(fail: Any, bad: int) -> None:
    scorer = FailsOn(lambda text: text == TALKS[bad][-1]["content"], fail)
    scores, scored = score_replies(scorer, TALKS, retries=1, max_dropped_share=0.25)
    assert scored.tolist() == [i != bad for i in range(16)]
    right = prefers("e").score(TALKS)
    assert [score for i, score in enumerate(scores) if i != bad] == [s for i, s in enumerate(right) if i != bad]
    assert scorer.calls <= 2 * (2 * 4 + 1)


@pytest.mark.parametrize("fail", WAYS.values(), ids=WAYS.keys())
def test_what_fails_once_is_asked_again_and_kept(fail: Any) -> None:
    left = [1]

    def once(text: str) -> bool:
        return text == TALKS[3][-1]["content"] and bool(left) and bool(left.pop())

    scores, scored = score_replies(FailsOn(once, fail), TALKS, retries=2, max_dropped_share=0.0)
    assert scored.all()
    assert scores == prefers("e").score(TALKS)


@pytest.mark.parametrize("fail", WAYS.values(), ids=WAYS.keys())
def test_more_than_the_bound_ends_the_run_with_the_models_own_words(fail: Any) -> None:
    scorer = FailsOn(lambda _: True, fail)
    with pytest.raises(RMError, match=r"replies no score|fails on most replies: "):
        score_replies(scorer, TALKS, retries=1, max_dropped_share=0.25)
    assert scorer.calls <= 40, "a model that is down is not asked about every reply"


def test_a_bug_of_the_scorer_is_no_missing_score() -> None:
    with pytest.raises(KeyError):
        score_replies(FailsOn(lambda _: True, raising(KeyError("x"))), TALKS, retries=2, max_dropped_share=1.0)


def test_a_dropped_reply_leaves_its_group_right(tmp_path: Path, policy_folder: Path) -> None:
    """Mean, std and advantages are those of the others; the log recomputes; it is counted; it moves no weight."""
    seen: list[str] = []

    def first_of_each_batch(text: str) -> bool:
        if len(seen) < 1:
            seen.append(text)
        return text == seen[0]

    recipe = tiny_recipe(tmp_path, policy_folder, *ONE_STEP)
    trainer = Trainer(recipe, FailsOn(first_of_each_batch, WAYS["answers NaN"]))
    trainer.fit()
    log = read_group_log(tmp_path / "run/groups/step_000001.jsonl")
    dropped = [sample.dropped for sample in log.groups[0].samples]
    assert dropped == [True, False, False, False]
    group = log.groups[0]
    rewards = torch.tensor([sample.reward for sample in group.samples[1:]])
    assert group.n == 3
    assert (group.reward_mean, group.reward_std) == (float(rewards.mean()), float(rewards.std()))
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert [sample.advantage for sample in group.samples] == [0.0, *expected.tolist()]
    assert log.recompute_advantages() == [[s.advantage for s in g.samples] for g in log.groups]
    assert math.isnan(group.samples[0].reward)
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["numbers/dropped_replies"] == 1
    assert math.isfinite(row["critic/score/mean"])
    kept = [s.safe_score for g in log.groups for s in g.samples if not s.dropped and s.length]
    assert row["critic/score/mean"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    assert letter_share("e") == 1


def test_validation_counts_what_the_model_fails_on_and_goes_on(tmp_path: Path, policy_folder: Path) -> None:
    """Every third held-out reply has no score: the means are those of the others, and the run reaches its end."""
    held_out: list[list[Score]] = []

    class FailsInValidation(Trainer):
        def validate(self, state: Any) -> dict[str, float]:
            inner, asked = self.scorer, {}

            class Thirds:
                def score(self, conversations: list[Conversation]) -> list[Score]:
                    scores = inner.score(conversations)
                    if not asked:  # the first question; later ones are about those that failed
                        asked.update({json.dumps(c): i for i, c in enumerate(conversations)})
                        held_out.append([score for i, score in enumerate(scores) if i % 3])
                    return [
                        Score(math.nan, math.nan, 1, False) if asked[json.dumps(c)] % 3 == 0 else score
                        for c, score in zip(conversations, scores, strict=True)
                    ]

            self.scorer = Thirds()
            try:
                return super().validate(state)
            finally:
                self.scorer = inner

    share = "reward_model.max_dropped_share=0.5"
    sampled = ["rollout.val_kwargs.do_sample=true", "rollout.val_kwargs.temperature=1.0"]
    recipe = tiny_recipe(
        tmp_path, policy_folder, "trainer.total_training_steps=2", "trainer.test_freq=1", share,
        *(f"actor_rollout_ref.{text}" for text in sampled),
    )  # fmt: skip
    assert FailsInValidation(recipe, prefers("e")).fit().steps == 2
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["val-aux/dropped_replies"] for row in rows] == [2, 2]  # of six
    for row, scores in zip(rows, held_out, strict=True):
        mean = sum(score.safe_score for score in scores) / len(scores)
        assert row["val-core/PKU-SafeRLHF/reward/mean@1"] == pytest.approx(mean, rel=1e-5)
        assert math.isfinite(row["val-aux/saturated_share"])
    strict = tiny_recipe(tmp_path / "strict", policy_folder, "trainer.test_freq=1")
    with pytest.raises(RMError, match="2 of 6 replies no score that is a number"):
        FailsInValidation(strict, prefers("e")).fit()


def test_number_errors_say_what_and_where() -> None:
    assert str(NumberError("the loss", [3, 5])) == "the loss is not finite in replies 3, 5 of the batch"
    assert str(NumberError("the gradient of w")) == "the gradient of w is not finite"
