"""What the stages of a run share: its recipe, its policy, the time they took."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ups_rm.device import give_back_memory
from ups_rm.durable import write_text
from ups_rm.recipe import Recipe, RewardModel
from ups_rm.recipe_hash import SERVICE
from ups_rm.stages import Stage, run_stage


class Interrupted(Exception):
    """Training was stopped by the user and can be resumed."""


class Stopped(Exception):
    """An alarm of `monitor.stop_on` ended the training; its name is the message."""


@dataclass
class Run:
    """What the stages share while they run."""

    recipe: Recipe
    fresh: bool
    engine: str = "local"
    policy: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.recipe.trainer.default_local_dir)

    @property
    def device(self) -> str:
        from ups_rm.device import torch_device

        return str(torch_device(self.recipe.trainer.device))

    @property
    def number_formats(self) -> dict[str, Any]:
        """What else decides a score or a reply: compute types and device."""
        model, actor = self.recipe.reward_model.model, self.recipe.actor_rollout_ref.actor
        return self.reward_settings | {
            "rm_dtype": model.dtype,
            "rm_remote_code": model.trust_remote_code,
            "dtype": actor.fsdp_config.dtype,
            "device": self.device,
        }

    @property
    def reward_settings(self) -> dict[str, Any]:
        """What of `reward_model` differs from one `myrm` folder as it is; {} for that."""
        ours, plain = asdict(self.recipe.reward_model), asdict(RewardModel())
        ours = {name: value for name, value in ours.items() if name not in SERVICE}
        for name in ("path", "dtype", "trust_remote_code"):  # inputs and number formats of their own
            ours["model"].pop(name)
            plain["model"].pop(name)
        return {f"reward_model.{name}": value for name, value in ours.items() if value != plain[name]}

    @property
    def reward_inputs(self) -> list[Path | str]:
        """Folders and files that decide a score: stages hash their content."""
        from ups_rm.reward.open import inputs_of

        return inputs_of(self.recipe.reward_model)

    def do(self, stage: Stage) -> None:
        self.seconds[stage.name] = run_stage(stage, fresh=self.fresh)
        give_back_memory()


def source_of(source: str) -> Path | str:
    """What a stage hashes for a source of rows: its files, or the name of a hub id."""
    from ups_rm.data.rows import resolve_source

    return resolve_source(source)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """As a whole, with a manifest."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n", manifest=True)
