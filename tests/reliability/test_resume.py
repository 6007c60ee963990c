"""What a run goes on from: what the checkpoint holds, what may change, when there is nothing left to do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_training import prefers, tiny_recipe
from ups_rm.errors import CheckpointError, RecipeError, RunError
from ups_rm.layers.native import kernels
from ups_rm.local.trainer import Trainer
from ups_rm.tracking.jsonl import read_metrics
from ups_rm.types import TrainResult

LR = "actor_rollout_ref.actor.optim.lr"
FOUR = ["trainer.total_training_steps=4", "trainer.save_freq=2", "trainer.test_freq=2", f"{LR}=5e-3"]
SIX = ["trainer.total_training_steps=6", *FOUR[1:]]


def fit(folder: Path, policy: Path, *overrides: str) -> TrainResult:
    return Trainer(tiny_recipe(folder, policy, *overrides), prefers("e")).fit()


def state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


@pytest.fixture
def run(tmp_path: Path, policy_folder: Path) -> Path:
    """A finished run of four steps."""
    fit(tmp_path, policy_folder, *FOUR)
    return tmp_path / "run"


def test_a_checkpoint_holds_all_that_a_run_is(run: Path, tmp_path: Path, policy_folder: Path) -> None:
    found = state(run / "global_step_4")
    rows = read_metrics(run / "metrics.jsonl")
    scores = {row["step"]: row["val-core/PKU-SafeRLHF/reward/mean@1"] for row in rows if "timing_s/testing" in row}
    best = max(scores, key=lambda step: scores[step])
    assert found["best"] == {"step": best, "score": scores[best]}
    assert (found["step"], found["epoch"], found["group_log"]) == (4, 1, 4)  # 12 prompts, 4 in a batch: 3 steps
    ids = [json.loads(line)["prompt_id"] for line in (run / "groups/step_000004.jsonl").read_text().splitlines()[1:]]
    assert found["prompts"] == ids
    assert found["recipe"] == tiny_recipe(tmp_path, policy_folder, *FOUR).as_dict()
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] in torch.__version__
    )
    repo = Path(__file__).parents[2]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert found["git"].rstrip("+") == commit.stdout.strip()
    assert found["machine"]["threads"] == str(torch.get_num_threads())
    tensors = torch.load(run / "global_step_4/training.pt", weights_only=True)
    assert tensors["random"].keys() == {"python", "python_gauss", "numpy", "torch", "cuda"}


def test_a_changed_recipe_is_listed_key_by_key_and_asks(run: Path, tmp_path: Path, policy_folder: Path) -> None:
    changed = [*SIX[:-1], f"{LR}=1e-3", "actor_rollout_ref.actor.grad_clip=0.5"]
    with pytest.raises(CheckpointError) as refused:
        fit(tmp_path, policy_folder, *changed)
    told = str(refused.value)
    assert f"{LR}: 0.005, now 0.001" in told
    assert "actor_rollout_ref.actor.grad_clip: 1.0, now 0.5" in told
    assert "--allow-changes" in told
    assert len(told.splitlines()) == 4, "the two that changed and no other"
    assert fit(tmp_path, policy_folder, *changed, "trainer.allow_changes=true").steps == 6
    assert [row["actor/lr"] for row in read_metrics(run / "metrics.jsonl")] == [5e-3] * 4 + [1e-3] * 2
    assert f"after step 4: {LR}: 0.005, now 0.001" in state(run / "global_step_6")["changes"]


def test_other_threads_may_go_on_and_are_told(
    run: Path, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    capsys.readouterr()
    torch.set_num_threads(before + 1)
    try:
        assert fit(tmp_path, policy_folder, *SIX).steps == 6
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr().out
    assert f"threads: {before}, now {before + 1}" in told
    assert "no longer bitwise" in told


def test_going_on_without_the_kernels_is_told(
    run: Path, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They round otherwise than torch does."""
    if kernels() is None:
        pytest.skip("the kernels can't be built here")
    for module in ("ups_rm.layers.native", "ups_rm.local.provenance"):
        monkeypatch.setattr(f"{module}.kernels", lambda: None)
    capsys.readouterr()
    assert fit(tmp_path, policy_folder, *SIX).steps == 6
    told = capsys.readouterr().out
    assert "kernels: C++, now torch" in told
    assert "no longer bitwise" in told


