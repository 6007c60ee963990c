"""`--engine verl`: one training, from a recipe to a run folder like the local engine's.

prompts laid out -> recipe translated -> verl run -> metrics.jsonl, group log -> checkpoint merged to `<run>/policy`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ups_rm.checkpoints import LATEST, drop_checkpoints_after, step_of
from ups_rm.console import console, progress_bar
from ups_rm.data.batches import select_prompts, steps_per_epoch
from ups_rm.data.prompts import read_prompts
from ups_rm.distributed.launch import VerlProcess, python_command
from ups_rm.distributed.prompts import PromptFiles, lay_out_prompts
from ups_rm.distributed.rewards import check_reachable
from ups_rm.distributed.translate import check_for_verl, run_environment, to_yaml, verl_config, verl_overrides
from ups_rm.errors import CheckpointError, PolicyError, RecipeError, RunError
from ups_rm.model_files import check_model_folder, panics_as_errors
from ups_rm.models import resolve_model
from ups_rm.recipe import Recipe, as_list
from ups_rm.recipe_hash import MadeWith
from ups_rm.tracking.made_with import write_made_with
from ups_rm.types import TrainResult

VERL_VERSION = "0.9.1"
CLUSTER_S = 30.0
"""Within which a Ray cluster must say what it has."""
STARTED_WITH = "started_with.json"
"""In `<run>/verl`: recipe and content of what it names, as the run was started."""


@dataclass(frozen=True)
class VerlRun:
    """What is about to run: verl's command and configuration."""

    recipe: Recipe
    prompts: PromptFiles
    overrides: list[str]

    @property
    def folder(self) -> Path:
        """The run folder; verl's own files go to `verl` in it."""
        return Path(self.recipe.trainer.default_local_dir)

    @property
    def command(self) -> list[str]:
        return python_command(self.overrides, self.folder / "verl")


def train(recipe: Recipe) -> TrainResult:
    """Train with verl, resuming from its newest checkpoint, and leave what the local engine leaves.

    Raises:
        RecipeError, CheckpointError, RunError: before verl starts where possible; verl's own failures with its last
            error. RMError: the reward model could not be loaded or used in verl.
    """
    from ups_rm.distributed.export import export_policy
    from ups_rm.interrupt import interruptible
    from ups_rm.monitor.watch import Monitor, stop_message
    from ups_rm.tracking.console_line import live_note
    from ups_rm.tracking.trackers import Trackers

    check_machine(recipe)
    made_with = MadeWith.of(recipe)
    start = steps_done(recipe, made_with)
    folder = Path(recipe.trainer.default_local_dir)
    if start == 0 and (folder / "policy").exists() and not recipe.trainer.overwrite:
        raise RunError(
            f"{folder} holds a finished run: nothing is overwritten\n"
            "  fix: another trainer.default_local_dir (--out, OUTPUT_DIR), move this one away, or --overwrite"
        )
    run = prepare(recipe)
    begin_at(run, start, made_with)
    seen: dict[str, Any] = {"step": start, "metrics": {}}
    trainer = recipe.trainer
    trackers = Trackers(
        ["console"] if "console" in as_list(trainer.logger) else [],  # the others are verl's own
        project_name=trainer.project_name,
        experiment_name=trainer.experiment_name,
        folder=folder,
        config=recipe.as_dict(),
        resume_step=start or None,
        total_steps=run.prompts.total_steps,
    )

    monitor = Monitor(trackers, recipe.monitor, start)
    total = run.prompts.total_steps
    finished = start >= total
    with (
        trackers,
        interruptible("ending verl (checkpoints are those of trainer.save_freq)") as stop,
        progress_bar("GRPO", total, unit="steps", enabled=console.is_terminal, done=start) as advance,
    ):

        def took(metrics: dict[str, float], step: int) -> None:
            monitor.log(metrics, step)
            advance(steps=step - seen["step"], note=live_note(metrics))
            seen.update(step=step, metrics=metrics)

        if not finished:
            console.print(f"verl runs; all that it prints: {folder / 'verl' / 'console.log'}", soft_wrap=True)
            finished = process_of(run, took).run(lambda: stop.requested or monitor.stopped_by is not None)
    if not finished and monitor.stopped_by is not None:
        said = stop_message(monitor.stopped_by, seen["step"], newest_checkpoint(folder))
        console.print(said, markup=False, soft_wrap=True)
        return TrainResult(folder, None, seen["step"], False, seen["metrics"], monitor.stopped_by.name)
    if not finished:
        saved = newest_checkpoint(folder)
        goes_on = f"goes on from {saved}" if saved else "begins anew: no checkpoint was written (trainer.save_freq)"
        console.print(f"interrupted after step {seen['step']}; the same command {goes_on}", soft_wrap=True)
        return TrainResult(folder, None, seen["step"], True, seen["metrics"])
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise RunError(f"verl ended without a checkpoint in {folder}\n  see {folder / 'verl' / 'console.log'}")
    policy = export_policy(
        checkpoint, folder / "policy", trust_remote_code=recipe.actor_rollout_ref.model.trust_remote_code
    )
    return TrainResult(folder, policy, seen["step"], False, seen["metrics"])


