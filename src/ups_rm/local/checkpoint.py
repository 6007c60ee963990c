"""Checkpoints: written under a temporary name and renamed, so that one that can be seen is whole.

`<dir>/global_step_<N>/` holds `training.pt` (fp32 masters and optimizer state, tensors only) and `state.json` (step,
hashes of the recipe and of what it names: policy, RM, prompts).
`<dir>/latest_checkpointed_iteration.txt` names the newest (verl's file name). Random state is not stored: every draw is
a function of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ups_rm.checkpoints import LATEST, checkpoints
from ups_rm.errors import CheckpointError, RunError
from ups_rm.local.actor import Actor
from ups_rm.recipe import Recipe
from ups_rm.recipe_hash import MadeWith


@dataclass(frozen=True)
class TrainingState:
    """What a run must know to go on besides its tensors."""

    step: int
    kl_coef: float
    recipe_hash: str
    inputs: dict[str, str] = field(default_factory=dict)
    """Content hash of what each recipe key names; see `input_hashes`."""


def save_checkpoint(folder: Path, actor: Actor, state: TrainingState, *, keep: int | None = None) -> Path:
    """Write `global_step_<N>`, make it the latest, and drop all but the newest `keep`.

    Raises:
        RunError: the disk is full or can't be written; earlier checkpoints are left as they were.
    """
    final = folder / f"global_step_{state.step}"
    temporary = folder / f".global_step_{state.step}.tmp"
    tensors = {
        "masters": [master.detach() for _, master in actor.policy.masters],
        "optimizer": actor.optimizer.state_dict(),
        "scheduler": actor.scheduler.last_epoch,
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(tensors, temporary / "training.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        mark = folder / f".{LATEST}.tmp"
        mark.write_text(str(state.step), encoding="utf-8")
        mark.replace(folder / LATEST)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint {final} can't be written: {error}\n  fix: free space or set trainer.save_freq=-1"
        ) from error
    if keep:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that `trainer.resume_mode` asks for, if there is one.

    Raises:
        CheckpointError: `resume_path` names a folder that is not a whole checkpoint.
    """
    trainer = recipe.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        path = Path(str(trainer.resume_from_path))
        if not (path / "state.json").is_file() and not (path / "actor").is_dir():
            raise CheckpointError(f"{path} is not a checkpoint: it has no state.json")
        return path
    found = checkpoints(Path(trainer.default_local_dir))
    return found[-1] if found else None


def load_checkpoint(path: Path, actor: Actor, now: MadeWith) -> TrainingState:
    """Put a checkpoint's weights, optimizer state and schedule into the actor.

    Args:
        now: the recipe, and what it names, at present.

    Raises:
        CheckpointError: truncated or foreign files, other shapes, another recipe, or other contents under its paths.
    """
    if (path / "actor").is_dir():
        raise CheckpointError(f"{path} is a checkpoint of the verl engine\n  fix: ENGINE=verl, or another run folder")
    try:
        state = TrainingState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        tensors: dict[str, Any] = torch.load(path / "training.pt", map_location=actor.policy.device, weights_only=True)
        saved, optimizer, scheduler = tensors["masters"], tensors["optimizer"], int(tensors["scheduler"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} can't be read: {type(error).__name__} {reason}\n  fix: delete it to resume from the one before"
        ) from error
    MadeWith(state.recipe_hash, state.inputs).check(now, path)
    masters = [master for _, master in actor.policy.masters]
    if [tuple(m.shape) for m in masters] != [tuple(s.shape) for s in saved]:
        raise CheckpointError(f"{path} holds {len(saved)} tensors that do not fit the policy's {len(masters)}")
    with torch.no_grad():
        for (parameter, master), value in zip(actor.policy.masters, saved, strict=True):
            master.copy_(value)
            if parameter is not master:
                parameter.copy_(master)
    actor.optimizer.load_state_dict(optimizer)
    actor.scheduler.last_epoch = scheduler
    for group, factor in zip(actor.optimizer.param_groups, actor.scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(actor.scheduler.last_epoch)
    actor.scheduler._last_lr = [group["lr"] for group in actor.optimizer.param_groups]
    return state
