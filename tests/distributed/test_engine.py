"""What is decided before verl starts: where it goes on from, and what must not stay of a run that is begun anew."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tiny_training import base_overrides, recipe_yaml, tiny_recipe
from ups_rm.checkpoints import LATEST
from ups_rm.distributed import engine
from ups_rm.distributed.engine import begin_at, check_machine, newest_checkpoint, prepare
from ups_rm.errors import CheckpointError, RMError, RMServerError, RunError
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.recipe_hash import MadeWith
from ups_rm.reward import open as opening

pytest.importorskip("verl", reason="verl is an extra")
RM = "reward_model.model.path=rm"


def steps_done(recipe: Recipe) -> int:
    return engine.steps_done(recipe, MadeWith.of(recipe))


def started(recipe: Recipe, step: int = 0) -> engine.VerlRun:
    run = prepare(recipe)
    begin_at(run, step, MadeWith.of(recipe))
    return run


def for_verl(folder: Path, policy: Path, *overrides: str) -> Recipe:
    """The tiny recipe, cut as verl needs it."""
    sizes = [f"actor_rollout_ref.{part}.log_prob_micro_batch_size_per_gpu=8" for part in ("rollout", "ref")]
    given = [*base_overrides(folder, policy), *sizes, "trainer.n_gpus_per_node=1", *overrides]
    return load_recipe(recipe_yaml(folder), given, engine="verl")


def saved(folder: Path, step: int, *, part: str = "actor") -> Path:
    checkpoint = folder / f"global_step_{step}"
    (checkpoint / part).mkdir(parents=True)
    (folder / LATEST).write_text(str(step))
    return checkpoint


def test_a_run_goes_on_from_verls_newest_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, RM)
    run = started(recipe)
    assert steps_done(recipe) == 0
    for step in (1, 2):
        saved(run.folder, step)
    assert steps_done(recipe) == 2
    older = [RM, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={run.folder / 'global_step_1'}"]
    assert steps_done(tiny_recipe(tmp_path, policy_folder, *older)) == 1
    assert steps_done(tiny_recipe(tmp_path, policy_folder, RM, "trainer.resume_mode=disable")) == 0


def test_checkpoints_of_others_are_refused(tmp_path: Path, policy_folder: Path) -> None:
    recipe = for_verl(tmp_path, policy_folder, RM)
    run = started(recipe)
    saved(run.folder, 1)
    with pytest.raises(CheckpointError, match="made with another recipe"):
        steps_done(for_verl(tmp_path, policy_folder, RM, "actor_rollout_ref.actor.optim.lr=1e-5"))
    may_differ = ["trainer.total_training_steps=9", "reward_model.timeout_s=9", "reward_model.num_workers=3"]
    assert steps_done(for_verl(tmp_path, policy_folder, RM, *may_differ)) == 1
    saved(run.folder, 2, part="of_the_local_engine")
    with pytest.raises(CheckpointError, match="no checkpoint of the verl engine"):
        steps_done(recipe)


def test_a_policy_may_be_named_by_a_relative_path(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy_folder.parent)
    recipe = tiny_recipe(tmp_path, Path(policy_folder.name), RM)
    run = started(recipe)
    assert run.recipe.actor_rollout_ref.model.path == str(policy_folder)  # verl's workers have other folders
    saved(run.folder, 1)
    assert steps_done(recipe) == 1


@pytest.mark.parametrize(("start", "left"), [(0, []), (1, [1])])
def test_later_steps_leave_nothing_to_resume_from_by_mistake(
    start: int, left: list[int], tmp_path: Path, policy_folder: Path
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, RM)
    run = prepare(recipe)
    for step in (1, 2):
        saved(run.folder, step)
        (run.folder / "groups").mkdir(exist_ok=True)
        (run.folder / "groups" / f"step_{step:06d}.jsonl").touch()
    begin_at(run, start, MadeWith.of(recipe))
    assert sorted(int(path.name.rpartition("_")[2]) for path in run.folder.glob("global_step_*")) == left
    assert sorted(int(file.stem[5:]) for file in (run.folder / "groups").glob("step_*.jsonl")) == left
    assert newest_checkpoint(run.folder) == (run.folder / "global_step_1" if left else None)


def test_the_local_engine_refuses_verls_checkpoint(tmp_path: Path, policy_folder: Path) -> None:
    from tiny_training import prefers
    from ups_rm.local.trainer import Trainer

    recipe = tiny_recipe(tmp_path, policy_folder)
    saved(Path(recipe.trainer.default_local_dir), 1)
    with pytest.raises(CheckpointError, match="is a checkpoint of the verl engine"):
        Trainer(recipe, prefers("e")).fit()


@pytest.mark.parametrize("what", ["policy", "reward model", "prompts"])
def test_a_checkpoint_of_other_contents_under_the_same_paths_is_refused(
    what: str, tmp_path: Path, policy_folder: Path, rm_folder: Path
) -> None:
    policy, rm = tmp_path / "policy", tmp_path / "rm"
    shutil.copytree(policy_folder, policy)
    shutil.copytree(rm_folder, rm)
    recipe = tiny_recipe(tmp_path, policy, f"reward_model.model.path={rm}")
    saved(started(recipe).folder, 1)
    assert steps_done(recipe) == 1
    file, named = {
        "policy": (policy / "config.json", "actor_rollout_ref.model.path"),
        "reward model": (rm / "config.json", "reward_model.model.path"),
        "prompts": (tmp_path / "train.parquet", f"data.train_files: {tmp_path / 'train.parquet'}"),
    }[what]
    with file.open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(CheckpointError, match=f"made with other contents of {named}: what stood there was replaced"):
        steps_done(recipe)


def test_a_checkpoint_that_nothing_vouches_for_is_said_to_be_unchecked(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, policy_folder, RM)
    saved(Path(recipe.trainer.default_local_dir), 1)
    assert steps_done(recipe) == 1
    assert "is not checked" in capsys.readouterr().out


# ---- what verl would need a minute to fail on


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(opening, "SERVICE_S", 1.0)


@pytest.mark.parametrize("kind", ["auto", "myrm"])
def test_a_wrong_rm_path_is_told_at_once(kind: str, on_cpu: None, tmp_path: Path, policy_folder: Path) -> None:
    where = [f"reward_model.model.path={tmp_path / 'no-such-rm'}", f"reward_model.model.kind={kind}"]
    with pytest.raises(RMError, match="no-such-rm"):
        check_machine(for_verl(tmp_path, policy_folder, *where))
    check_machine(for_verl(tmp_path, policy_folder, *where, "reward_model.placement=node"))  # it is on the RM's nodes


def test_another_program_on_the_services_port_is_told_at_once(
    on_cpu: None, tmp_path: Path, policy_folder: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # it never says a word
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        where = [f"reward_model.model.url={url}", "reward_model.placement=http"]
        with pytest.raises(RMServerError, match=f"{url} did not score 1 conversations: ReadTimeout"):
            check_machine(for_verl(tmp_path, policy_folder, *where))


@pytest.mark.parametrize("taken", [True, False])
def test_an_address_without_a_ray_cluster_is_told_before_the_run(
    taken: bool, on_cpu: None, tmp_path: Path, policy_folder: Path, rm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CLUSTER_S", 6.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        if not taken:
            other.close()
        where = [f"reward_model.model.path={rm_folder}", f"ray_kwargs.ray_init.address={address}"]
        with pytest.raises(RunError, match=f"ray_kwargs.ray_init.address={address} is no Ray cluster"):
            check_machine(for_verl(tmp_path, policy_folder, *where))