def prepare(recipe: Recipe) -> VerlRun:
    """Lay the prompts out and write `recipe.yaml`, `verl/config.yaml` and `verl/command.sh`."""
    model = recipe.actor_rollout_ref.model
    model = replace(model, path=str(_absolute(resolve_model(model.path))))
    recipe = replace(recipe, actor_rollout_ref=replace(recipe.actor_rollout_ref, model=model))
    folder = Path(recipe.trainer.default_local_dir)
    prompts = lay_out_prompts(recipe, _tokenizer(model.path, model.trust_remote_code), folder / "verl")
    overrides = verl_overrides(recipe, prompts)
    run = VerlRun(recipe, prompts, overrides)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_made_with(folder, engine="verl")
    (folder / "verl" / "config.yaml").write_text(to_yaml(verl_config(overrides)), encoding="utf-8")
    (folder / "verl" / "command.sh").write_text(shlex.join(run.command) + "\n", encoding="utf-8")
    return run


def process_of(run: VerlRun, on_metrics: Any) -> VerlProcess:
    """The process to run, with what verl and Ray read from the environment."""
    limits = run.recipe.verl
    metrics_file = run.folder.absolute() / "verl" / "metrics.jsonl"  # verl begins it anew, also when it resumes
    metrics_file.unlink(missing_ok=True)
    return VerlProcess(
        command=run.command,
        env=os.environ | DRIVER_ENV | run_environment(run.recipe),
        log=run.folder / "verl" / "console.log",
        run_folder=run.folder,
        metrics_file=metrics_file,
        on_metrics=on_metrics,
        time_limit=limits.time_limit,
        silence_limit=limits.silence_limit,
    )


