"""Checkpoints: a run that was killed and resumed equals one that was not; what is broken or foreign is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tiny_training import SyntheticScorer, letter_share, prefers, tiny_recipe
from ups_rm.durable import write_manifest
from ups_rm.errors import CheckpointError, RunError
from ups_rm.local.checkpoint import Provenance, TrainingState
from ups_rm.local.run_folder import resume
from ups_rm.local.trainer import Trainer, TrainResult
from ups_rm.recipe import Recipe
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import Conversation, Score

ACTOR = "actor_rollout_ref.actor."
SIX = ["trainer.total_training_steps=6", "trainer.save_freq=3", "trainer.test_freq=2"]
SIX += ["trainer.val_before_train=true", f"{ACTOR}optim.lr=5e-3"]
VARIANTS = {
    "plain": [],
    "bf16": [f"{ACTOR}fsdp_config.dtype=bfloat16"],
    "LoRA": ["actor_rollout_ref.model.lora_rank=4"],
    "adaptive KL, mini batches, cosine": [
        "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=50", f"{ACTOR}ppo_mini_batch_size=2",
        f"{ACTOR}shuffle=true", f"{ACTOR}optim.lr_scheduler_type=cosine", f"{ACTOR}optim.lr_warmup_steps=2",
        "data.benign_share=0.25",
    ],
}  # fmt: skip


class Stopper:
    """Scores like `prefers("e")`, but does something at its k-th call."""

    def __init__(self, at: int, action: Any) -> None:
        self.inner, self.left, self.action = prefers("e"), at, action

    def score(self, conversations: list[Conversation]) -> list[Score]:
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.inner.score(conversations)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def fit(recipe: Recipe, scorer: Any = None) -> TrainResult:
    return Trainer(recipe, scorer or prefers("e")).fit()


def traces(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, torch.Tensor]]:
    """All that a run leaves, without what is measured in seconds: metrics, group log, final weights."""
    rows = [
        {name: str(v) if math.isnan(v) else v for name, v in row.items() if not name.startswith(("tim", "perf"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    groups = {file.name: file.read_text() for file in sorted((folder / "groups").iterdir())}
    return rows, groups, load_file(folder / "policy" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    (rows_a, groups_a, weights_a), (rows_b, groups_b, weights_b) = traces(a), traces(b)
    assert rows_a == rows_b
    assert groups_a == groups_b
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_resuming_gives_the_run_that_was_never_interrupted(
    tmp_path: Path, policy_folder: Path, variant: list[str]
) -> None:
    """Crash in step 5: step 4, which the checkpoint of step 3 has not seen, is done again and not logged twice."""
    straight = tiny_recipe(tmp_path / "straight", policy_folder, *SIX, *variant)
    fit(straight)
    broken = tiny_recipe(tmp_path / "broken", policy_folder, *SIX, *variant)
    with pytest.raises(Crash):
        fit(broken, Stopper(8, crash))  # three validations (steps 0, 2, 4) and five rollouts: in step 5
    kept = [row["step"] for row in read_metrics(tmp_path / "broken/run/metrics.jsonl")]
    assert kept[-1] == 4
    result = fit(broken)
    assert result.steps == 6
    assert not result.interrupted
    assert_same_run(tmp_path / "straight/run", tmp_path / "broken/run")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from local.test_checkpoint import SIX, Stopper
from tiny_training import tiny_recipe
from ups_rm.local.checkpoint import Provenance, TrainingState
from ups_rm.local.trainer import Trainer

recipe = tiny_recipe(Path(sys.argv[2]), Path(sys.argv[3]), *SIX)
Trainer(recipe, Stopper(8, lambda: os.kill(os.getpid(), signal.SIGKILL))).fit()
"""


