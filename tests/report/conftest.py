"""Runs to look at: a whole `ups-rm run` with tiny models, made once, and a second one with other settings."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tiny_training import command

SMALL = [
    *("trainer.total_training_steps=4", "trainer.device=cpu", "data.max_response_length=10", "trainer.test_freq=2"),
    *("reward_training.layers=1", "reward_training.max_epochs=3", "data.train_batch_size=4"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "evaluation.max_new_tokens=10", "evaluation.n_resamples=500"),
    *("evaluation.max_unsafe_prompts=4", "evaluation.max_benign_prompts=4", "data.val_max_samples=4"),
]


OF_A_SHELL = ("REWARD_MODEL_PATH", "POLICY_MODEL_PATH", "TRAIN_DATA", "VAL_DATA", "OUTPUT_DIR", "ENGINE", "FRESH")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that `ups-rm run` heeds."""
    for name in OF_A_SHELL:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, backbone_folder: Path, rm_folder: Path
) -> Path:
    """Where `ups-rm run` was started twice, with runs/first and runs/second; made once for all processes (xdist).

    The second has a second judge and nothing to validate on, so that the judge reads the replies of every step.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "report"
    with (folder.parent / "report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir()
            _two_runs(folder, policy_folder, backbone_folder, rm_folder)
            (folder / "made").touch()
    return folder


def _two_runs(folder: Path, policy_folder: Path, backbone_folder: Path, rm_folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in OF_A_SHELL:
            patch.delenv(name, raising=False)
        patch.setenv("POLICY_MODEL_PATH", str(policy_folder))
        patch.setenv("UPS_RM_CACHE", os.environ.get("UPS_RM_CACHE", str(folder / "cache")))
        judged = [f"monitor.judge.path={rm_folder}", "monitor.judge.name=second-rm", "trainer.test_freq=-1"]
        for name, more in (("first", []), ("second", ["actor_rollout_ref.actor.optim.lr=1e-2", *judged])):
            backbone = f"reward_training.backbone={backbone_folder}"
            assert command("run", "--out", f"runs/{name}", backbone, *SMALL, *more) == 0


@pytest.fixture(scope="session")
def first(workspace: Path) -> Path:
    return workspace / "runs/first"


@pytest.fixture(scope="session")
def second(workspace: Path) -> Path:
    return workspace / "runs/second"