DRIVER_ENV = {
    "HYDRA_FULL_ERROR": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_DEDUP_LOGS": "0",  # every worker's error is wanted
    # one idle process per CPU that `ray.init` waits for; verl's actors have another environment and never use them
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def begin_at(run: VerlRun, step: int, made_with: MadeWith) -> None:
    """Remove what later steps left, and note what the run starts with: a crash must not resume from another run's."""
    from ups_rm.tracking.group_log import GroupLog

    drop_checkpoints_after(run.folder, step)
    tracker = run.folder / LATEST
    if (run.folder / f"global_step_{step}").is_dir():
        tracker.write_text(str(step), encoding="utf-8")
    else:
        tracker.unlink(missing_ok=True)
    GroupLog(Path(run.recipe.trainer.group_log_dir)).drop_after(step)
    (run.folder / "verl" / STARTED_WITH).write_text(json.dumps(asdict(made_with), indent=1), encoding="utf-8")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that verl's own tracker file names."""
    tracker = folder / LATEST
    if not tracker.is_file():
        return None
    return folder / f"global_step_{tracker.read_text(encoding='utf-8').strip()}"


def steps_done(recipe: Recipe, made_with: MadeWith) -> int:
    """The step that verl will go on from; 0 for a new training.

    Args:
        made_with: the recipe, and what it names, at present.

    Raises:
        CheckpointError: no checkpoint of verl's, or one of another recipe, policy, reward model or prompts.
    """
    trainer, folder = recipe.trainer, Path(recipe.trainer.default_local_dir)
    if trainer.resume_mode == "disable" or trainer.overwrite:
        return 0
    path = Path(trainer.resume_from_path or "") if trainer.resume_mode == "resume_path" else newest_checkpoint(folder)
    if path is None:
        return 0
    if not (path / "actor").is_dir() or not path.name.startswith("global_step_"):
        raise CheckpointError(f"{path} is no checkpoint of the verl engine: it has no folder `actor`")
    started_with = path.parent / "verl" / STARTED_WITH
    if started_with.is_file():
        MadeWith(**json.loads(started_with.read_text(encoding="utf-8"))).check(
            made_with, path, allow_changes=trainer.allow_changes
        )
    else:
        console.print(f"{path}: there is no {started_with} to say what made it, so that is not checked", soft_wrap=True)
    return step_of(path)


def check_machine(recipe: Recipe, *, rm_follows: bool = False) -> None:
    """What verl would fail on after a minute is said at once.

    Raises:
        RunError: verl, its rollout, GPUs or the Ray cluster are missing. RecipeError: a key that verl can't honour.
        RMError, RMServerError: see `check_reachable`.
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    import torch

    check_for_verl(recipe)
    if not recipe.reward_model.entries() and not rm_follows:
        raise RecipeError(
            "reward_model.model.path is empty\n"
            "  fix: give an RM folder (REWARD_MODEL_PATH=FOLDER), or use `ups-rm run`, which makes one"
        )
    try:
        found = version("verl")
    except PackageNotFoundError as error:
        raise RunError('the verl engine needs verl 0.9.1\n  fix: pip install "ups-rm[verl]"') from error
    if found != VERL_VERSION:
        raise RunError(
            f"verl {found} is installed, the verl engine needs {VERL_VERSION}\n  fix: pip install verl==0.9.1"
        )
    check_reachable(recipe.reward_model)
    if recipe.ray_kwargs.ray_init.address:
        _check_cluster(recipe.ray_kwargs.ray_init.address)
        return  # another machine's devices and packages
    device, wanted = recipe.trainer.device, recipe.trainer.n_gpus_per_node
    if device == "cpu":
        if "VERL_PLATFORM" not in os.environ:
            raise RunError(
                "trainer.device=cpu: stock verl trains on GPUs (a platform of your own: VERL_PLATFORM)\n"
                "  fix: ENGINE=local"
            )
        return
    if torch.cuda.device_count() < wanted:
        raise RunError(
            f"trainer.n_gpus_per_node={wanted}, but torch sees {torch.cuda.device_count()} CUDA devices here\n"
            "  fix: ENGINE=local on this machine; trainer.n_gpus_per_node; or ray_kwargs.ray_init.address=HEAD:PORT to "
            "join a cluster"
        )
    rollout = recipe.actor_rollout_ref.rollout.name
    if rollout in ("vllm", "sglang") and find_spec(rollout) is None:
        raise RunError(f'rollout.name={rollout} is not installed\n  fix: pip install "verl[{rollout}]==0.9.1"')


def _check_cluster(address: str) -> None:
    """Ray itself tries for minutes, and then says little, where nothing or something else is at the address.

    Raises:
        RunError: no Ray cluster answers there.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    command += [] if address == "auto" else ["--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLUSTER_S)
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        why = said if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"no answer within {CLUSTER_S:g} s: nothing is there, or another program has the port"
    if why:
        raise RunError(
            f"ray_kwargs.ray_init.address={address} is no Ray cluster: {why}\n"
            "  fix: start one (docs/gpu.md#several-nodes); `ray status --address HEAD:PORT` shows it"
        )


def dry_run(recipe: Recipe) -> None:
    """Print verl's configuration and command; nothing is downloaded, loaded or written.

    Steps are counted from the prompt files, before overlong prompts are left out; where these are not there yet, they
    are `trainer.total_training_steps`, else 0.
    """
    folder = Path(recipe.trainer.default_local_dir) / "verl"
    check_for_verl(recipe)
    given = recipe.trainer.total_training_steps
    steps, per_epoch = given or 0, 1
    if all(Path(file).is_file() for file in as_list(recipe.data.train_files)):
        rows = select_prompts(read_prompts(as_list(recipe.data.train_files)), recipe.data)
        per_epoch = steps_per_epoch(len(rows), recipe.data)
        steps = per_epoch * recipe.trainer.total_epochs
        steps = steps if given is None else min(steps, given)
    overrides = verl_overrides(recipe, PromptFiles(folder / "train.parquet", folder / "val.parquet", steps, per_epoch))
    console.print(to_yaml(verl_config(overrides)), markup=False, soft_wrap=True)
    console.print(shlex.join(python_command(overrides, folder)), markup=False, soft_wrap=True)


def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    check_model_folder(path, PolicyError, trust_remote_code=trust_remote_code)
    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise PolicyError(f"the tokenizer of {path} can't be loaded: {error}") from error


def _absolute(path: str) -> str:
    """A folder as an absolute path; a hub id as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path