def test_a_killed_process_resumes_to_the_same_end(tmp_path: Path, policy_folder: Path) -> None:
    fit(tiny_recipe(tmp_path / "straight", policy_folder, *SIX))
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(tests), str(tmp_path / "killed"), str(policy_folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = tmp_path / "killed/run"
    assert not (run / "policy").exists()
    assert sorted(path.name for path in run.glob("global_step_*")) == ["global_step_3"]
    fit(tiny_recipe(tmp_path / "killed", policy_folder, *SIX))
    assert_same_run(tmp_path / "straight/run", run)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_after_the_step(
    tmp_path: Path, policy_folder: Path, which: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*SIX, "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false"]
    recipe = tiny_recipe(tmp_path / "stopped", policy_folder, *overrides)
    before = signal.getsignal(which)
    result = fit(recipe, Stopper(2, lambda: os.kill(os.getpid(), which)))
    assert signal.getsignal(which) == before
    assert (result.steps, result.interrupted, result.policy) == (2, True, None)
    assert (tmp_path / "stopped/run/global_step_2/state.json").is_file()
    assert "global_step_2" in capsys.readouterr().out.replace("\n", "")
    assert fit(recipe).steps == 6
    fit(tiny_recipe(tmp_path / "straight", policy_folder, *overrides))
    assert_same_run(tmp_path / "straight/run", tmp_path / "stopped/run")


def test_a_second_signal_stops_at_once(tmp_path: Path, policy_folder: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_recipe(tmp_path, policy_folder, *SIX), Stopper(2, twice))
    assert not list((tmp_path / "run").glob("global_step_*"))


# ---- which checkpoint


def test_old_checkpoints_go_and_the_newest_is_named(tmp_path: Path, policy_folder: Path) -> None:
    overrides = ["trainer.total_training_steps=5", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=2"]
    fit(tiny_recipe(tmp_path, policy_folder, *overrides))
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("global_step_*")) == ["global_step_4", "global_step_5"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "5"


def test_a_run_may_be_made_longer_and_resumed_from_a_named_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    fit(tiny_recipe(tmp_path / "straight", policy_folder, *SIX))
    short = [item for item in SIX if "total_training_steps" not in item] + ["trainer.total_training_steps=3"]
    first = fit(tiny_recipe(tmp_path / "short", policy_folder, *short))
    assert first.steps == 3
    mode = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path / 'short/run/global_step_3'}"]
    longer = f"trainer.default_local_dir={tmp_path / 'longer/run'}"
    fit(tiny_recipe(tmp_path / "short", policy_folder, *SIX, *mode, longer))
    weights = [load_file(tmp_path / name / "run/policy/model.safetensors") for name in ("straight", "longer")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_starting_anew_takes_overwrite(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *SIX)
    fit(recipe)
    with pytest.raises(RunError, match="holds a finished run: nothing is overwritten"):
        fit(tiny_recipe(tmp_path, policy_folder, *SIX, "trainer.resume_mode=disable"))
    again = fit(tiny_recipe(tmp_path, policy_folder, *SIX, "trainer.overwrite=true"))
    assert again.steps == 6
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_half_written_is_passed_over(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *SIX)
    with pytest.raises(Crash):
        fit(recipe, Stopper(8, crash))
    half = tmp_path / "run/.global_step_6.tmp"
    half.mkdir()
    (half / "training.pt").write_bytes(b"half")
    assert fit(recipe).steps == 6
    assert not half.exists()


# ---- what can't be resumed


@pytest.fixture
def saved(tmp_path: Path, policy_folder: Path) -> Path:
    """The run folder after a crash with a checkpoint of step 3."""
    with pytest.raises(Crash):
        fit(tiny_recipe(tmp_path, policy_folder, *SIX), Stopper(8, crash))
    return tmp_path / "run"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "weights truncated": lambda c: truncate(c / "training.pt"),
    "weights empty": lambda c: (c / "training.pt").write_bytes(b""),
    "weights garbage": lambda c: (c / "training.pt").write_bytes(b"not a checkpoint at all"),
    "weights missing": lambda c: (c / "training.pt").unlink(),
    "weights of something else": lambda c: torch.save({"model": torch.zeros(2)}, c / "training.pt"),
    "optimizer missing": lambda c: torch.save(
        {"masters": torch.load(c / "training.pt")["masters"], "scheduler": 3}, c / "training.pt"
    ),
    "weights with code": lambda c: torch.save(SyntheticScorer(letter_share), c / "training.pt"),
    "state truncated": lambda c: truncate(c / "state.json"),
    "state missing": lambda c: (c / "state.json").unlink(),
    "state of something else": lambda c: (c / "state.json").write_text('{"steps": 1}'),
    "state a list": lambda c: (c / "state.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(
    saved: Path, tmp_path: Path, policy_folder: Path, damage: Any
) -> None:
    damage(saved / "global_step_3")
    metrics = (saved / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="global_step_3") as error:
        fit(tiny_recipe(tmp_path, policy_folder, *SIX))
    assert "fix: delete it" in str(error.value)
    assert (saved / "metrics.jsonl").read_text() == metrics, "nothing may be changed before the checkpoint is read"


@pytest.mark.parametrize("change", [f"{ACTOR}optim.lr=1e-4", "actor_rollout_ref.rollout.n=2", "data.seed=9"])
def test_a_checkpoint_of_another_recipe_is_refused(
    saved: Path, tmp_path: Path, policy_folder: Path, change: str
) -> None:
    with pytest.raises(CheckpointError, match="another recipe"):
        fit(tiny_recipe(tmp_path, policy_folder, *SIX, change))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("rm/head.bin", "reward_model.model.path"),
        ("policy/config.json", "actor_rollout_ref.model.path"),
        ("train.parquet", "data.train_files"),
    ],
)
def test_other_contents_under_the_same_paths_are_refused(
    tmp_path: Path, policy_folder: Path, changed: str, named: str
) -> None:
    """An RM made anew in its folder would silently change what the second half of a run is trained against."""
    policy, rm = tmp_path / "policy", tmp_path / "rm"
    shutil.copytree(policy_folder, policy)
    rm.mkdir()
    (rm / "head.bin").write_bytes(b"one")

    settings = [f"reward_model.model.path={rm}", "trainer.save_freq=1"]
    one, two = (tiny_recipe(tmp_path, policy, *settings, f"trainer.total_training_steps={n}") for n in (1, 2))
    fit(one)
    shutil.rmtree(tmp_path / "run/policy")
    target = tmp_path / changed
    before = target.read_bytes()
    if target.suffix == ".parquet":
        table = pq.read_table(target)
        pq.write_table(table.slice(0, table.num_rows - 1), target)
    else:
        target.write_bytes(before + b"\n")
    with pytest.raises(CheckpointError, match="other contents") as error:
        fit(two)
    assert named in str(error.value)
    assert "fix: put it back" in str(error.value)
    target.write_bytes(before)
    assert fit(two).steps == 2


