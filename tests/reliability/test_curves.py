"""Curves of a run that was killed twice (SIGKILL) and went on: every step once in wandb's and tensorboard's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_training import base_overrides, recipe_yaml
from ups_rm.recipe import load_recipe
from ups_rm.tracking.jsonl import read_metrics

pytest.importorskip("wandb", reason='needs wandb: pip install "ups-rm[wandb]"')
pytest.importorskip("tensorboard", reason='needs tensorboard: pip install "ups-rm[tensorboard]"')
STEPS = 7
SETTINGS = [
    "trainer.save_freq=3", "trainer.test_freq=-1", f"trainer.total_training_steps={STEPS}",
    "trainer.logger=[wandb,tensorboard]",
]  # fmt: skip
LIFE = """
import os, signal, sys
from tiny_training import prefers
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import load_recipe

class Life(Trainer):
    def step(self, prompts, number):
        if number == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(prompts, number)

Life(load_recipe(sys.argv[2], sys.argv[3:]), prefers("e")).fit()
"""


def live(folder: Path, policy: Path, dies_in: int) -> None:
    """One process, which is killed in a step (0: in none)."""
    given = [*base_overrides(folder, policy), *SETTINGS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(folder / "home"), "UPS_RM_NATIVE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", LIFE, str(dies_in), str(recipe_yaml(folder)), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if dies_in else 0), done.stderr


@pytest.mark.slow
def test_no_point_is_lost_or_doubled(tmp_path: Path, policy_folder: Path) -> None:
    """Killed before its first checkpoint (step 3), then after steps that no checkpoint has seen, then to its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from wandb_files import history

    for dies_in in (3, 6, 0):
        live(tmp_path, policy_folder, dies_in)
    logged = {row["step"]: row["critic/score/mean"] for row in read_metrics(tmp_path / "run/metrics.jsonl")}
    assert list(logged) == list(range(1, STEPS + 1))

    offline = list((tmp_path / "run/wandb").glob("offline-run-*"))
    ids = {path.name.rsplit("-", 1)[1] for path in offline}
    assert (len(offline), len(ids)) == (3, 1)
    rows = sorted((line["_step"], line["critic/score/mean"]) for one in offline for line in history(one))
    assert rows == list(logged.items())
    state = json.loads((tmp_path / "run/global_step_6/state.json").read_text())
    assert state["run_ids"] == {"wandb": ids.pop()}

    events = tmp_path / "run/tensorboard" / load_recipe(recipe_yaml(tmp_path)).trainer.experiment_name
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    shown = [(point.step, point.value) for point in accumulator.Scalars("critic/score/mean")]
    assert [step for step, _ in shown] == list(logged)
    assert [value for _, value in shown] == pytest.approx(list(logged.values()), rel=1e-6)
