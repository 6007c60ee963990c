"""A step whose numbers went wrong: kept in a file, and run again from it.

`<run>/replay/step_<N>.pt` holds the recipe, the prompts, the replies and the fp32 masters that the step began with
(tensors and plain values only). Draws are functions of seed and step, so the same step comes out again on the same
machine. With several optimizer steps per rollout the masters are those before the one that failed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from ups_rm.console import console
from ups_rm.data.prompts import PromptRow
from ups_rm.durable import require_space
from ups_rm.errors import CheckpointError, NumberError, RunError
from ups_rm.model_files import refused_pickle
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.types import Scorer

if TYPE_CHECKING:
    from ups_rm.local.rollout import Rollout
    from ups_rm.local.trainer import Trainer

MOST = 3
"""Files of one run: each is as large as the policy in fp32."""


def save_replay(
    trainer: Trainer, problem: NumberError, prompts: list[PromptRow], number: int, rollout: Rollout | None
) -> Path | None:
    """Write the step's file; None where there are enough of them or the disk has no room."""
    folder = trainer.folder / "replay"
    file, temporary = folder / f"step_{number:06d}.pt", folder / f".step_{number:06d}.tmp"
    if len(list(folder.glob("step_*.pt"))) >= MOST and not file.exists():
        return None
    masters = [master.detach() for _, master in trainer.policy.masters]
    content = {
        "schema": "ups-rm replay 1",
        "step": number,
        "tensor": problem.tensor,
        "rows": list(problem.rows),
        "recipe": trainer.recipe.to_yaml(),
        "prompts": [{**asdict(row), "messages": [dict(turn) for turn in row.messages]} for row in prompts],
        "kl_coef": trainer.kl_control.value,
        "lagrange": trainer.objective.state,
        "texts": rollout.texts if rollout else [],
        "responses": rollout.sequences.responses if rollout else torch.empty(0),
        "response_mask": rollout.sequences.response_mask if rollout else torch.empty(0),
        "masters": masters,
    }
    try:
        require_space(folder, sum(master.numel() * 4 for master in masters), f"{file}")
        folder.mkdir(exist_ok=True)
        with temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError, RunError) as error:
        temporary.unlink(missing_ok=True)
        console.print(f"the batch of step {number} is not kept: {error}", markup=False)
        return None
    return file


def replay(file: Path, scorer: Scorer | None = None) -> tuple[str, bool]:
    """Run the file's step again, in memory; what came of it, and whether it is the same problem.

    Raises:
        CheckpointError: not such a file. RecipeError, DataError, PolicyError, RMError: what it names is not there.
    """
    from ups_rm.local.trainer import Trainer

    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        number, masters = int(saved["step"]), list(saved["masters"])
        prompts = [PromptRow(**row) for row in saved["prompts"]]
        expected, rows = str(saved["tensor"]), list(saved["rows"])
        recipe = _recipe(str(saved["recipe"]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = refused_pickle(error) or f"{type(error).__name__} {(str(error).splitlines() or [''])[0]}"
        raise CheckpointError(f"{file} is not the file of a step: {reason}") from error
    trainer = Trainer(recipe, scorer)
    if [tuple(m.shape) for _, m in trainer.policy.masters] != [tuple(m.shape) for m in masters]:
        raise CheckpointError(f"{file} holds {len(masters)} tensors that do not fit {trainer.policy.source}")
    with torch.no_grad():
        for (parameter, master), value in zip(trainer.policy.masters, masters, strict=True):
            master.copy_(value)
            parameter.copy_(master)
    trainer.engine.refresh()
    trainer.kl_control.value = float(saved["kl_coef"])
    trainer.objective.resume(saved.get("lagrange", {}))
    try:
        trainer.step(prompts, number)
    except NumberError as again:
        same = (again.tensor, list(again.rows)) == (expected, rows)
        return f"step {number}: {again}{'' if same else f' (then: {NumberError(expected, rows)})'}", same
    return f"step {number}: all numbers are finite this time (then: {NumberError(expected, rows)})", False


def _recipe(text: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return load_recipe(file)