def test_other_contents_of_any_of_several_reward_models_are_refused(tmp_path: Path, policy_folder: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "head.bin").write_bytes(b"as it was")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    models = ",".join(f"{{path: {tmp_path / name}}}" for name in ("one", "two"))
    settings = [f"reward_model.models=[{models}]", f"reward_model.reference_data={rows}", "trainer.save_freq=1"]
    one, two = (tiny_recipe(tmp_path, policy_folder, *settings, f"trainer.total_training_steps={n}") for n in (1, 2))
    fit(one)
    shutil.rmtree(tmp_path / "run/policy")
    for file in (tmp_path / "two/head.bin", rows):
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(CheckpointError, match="other contents of reward_model: ") as error:
            fit(two)
        assert str(file.parent if file.name == "head.bin" else file) in str(error.value)
        file.write_bytes(before)
    assert fit(two).steps == 2


def test_what_does_not_change_the_training_may_change_on_resume(
    saved: Path, tmp_path: Path, policy_folder: Path
) -> None:
    free = ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.group_log_freq=2", "trainer.logger=[console]"]
    assert fit(tiny_recipe(tmp_path, policy_folder, *SIX, *free, "evaluation.n=1")).steps == 6


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path, policy_folder: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_folder, other)
    tensors = torch.load(saved / "global_step_3/training.pt", weights_only=True)
    tensors["masters"] = tensors["masters"][:-1]
    torch.save(tensors, saved / "global_step_3/training.pt")
    write_manifest(saved / "global_step_3")
    with pytest.raises(CheckpointError, match="do not fit"):
        fit(tiny_recipe(tmp_path, policy_folder, *SIX))


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path: Path, policy_folder: Path) -> None:
    mode = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}"]
    with pytest.raises(CheckpointError, match=r"no state\.json"):
        fit(tiny_recipe(tmp_path, policy_folder, *mode))


# ---- a disk that is full


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk (the error is the system's own)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(saved: Path, tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, *SIX)
    trainer = Trainer(recipe, prefers("e"))
    with files_at_most(100_000), pytest.raises(RunError, match=r"checkpoint .*global_step_6 can't be written") as error:
        trainer.fit()
    assert "fix: free space" in str(error.value)
    assert sorted(path.name for path in saved.glob("*global_step_*")) == ["global_step_3"]
    assert fit(recipe).steps == 6


def test_a_full_disk_at_the_end_leaves_no_half_policy(tmp_path: Path, policy_folder: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, policy_folder, "trainer.total_training_steps=1"), prefers("e"))
    with files_at_most(100_000), pytest.raises(RunError, match="policy can't be written to"):
        trainer.fit()
    assert not (tmp_path / "run/policy").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_moments_are_read_into_the_memory_that_holds_them(saved: Path, tmp_path: Path, policy_folder: Path) -> None:
    """`load_state_dict` would hold both for a while: 8 bytes a parameter more than training takes."""
    trainer = Trainer(tiny_recipe(tmp_path, policy_folder, *SIX), prefers("e"))
    held = {id(p): s["exp_avg"].data_ptr() for p, s in trainer.actor.optimizer.state.items()}
    assert not any(bool(s["exp_avg"].any()) for s in trainer.actor.optimizer.state.values())
    state = resume(trainer.recipe, trainer.actor, trainer.provenance)
    assert state.step > 0
    assert {id(p): s["exp_avg"].data_ptr() for p, s in trainer.actor.optimizer.state.items()} == held
    assert all(float(s["step"]) == state.step for s in trainer.actor.optimizer.state.values())
    assert any(bool(s["exp_avg"].any()) for s in trainer.actor.optimizer.state.values())


def test_state_is_readable_json(saved: Path) -> None:
    state = json.loads((saved / "global_step_3/state.json").read_text())
    assert state["step"] == 3
    assert state.keys() == {field.name for kind in (TrainingState, Provenance) for field in dataclasses.fields(kind)}
    assert [key.split(":")[0] for key in state["made_with"]["inputs"]] == [
        "actor_rollout_ref.model.path",
        "data.train_files",
    ]
