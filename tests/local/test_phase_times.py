"""The seconds of a step's phases are the seconds of the step: nothing of it is left unnamed."""

from __future__ import annotations

from pathlib import Path

from tiny_training import SyntheticScorer, letter_share, tiny_recipe
from ups_rm.local.trainer import Trainer
from ups_rm.tracking.jsonl import read_metrics

PHASES = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor")


def test_phases_add_up_to_the_step_within_two_percent(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "run", policy_folder, "algorithm.use_kl_in_reward=true", "data.max_response_length=48",
        "actor_rollout_ref.rollout.n=8", "trainer.total_training_steps=4",
    )  # fmt: skip
    Trainer(recipe, SyntheticScorer(lambda text: letter_share(text, "e"))).fit()
    rows = read_metrics(Path(recipe.trainer.default_local_dir) / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert all(row[f"timing_s/{phase}"] > 0 for phase in PHASES)
        missing = row["timing_s/step"] - sum(row[f"timing_s/{phase}"] for phase in PHASES)
        # a tiny step takes a quarter of a second; what stands between the clocks has no share that grows with the model
        assert -1e-6 <= missing <= max(0.02 * row["timing_s/step"], 0.005)
