"""Checkpoints: written beside, flushed to disk, renamed, with a manifest; what can be seen is whole or is found out.

`<dir>/global_step_<N>/` holds `training.pt` (fp32 masters, optimizer, schedule, states of the global random
generators; tensors and plain values only), `state.json` (everything else: position, KL coefficient, best score,
counters, tracker ids, the resolved recipe, what it was made with and where) and `manifest.json` (size and sha256 of
both).
`<dir>/latest_checkpointed_iteration.txt` names the newest (verl's file name).
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from ups_rm.checkpoints import LATEST, checkpoints
from ups_rm.console import console
from ups_rm.durable import damage, publish_folder, remove_folder, require_space, write_text
from ups_rm.errors import CheckpointError, RunError
from ups_rm.local.actor import Actor
from ups_rm.local.provenance import differences
from ups_rm.local.random_state import random_states, set_random_states
from ups_rm.model_files import refused_pickle
from ups_rm.recipe import Recipe
from ups_rm.recipe_hash import MadeWith


@dataclass
class TrainingState:
    """How far a run is, besides its tensors. Every field is a plain JSON value.

    Attributes:
        step: the last one that was done; 0 before the first.
        epoch: the pass over the prompts that it belongs to, from 0.
        prompts: indices of the prompts of `step`: the place in the shuffled data.
        kl_coef: of the KL controller.
        lagrange: of the constraint's multiplier (`Objective.state`); empty where there is none.
        score: validation score after this step, None where none was taken.
        best: {"step", "score"} of the best validation so far.
        counters: what went wrong so far, by name.
        run_ids: of trackers that know a run by an id.
        group_log: the last step that the group log holds.
        changes: what of recipe or inputs was changed on the way (`--allow-changes`), and after which step.
    """

    step: int = 0
    epoch: int = 0
    prompts: list[Any] = field(default_factory=list)
    kl_coef: float = 0.0
    lagrange: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    best: dict[str, float] | None = None
    counters: dict[str, int] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)
    group_log: int = 0
    changes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint was made with, and where."""

    made_with: MadeWith
    recipe: dict[str, Any]
    versions: dict[str, str]
    git: str | None
    machine: dict[str, str]


class CheckpointWriter:
    """Writes a run's checkpoints, by default off the training thread; one at a time.

    `save` copies the tensors and returns; the copy is written, flushed and published while training goes on. A write
    that failed is raised by the next call of `save`, `raise_failure` or `wait`.

    Args:
        keep: of the checkpoints that are not among the best, only the newest so many stay; None: all.
        keep_best: so many with the highest validation score stay besides.
        background: False: `save` returns when all is on the disk.

    Attributes:
        last: the checkpoint of the last `save`.
        seconds: that the training thread spent in `save` and `wait`, in all.
    """

    def __init__(
        self,
        folder: Path,
        actor: Actor,
        provenance: Provenance,
        *,
        keep: int | None = None,
        keep_best: int = 0,
        background: bool = True,
    ) -> None:
        self.folder, self.actor, self.provenance = folder, actor, provenance
        self.keep, self.keep_best = keep, keep_best
        self.seconds = 0.0
        self.last: Path | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def save(self, state: TrainingState) -> Path:
        """Have `global_step_<N>` written; its path.

        Raises:
            RunError: it would not fit on the disk, or it or the one before can't be written.
        """
        self.wait()
        started = perf_counter()
        tensors = {
            "masters": [master.detach() for _, master in self.actor.policy.masters],
            "optimizer": self.actor.optimizer.state_dict(),
            "scheduler": self.actor.scheduler.last_epoch,
            "random": random_states(),
        }
        final = self.folder / f"global_step_{state.step}"
        require_space(self.folder, _size(tensors) + 100_000, f"checkpoint {final}")
        text = json.dumps({**asdict(state), **asdict(self.provenance)}, indent=1, ensure_ascii=False) + "\n"
        if self._thread is None:
            self._write(final, tensors, text)
        else:
            self._writing = self._thread.submit(self._write, final, _copy(tensors), text)
        self.seconds += perf_counter() - started
        self.last = final
        return final

    def raise_failure(self) -> None:
        """Raises RunError if the last write has failed; does not wait for one that is under way."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None:
            started = perf_counter()
            writing, self._writing = self._writing, None
            writing.result()
            self.seconds += perf_counter() - started

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except RunError as failure:
            if error is None:
                raise
            console.print(str(failure), markup=False)
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, final: Path, tensors: dict[str, Any], state: str) -> None:
        temporary = self.folder / f".{final.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            torch.save(tensors, temporary / "training.pt")
            (temporary / "state.json").write_text(state, encoding="utf-8")
            publish_folder(temporary, final)
            write_text(self.folder / LATEST, final.name.rsplit("_", 1)[1])
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"checkpoint {final} can't be written: {error}\n"
                "  fix: free space or set trainer.save_freq=-1; the same command goes on from the checkpoint before"
            ) from error
        prune(self.folder, self.keep, self.keep_best)


def prune(folder: Path, keep: int | None, keep_best: int) -> None:
    """Remove all but the newest `keep` and, of those with a validation score, the best `keep_best` (ties: the older).

    None: nothing is removed.
    """
    if keep is None:
        return
    found = checkpoints(folder)
    scored = [(score, path) for path in found if (score := _score_of(path)) is not None]
    best = [path for _, path in sorted(scored, key=lambda pair: pair[0], reverse=True)[:keep_best]]
    for path in found[:-keep]:
        if path not in best:
            remove_folder(path)


def _score_of(path: Path) -> float | None:
    try:
        score = json.loads((path / "state.json").read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if score is None else float(score)


def _copy(value: Any) -> Any:
    """Tensors copied to memory of their own, so that training may change them while they are written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (dict, list)):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return 0


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that `trainer.resume_mode` asks for, if there is one: for `auto` the newest whole one.

    Raises:
        CheckpointError: `resume_path` names a folder that is no checkpoint or is damaged, or all there are are damaged.
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
    for path in reversed(found):
        if (path / "actor").is_dir() or (wrong := damage(path)) is None:
            return path
        if path == found[0]:
            raise CheckpointError(_unusable(path, wrong))
        console.print(f"{path} is damaged: {wrong}; the one before it is used", soft_wrap=True, markup=False)
    return None


