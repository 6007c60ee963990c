"""The runs of the verl engine that several files look at; each is made once, by whoever asks first."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

from faulty_rms import slow_rm
from tiny import tiny_rm
from tiny_training import prompt_file
from verl_cpu import command
from verl_runs import OWN_CODE, Interrupted, Replay, VerlRun, planned, replies_with

CONSTRAINED = (
    "algorithm.objective=constrained", "algorithm.constraint.prompts=unsafe", "algorithm.constraint.lambda_lr=0.5",
    "reward_model.overlong_buffer.enable=true", "reward_model.overlong_buffer.len=4",
)  # fmt: skip


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> tuple[VerlRun, Interrupted]:
    """`ENGINE=verl bash scripts/run_grpo_pku_saferlhf.sh` on one worker, after a Ctrl-C while step 2 is sampled.

    Its objective is the constrained one with an RM of two heads: what a resume has to keep is then the multiplier too.
    """
    folder = tmp_path_factory.mktemp("one")
    rm = tiny_rm(folder / "rm", heads=("unsafety", "helpfulness"))
    run = planned(folder, policy_folder, rm, *CONSTRAINED, starts=2)
    asked_at = 0.0

    def ctrl_c(process: subprocess.Popen[str]) -> None:
        nonlocal asked_at
        while process.poll() is None and not replies_with(run.dumps[0], weights=1):
            sleep(0.1)
        asked_at = monotonic()
        process.send_signal(signal.SIGINT)

    done = command.grpo_script(*run.arguments, dump=run.dumps[0], hold=1, meanwhile=ctrl_c)
    seconds, left = monotonic() - asked_at, [process.name() for process in command.processes_of(run.folder)]
    found = sorted(entry.name for entry in run.folder.iterdir())
    return run, Interrupted(done.stdout, done.returncode, seconds, left, found)


@pytest.fixture(scope="session")
def one_worker(interrupted: tuple[VerlRun, Interrupted]) -> VerlRun:
    """The same command again."""
    run, _ = interrupted
    done = command.grpo_script(*run.arguments, dump=run.dumps[1])
    assert done.returncode == 0, done.stdout[-5000:]
    return run


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, rm_folder: Path) -> VerlRun:
    """`ups-rm train` on two FSDP2 workers, validated after the last step; the first RM worker that scores is killed."""
    folder = tmp_path_factory.mktemp("two")
    slow = slow_rm(folder / "slow-rm", rm_folder, 0.5)  # long enough to be caught scoring
    patient = (f"reward_model.{text}" for text in ("num_workers=2", "retries=1", "timeout_s=120.0"))
    own = (f"trainer.rollout_data_dir={folder}/dumps", "actor_rollout_ref.rollout.calculate_log_probs=true")
    run = planned(folder, policy_folder, slow, OWN_CODE, "trainer.test_freq=2", workers=2, verl_only=(*patient, *own))
    prompt_file(folder / "train.parquet", unsafe=2, benign=2)  # the second step is in the next epoch
    killed = []

    def kill_one(process: subprocess.Popen[str]) -> None:
        while not killed and process.poll() is None:
            for worker in command.processes_of(run.folder):
                with suppress(psutil.Error):
                    if worker.name().startswith("ray::RMWorker.score") and not killed:
                        worker.kill()
                        killed.append(worker.pid)
            sleep(0.05)

    done = command.ups_rm("train", "--engine", "verl", *run.arguments, dump=run.dumps[0], meanwhile=kill_one)
    assert done.returncode == 0, done.stdout[-5000:]
    assert killed
    return run


@pytest.fixture(scope="session")
def replay_of() -> Callable[[VerlRun], Replay]:
    """A run through the local engine, once."""
    known: dict[Path, Replay] = {}

    def of(run: VerlRun) -> Replay:
        if run.folder not in known:
            known[run.folder] = Replay.of(run)
        return known[run.folder]

    return of


@pytest.fixture(params=["one_worker", "two_workers"])
def run(request: pytest.FixtureRequest) -> VerlRun:
    found: VerlRun = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def replay(run: VerlRun, replay_of: Callable[[VerlRun], Replay]) -> Replay:
    return replay_of(run)
