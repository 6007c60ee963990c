"""`algorithm.objective` in the local engine: what each objective teaches, what is logged, what survives a restart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tiny_training import SyntheticScorer, letter_share, tiny_recipe
from ups_rm.errors import RecipeError, RMError
from ups_rm.grpo import Lagrange
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import Recipe
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Conversation, Score

ACTOR, ROLLOUT, ALGORITHM = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "algorithm."
LEARN = ["data.train_batch_size=8", f"{ACTOR}ppo_mini_batch_size=8", f"{ROLLOUT}n=8", f"{ACTOR}optim.lr=1e-2",
         "data.max_response_length=8"]  # fmt: skip


@dataclass
class TwoLetters(SyntheticScorer):
    """Unsafe and helpful alike is the letter e; safe is a. The two aims oppose each other."""

    def score(self, conversations: list[Conversation]) -> list[Score]:
        texts = [conversation[-1]["content"] for conversation in conversations]
        return [
            replace(score, helpfulness=4.0 * letter_share(text, "e") - letter_share(text, "a"))
            for score, text in zip(super().score(conversations), texts, strict=True)
        ]


def opposed() -> TwoLetters:
    return TwoLetters(lambda text: 8.0 * letter_share(text, "e") - 2.0 * letter_share(text, "a"))


def fit(recipe: Recipe, scorer: Any) -> list[dict[str, Any]]:
    Trainer(recipe, scorer).fit()
    return read_metrics(Path(recipe.trainer.default_local_dir) / "metrics.jsonl")


def last(rows: list[dict[str, Any]], name: str, steps: int = 4) -> float:
    return sum(row[name] for row in rows[-steps:]) / steps


def test_each_objective_teaches_what_it_says(tmp_path: Path, policy_folder: Path) -> None:
    """Safety alone empties the replies of e, helpfulness alone fills them, the constraint holds the cost between."""

    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        more = [*LEARN, *overrides, "trainer.total_training_steps=24"]
        return fit(tiny_recipe(tmp_path / name, policy_folder, *more), opposed())

    limit = 1.5
    safety = run("safety")
    weights = f"{ALGORITHM}objective_weights."
    helpful = run("helpful", f"{ALGORITHM}objective=weighted", f"{weights}safety=0", f"{weights}helpfulness=1")
    constrained = run(
        "constrained", f"{ALGORITHM}objective=constrained", f"{ALGORITHM}constraint.cost_limit={limit}",
        f"{ALGORITHM}constraint.lambda_lr=0.1",
    )  # fmt: skip
    assert last(safety, "score/logit_mean") < 0.3
    assert last(helpful, "score/logit_mean") > 3.0
    assert 0.5 < last(constrained, "objective/cost_mean", 8) < 2.5
    assert "objective/helpfulness_mean" not in safety[0]


def test_the_multiplier_is_logged_as_its_formula_says(tmp_path: Path, policy_folder: Path) -> None:
    bound = f"{ALGORITHM}constraint."
    recipe = tiny_recipe(
        tmp_path, policy_folder, *LEARN, f"{ALGORITHM}objective=constrained", f"{bound}lambda_lr=0.2",
        f"{bound}cost_limit=0.3", f"{bound}warmup_steps=2", "trainer.total_training_steps=6",
    )  # fmt: skip
    rows = fit(recipe, opposed())
    expected = Lagrange(value=1.0, limit=0.3, lr=0.2, least=0.05, most=20.0, warmup=2)
    for row in rows:
        assert row["objective/lambda"] == pytest.approx(expected.value)
        assert row["objective/cost_mean"] == pytest.approx(row["score/logit_mean"], abs=1e-5)
        expected.update(row["objective/cost_mean"])
    assert rows[0]["objective/lambda"] == rows[2]["objective/lambda"] == 1.0 != rows[3]["objective/lambda"]


def test_on_unsafe_prompts_only_harmless_ones_know_no_cost(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, *LEARN, f"{ALGORITHM}objective=constrained", f"{ALGORITHM}constraint.prompts=unsafe",
        "trainer.total_training_steps=1",
    )  # fmt: skip
    rows = fit(recipe, opposed())
    groups = read_group_log(tmp_path / "run/groups/step_000001.jsonl").groups
    assert {group.kind for group in groups} == {"unsafe", "benign"}
    costs = []
    for group in groups:
        assert group.weights == {"safety": float(group.kind == "unsafe"), "helpfulness": 1.0}
        for sample in group.samples:
            helpfulness = 4.0 * letter_share(sample.response, "e") - letter_share(sample.response, "a")
            assert sample.components == pytest.approx({"safety": -sample.logit, "helpfulness": helpfulness})
            if group.kind == "benign":
                assert sample.advantage == sample.component_advantages["helpfulness"]
            else:
                costs.append(sample.logit)
                half = sum(sample.component_advantages.values()) / 2
                assert sample.advantage == pytest.approx(half, abs=1e-6)
    assert rows[0]["objective/cost_mean"] == pytest.approx(sum(costs) / len(costs), abs=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "opo", "grpo_passk"])
def test_logged_advantages_recompute_exactly(tmp_path: Path, policy_folder: Path, order: str, estimator: str) -> None:
    recipe = tiny_recipe(
        tmp_path, policy_folder, *LEARN, f"{ALGORITHM}objective=constrained", f"{ALGORITHM}adv_estimator={estimator}",
        f"{ALGORITHM}normalize_components={order}", f"{ALGORITHM}kl_ctrl.kl_coef=0.05",
        "reward_model.overlong_buffer.enable=true", "reward_model.overlong_buffer.len=4",
        "trainer.total_training_steps=3",
    )  # fmt: skip
    fit(recipe, opposed())
    for file in sorted((tmp_path / "run/groups").glob("step_*.jsonl")):
        log = read_group_log(file)
        assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
        for group in log.groups:
            for sample in group.samples:
                total = sum(group.weights.values())
                reward = sum(group.weights[k] * v for k, v in sample.components.items()) / total - sample.charge
                assert sample.reward == pytest.approx(reward, abs=1e-5)
                overlong = max(0.0, (sample.length - 4) / 4)
                assert sample.charge == pytest.approx(0.05 * sample.kl + overlong, abs=1e-5)


def test_a_resumed_run_has_the_multiplier_of_the_uninterrupted_one(tmp_path: Path, policy_folder: Path) -> None:
    more = [*LEARN, f"{ALGORITHM}objective=constrained", f"{ALGORITHM}constraint.lambda_lr=0.2", "trainer.save_freq=2"]
    whole = fit(tiny_recipe(tmp_path / "whole", policy_folder, *more, "trainer.total_training_steps=5"), opposed())
    fit(tiny_recipe(tmp_path / "parts", policy_folder, *more, "trainer.total_training_steps=2"), opposed())
    state = json.loads((tmp_path / "parts/run/global_step_2/state.json").read_text())
    assert state["lagrange"] == {"value": pytest.approx(whole[2]["objective/lambda"]), "updates": 2}
    parts = fit(tiny_recipe(tmp_path / "parts", policy_folder, *more, "trainer.total_training_steps=5"), opposed())
    for name in ("objective/lambda", "objective/cost_mean", "actor/grad_norm"):
        assert [row[name] for row in parts] == [row[name] for row in whole]


def test_without_a_helpfulness_model_the_run_says_what_is_missing(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, f"{ALGORITHM}objective=weighted")
    with pytest.raises(
        RMError, match=r"16 of 16 replies have no helpfulness logit.*\n  fix: an RM folder with two heads"
    ):
        fit(recipe, SyntheticScorer(lambda text: letter_share(text)))


def test_a_group_that_is_equally_safe_is_not_flat_while_helpfulness_differs(
    tmp_path: Path, policy_folder: Path
) -> None:
    more = [*LEARN, f"{ALGORITHM}zero_std_groups=mask", f"{ALGORITHM}use_kl_in_reward=false"]
    more += ["trainer.total_training_steps=1"]
    scorer = TwoLetters(lambda text: 1.0)
    assert fit(tiny_recipe(tmp_path / "safety", policy_folder, *more), scorer)[0]["group/masked_share"] == 1.0
    more += [f"{ALGORITHM}objective=weighted"]
    assert fit(tiny_recipe(tmp_path / "both", policy_folder, *more), scorer)[0]["group/masked_share"] < 0.5


def test_a_group_whose_scores_are_saturated_is_not_flat_while_its_cost_differs(
    tmp_path: Path, policy_folder: Path
) -> None:
    """The cost is the logit: -30 and -31 are two costs and one safe score. Helpfulness is the same for all."""

    class Saturated(SyntheticScorer):
        def score(self, conversations: list[Conversation]) -> list[Score]:
            return [replace(score, helpfulness=1.0) for score in super().score(conversations)]

    scorer = Saturated(lambda text: -30.0 - letter_share(text))
    more = [*LEARN, f"{ALGORITHM}zero_std_groups=mask", f"{ALGORITHM}use_kl_in_reward=false"]
    more += ["trainer.total_training_steps=1"]
    for objective, flat in (("weighted", True), ("constrained", False)):
        recipe = tiny_recipe(tmp_path / objective, policy_folder, *more, f"{ALGORITHM}objective={objective}")
        assert (fit(recipe, scorer)[0]["group/masked_share"] == 1.0) is flat


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_the_other_losses_learn_and_start_with_vanillas_gradient(
    tmp_path: Path, policy_folder: Path, loss: str
) -> None:
    """With one update per rollout the ratio is 1 and each loss has the gradient of the policy gradient itself."""

    def run(name: str, mode: str) -> list[dict[str, Any]]:
        more = [*LEARN, f"{ACTOR}policy_loss.loss_mode={mode}", f"{ACTOR}loss_agg_mode=seq-mean-token-mean"]
        scorer = SyntheticScorer(lambda text: 3.0 - 6.0 * letter_share(text))
        return fit(tiny_recipe(tmp_path / name, policy_folder, *more, "trainer.total_training_steps=12"), scorer)

    vanilla, other = run("vanilla", "vanilla"), run(loss, loss)
    assert other[0]["actor/grad_norm"] == pytest.approx(vanilla[0]["actor/grad_norm"], rel=1e-4)
    assert last(other, "critic/score/mean") > other[0]["critic/score/mean"] + 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.objective=helpful", "algorithm.objective=helpful is not one of safety, weighted, constrained"),
        ("algorithm.constraint.lambda_init=30", "lambda_init=30 must lie between lambda_min=0.05 and lambda_max=20"),
        ("reward_model.overlong_buffer.enable=true", "overlong_buffer.len=0 must lie between 1 and"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=gpg", "did you mean"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, policy_folder: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        tiny_recipe(tmp_path, policy_folder, override)
    assert message in str(error.value)


def test_both_weights_of_nothing_are_refused(tmp_path: Path, policy_folder: Path) -> None:
    weights = [f"algorithm.objective_weights.{name}=0" for name in ("safety", "helpfulness")]
    with pytest.raises(RecipeError, match="both are 0"):
        tiny_recipe(tmp_path, policy_folder, "algorithm.objective=weighted", *weights)
    with pytest.raises(RecipeError, match="whitens over the batch"):
        tiny_recipe(
            tmp_path, policy_folder, "algorithm.objective=weighted",
            "algorithm.adv_estimator=reinforce_plus_plus_baseline",
        )  # fmt: skip
    assert math.isfinite(tiny_recipe(tmp_path, policy_folder).algorithm.constraint.cost_limit)
