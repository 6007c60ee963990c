"""What is decided before verl starts: where it goes on from, and what must not stay of a run that is begun anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_training import tiny_recipe
from ups_rm.distributed.engine import HASH, LATEST, forget_after, newest_checkpoint, prepare, steps_done
from ups_rm.errors import CheckpointError
from ups_rm.recipe_hash import recipe_hash

pytest.importorskip("verl", reason="verl is an extra")
RM = "reward_model.model.path=rm"


def saved(folder: Path, step: int, *, part: str = "actor") -> Path:
    checkpoint = folder / f"global_step_{step}"
    (checkpoint / part).mkdir(parents=True)
    (folder / LATEST).write_text(str(step))
    return checkpoint


def test_a_run_goes_on_from_verls_newest_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, RM)
    run = prepare(recipe)
    assert steps_done(recipe) == 0
    for step in (1, 2):
        saved(run.folder, step)
    assert steps_done(recipe) == 2
    older = [RM, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={run.folder / 'global_step_1'}"]
    assert steps_done(tiny_recipe(tmp_path, policy_folder, *older)) == 1
    assert steps_done(tiny_recipe(tmp_path, policy_folder, RM, "trainer.resume_mode=disable")) == 0


def test_checkpoints_of_others_are_refused(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, RM)
    run = prepare(recipe)
    assert (run.folder / "verl" / HASH).read_text() == recipe_hash(recipe)
    saved(run.folder, 1)
    with pytest.raises(CheckpointError, match="made with another recipe"):
        steps_done(tiny_recipe(tmp_path, policy_folder, RM, "actor_rollout_ref.actor.optim.lr=1e-5"))
    assert steps_done(tiny_recipe(tmp_path, policy_folder, RM, "trainer.total_training_steps=9")) == 1
    saved(run.folder, 2, part="of_the_local_engine")
    with pytest.raises(CheckpointError, match="no checkpoint of the verl engine"):
        steps_done(tiny_recipe(tmp_path, policy_folder, RM))


def test_a_policy_may_be_named_by_a_relative_path(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy_folder.parent)
    recipe = tiny_recipe(tmp_path, Path(policy_folder.name), RM)
    run = prepare(recipe)
    assert run.recipe.actor_rollout_ref.model.path == str(policy_folder)  # verl's workers have other folders
    saved(run.folder, 1)
    assert steps_done(recipe) == 1


@pytest.mark.parametrize(("start", "left"), [(0, []), (1, [1])])
def test_later_steps_leave_nothing_to_resume_from_by_mistake(
    start: int, left: list[int], tmp_path: Path, policy_folder: Path
) -> None:
    run = prepare(tiny_recipe(tmp_path, policy_folder, RM))
    for step in (1, 2):
        saved(run.folder, step)
        (run.folder / "groups").mkdir(exist_ok=True)
        (run.folder / "groups" / f"step_{step:06d}.jsonl").touch()
    forget_after(run, start)
    assert sorted(int(path.name.rpartition("_")[2]) for path in run.folder.glob("global_step_*")) == left
    assert sorted(int(file.stem[5:]) for file in (run.folder / "groups").iterdir()) == left
    assert newest_checkpoint(run.folder) == (run.folder / "global_step_1" if left else None)


def test_the_local_engine_refuses_verls_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    from tiny_training import prefers
    from ups_rm.local.trainer import Trainer

    recipe = tiny_recipe(tmp_path, policy_folder)
    saved(Path(recipe.trainer.default_local_dir), 1)
    with pytest.raises(CheckpointError, match="is a checkpoint of the verl engine"):
        Trainer(recipe, prefers("e")).fit()