def test_the_same_machine_is_told_nothing(
    run: Path, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    fit(tmp_path, policy_folder, *SIX)
    assert "bitwise" not in capsys.readouterr().out


def test_another_order_of_the_data_is_found_out(
    run: Path, tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of torch that shuffles otherwise: same recipe, same files, other prompts."""
    shuffled = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: shuffled(n, **more).flip(0))
    with pytest.raises(CheckpointError, match="the order of the data is another one"):
        fit(tmp_path, policy_folder, *SIX)


def test_nothing_left_to_do_says_so_and_changes_nothing(
    run: Path, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.name != "writer.lock"}
    capsys.readouterr()
    result = fit(tmp_path, policy_folder, *FOUR)
    assert (result.steps, result.interrupted, result.policy) == (4, False, run / "policy")
    assert "nothing left to do: 4 steps are done" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.name != "writer.lock"} == before


def test_a_finished_run_without_checkpoints_has_nothing_left_to_do_either(tmp_path: Path, policy_folder: Path) -> None:
    alone = ["trainer.total_training_steps=2"]
    fit(tmp_path, policy_folder, *alone)
    assert fit(tmp_path, policy_folder, *alone).steps == 2
    with pytest.raises(RunError, match="nothing is overwritten"):
        fit(tmp_path, policy_folder, *alone, f"{LR}=1e-4")


def test_a_run_of_no_steps_is_an_error(run: Path, tmp_path: Path, policy_folder: Path) -> None:
    mode = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={run / 'global_step_4'}"]
    elsewhere = f"trainer.default_local_dir={tmp_path / 'elsewhere'}"
    with pytest.raises(RunError, match=r"would train no step: .*global_step_4 is of step 4, the recipe has 4"):
        fit(tmp_path, policy_folder, *FOUR, *mode, elsewhere)
    assert not (tmp_path / "elsewhere/policy").exists()
    with pytest.raises(RecipeError, match="total_training_steps=0 must be at least 1"):
        fit(tmp_path, policy_folder, "trainer.total_training_steps=0")


def test_two_names_of_one_setting_may_not_disagree(tmp_path: Path, policy_folder: Path) -> None:
    with pytest.raises(RecipeError, match="two names for one setting"):
        tiny_recipe(tmp_path, policy_folder, "trainer.max_ckpt_to_keep=2", "trainer.max_actor_ckpt_to_keep=3")


# ---- curves


def test_tensorboard_shows_every_step_once_after_kills(tmp_path: Path, policy_folder: Path) -> None:
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install "ups-rm[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Crash(Exception):
        pass

    class Crashing(Trainer):
        stop_in = 0

        def step(self, prompts: Any, number: int) -> Any:
            if number == self.stop_in:
                raise Crash
            return super().step(prompts, number)

    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR, "trainer.logger=[tensorboard]", "trainer.save_freq=3")
    for Crashing.stop_in in (2, 3):  # both before the first checkpoint, then one after steps that it has not seen
        with pytest.raises(Crash):
            Crashing(recipe, prefers("e")).fit()
    assert Trainer(recipe, prefers("e")).fit().steps == 4
    events = EventAccumulator(str(tmp_path / "run/tensorboard" / recipe.trainer.experiment_name))
    events.Reload()
    logged = {row["step"]: row["actor/loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl")}
    points = [(event.step, event.value) for event in events.Scalars("actor/loss")]
    assert [step for step, _ in points] == [1, 2, 3, 4]
    assert all(value == pytest.approx(logged[step], rel=1e-6) for step, value in points)


def test_the_message_of_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os
    import signal

    class Asked:
        def score(self, conversations: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return prefers("e").score(conversations)

    recipe = tiny_recipe(tmp_path, policy_folder, *FOUR)
    Trainer(recipe, Asked()).fit()
    told = capsys.readouterr().out
    assert re.search(r"interrupted after step 1; checkpoint: .*global_step_1. The same command resumes", told)