def load_checkpoint(
    path: Path, actor: Actor, now: Provenance, *, allow_changes: bool = False
) -> tuple[TrainingState, list[str]]:
    """Put a checkpoint's weights, optimizer state, schedule and random states into the actor and the process.

    Args:
        now: the recipe, what it names, and the machine, at present.
        allow_changes: go on with other settings or inputs; what changed is noted in the state.

    Returns:
        The state, and what of the machine differs: results are then no longer bitwise those of one run.

    Raises:
        CheckpointError: damaged or foreign files, other shapes, another recipe, or other contents under its paths.
    """
    if (path / "actor").is_dir():
        raise CheckpointError(f"{path} is a checkpoint of the verl engine\n  fix: ENGINE=verl, or another run folder")
    if (wrong := damage(path)) is not None:
        raise CheckpointError(_unusable(path, wrong))
    try:
        told = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state = TrainingState(**{one.name: told[one.name] for one in fields(TrainingState)})
        made_with, machine = MadeWith(**told["made_with"]), dict(told["machine"])
        tensors: dict[str, Any] = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        saved, optimizer, scheduler = tensors["masters"], tensors["optimizer"], int(tensors["scheduler"])
        random = tensors["random"]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if refused := refused_pickle(error):
            raise CheckpointError(f"{path}/training.pt can't be read: {refused}") from error
        raise CheckpointError(_unusable(path, f"{type(error).__name__} {reason}")) from error
    changes = made_with.check(now.made_with, path, allow_changes=allow_changes)
    state.changes += [f"after step {state.step}: {change}" for change in changes]
    masters = [master for _, master in actor.policy.masters]
    if [tuple(m.shape) for m in masters] != [tuple(s.shape) for s in saved]:
        raise CheckpointError(f"{path} holds {len(saved)} tensors that do not fit the policy's {len(masters)}")
    with torch.no_grad():
        for (parameter, master), value in zip(actor.policy.masters, saved, strict=True):
            master.copy_(value)
            if parameter is not master:
                parameter.copy_(master)
    # learning rate, betas and decay are the recipe's of now; only the moments come from the checkpoint
    options = [{name: v for name, v in group.items() if name != "params"} for group in actor.optimizer.param_groups]
    _load_moments(actor.optimizer, optimizer)
    actor.scheduler.last_epoch = scheduler
    for group, own, factor in zip(actor.optimizer.param_groups, options, actor.scheduler.lr_lambdas, strict=True):
        group.update(own)
        group["lr"] = group["initial_lr"] * factor(actor.scheduler.last_epoch)
    actor.scheduler._last_lr = [group["lr"] for group in actor.optimizer.param_groups]
    set_random_states(random)
    return state, differences(machine, now.machine)


def _load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The saved state into the tensors that the optimizer holds already, which `load_state_dict` would hold beside."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = saved["state"]
    own = [optimizer.state[parameter] for parameter in parameters]
    if any(one.keys() != states.get(i, {}).keys() for i, one in enumerate(own)):
        optimizer.load_state_dict(saved)  # of no step yet, in older checkpoints
        return
    for i, one in enumerate(own):
        for name, value in one.items():
            value.copy_(states[i][name])


def _unusable(path: Path, wrong: str) -> str:
    return f"{path} can't be read: {wrong}\n  fix: delete it to resume from the one before"
