"""The run folder: whether a run may begin there, what it goes on from, and what says that it is done.

`<run>/finished.json` is written with the trained policy: the same command then has nothing left to do. A folder that
holds a run is never begun anew unless `trainer.overwrite` says so.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ups_rm.checkpoints import checkpoints, drop_checkpoints_after
from ups_rm.console import console
from ups_rm.durable import publish_folder, remove_folder, require_space, sweep, write_text
from ups_rm.errors import RunError
from ups_rm.local.actor import Actor
from ups_rm.local.checkpoint import Provenance, TrainingState, find_checkpoint, load_checkpoint, prune
from ups_rm.local.policy import Policy
from ups_rm.recipe import Recipe
from ups_rm.recipe_hash import MadeWith
from ups_rm.types import TrainResult

FINISHED = "finished.json"


def finished_run(recipe: Recipe, made_with: MadeWith) -> TrainResult | None:
    """The result of the run that this recipe asks for, where its folder already holds it."""
    trainer, folder = recipe.trainer, Path(recipe.trainer.default_local_dir)
    try:
        told = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        then, length, steps = MadeWith(**told["made_with"]), told["length"], int(told["steps"])
        metrics = dict(told["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if trainer.resume_mode != "auto" or trainer.overwrite or not (folder / "policy").is_dir():
        return None
    if any(then.changes(made_with)) or length != _length(recipe):
        return None
    return TrainResult(folder, folder / "policy", steps, False, metrics)


def check_folder(recipe: Recipe, made_with: MadeWith) -> None:
    """Whether a run may begin or go on in the recipe's folder.

    Raises:
        RunError: it holds a run that would be replaced.
        CheckpointError: all its checkpoints are damaged.
    """
    trainer, folder = recipe.trainer, Path(recipe.trainer.default_local_dir)
    if trainer.overwrite or finished_run(recipe, made_with):
        return
    has_policy = (folder / "policy").exists()
    if trainer.resume_mode == "disable" and (has_policy or checkpoints(folder)):
        what = "finished run" if has_policy else "run with checkpoints"
    elif trainer.resume_mode == "auto" and has_policy and not checkpoints(folder):
        what = "finished run"
    else:
        return
    raise RunError(
        f"{folder} holds a {what}: nothing is overwritten\n"
        "  fix: another trainer.default_local_dir (--out, OUTPUT_DIR), move this one away, or --overwrite "
        "(trainer.overwrite=true)"
    )


def resume(recipe: Recipe, actor: Actor, now: Provenance) -> TrainingState:
    """The state to go on from, with the actor put there; step 0 for a new run. Changes nothing on the disk.

    Raises:
        CheckpointError, RunError: see `check_folder` and `load_checkpoint`.
    """
    check_folder(recipe, now.made_with)
    path = None if recipe.trainer.overwrite else find_checkpoint(recipe)
    if path is None:
        return TrainingState()
    state, elsewhere = load_checkpoint(path, actor, now, allow_changes=recipe.trainer.allow_changes)
    if path.resolve().parent != Path(recipe.trainer.default_local_dir).resolve():
        state.run_ids = {}  # another run's checkpoint: this one's curves are its own
    console.print(f"resumed from {path} after step {state.step}", soft_wrap=True)
    if elsewhere:
        console.print(
            f"  made elsewhere ({'; '.join(elsewhere)}): allowed, but from here on no longer bitwise the run that was "
            "never interrupted",
            markup=False,
            soft_wrap=True,
        )
    return state


def begin(recipe: Recipe, state: TrainingState) -> bool:
    """Make the folder ready to train on after `state`; whether a run of the same recipe began there before.

    Raises:
        RunError: the folder can't be written.
    """
    trainer, folder = recipe.trainer, Path(recipe.trainer.default_local_dir)
    file, text = folder / "recipe.yaml", recipe.to_yaml()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if trainer.overwrite and state.step == 0:
            remove_folder(folder / "policy")
        drop_checkpoints_after(folder, state.step)
        prune(folder, trainer.ckpt_to_keep, trainer.best_ckpt_to_keep)  # a full disk may be why fewer are kept now
        (folder / FINISHED).unlink(missing_ok=True)
        begun = trainer.resume_mode == "auto" and file.is_file() and file.read_text(encoding="utf-8") == text
        write_text(file, text)
    except OSError as error:
        raise RunError(
            f"{folder} can't be written: {error.strerror}\n"
            "  fix: free space (trainer.max_ckpt_to_keep=1 keeps one checkpoint), or another run folder (--out)"
        ) from error
    return begun and not trainer.overwrite


def save_policy(
    recipe: Recipe,
    policy: Policy,
    made_with: MadeWith,
    *,
    steps: int,
    metrics: dict[str, float],
    complete: bool = True,
) -> Path:
    """`<run>/policy`: a Hugging Face folder that plain transformers loads, replaced as a whole.

    Args:
        complete: all steps are done, so that `finished.json` says so.

    Raises:
        RunError: the disk is full or can't be written; a policy that was there before stays.
    """
    from safetensors import SafetensorError

    folder = Path(recipe.trainer.default_local_dir)
    final, temporary = folder / "policy", folder / ".policy.tmp"
    size = sum(tensor.numel() * tensor.element_size() for tensor in policy.model.state_dict().values())
    require_space(folder, size, f"the trained policy {final}")
    finished: dict[str, Any] = {
        "steps": steps,
        "length": _length(recipe),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "made_with": asdict(made_with),
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        policy.save(temporary)
        # a policy with this file beside it is this run's; without it, of a run that was made longer since
        text = json.dumps(finished, indent=1) + "\n"
        publish_folder(temporary, final, (lambda: write_text(folder / FINISHED, text)) if complete else None)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        (folder / FINISHED).unlink(missing_ok=True)
        raise RunError(f"the trained policy can't be written to {final}: {error}\n  fix: free space") from error
    return final


def _length(recipe: Recipe) -> list[int | None]:
    return [recipe.trainer.total_training_steps, recipe.trainer.total_epochs]
