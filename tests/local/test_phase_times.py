"""The seconds of a step's phases are the seconds of the step: nothing of it is left unnamed."""

from __future__ import annotations

from pathlib import Path
from statistics import median

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
    assert all(row[f"timing_s/{phase}"] > 0 for row in rows for phase in PHASES)
    whole = [row["timing_s/step"] for row in rows]
    missing = [
        1 - sum(row[f"timing_s/{phase}"] for phase in PHASES) / step for row, step in zip(rows, whole, strict=True)
    ]
    assert min(missing) > -1e-6
    assert median(missing) < 0.02  # not each: the system may take the core away between two clocks
