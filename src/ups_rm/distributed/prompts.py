"""The prompts as verl reads them: one row per prompt and step, in the order in which the local engine would draw them.

verl's own loader knows neither `data.unique_prompts` nor `data.benign_share`, and shuffles by other means. So the order
is laid out once, before the run: `<run folder>/verl/train.parquet` holds train_batch_size rows for every step, and verl
reads it front to back (shuffle off). Step s of both engines then sees the same prompts, and a checkpoint of verl's
loader is a position in that file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ups_rm.data.batches import fitting_prompts, prompt_batches, select_prompts, steps_per_epoch
from ups_rm.data.prompts import PromptRow, read_prompts
from ups_rm.errors import RecipeError
from ups_rm.recipe import Recipe, as_list


@dataclass(frozen=True)
class PromptFiles:
    """What verl reads, and how many steps that is, altogether and in one pass over the prompts."""

    train: Path
    val: Path
    total_steps: int
    steps_per_epoch: int


def lay_out_prompts(recipe: Recipe, tokenizer: Any, folder: Path) -> PromptFiles:
    """Write `train.parquet` and `val.parquet` into `folder`.

    Raises:
        RecipeError: fewer prompts than one batch, or a prompt that is too long. DataError: files that can't be read.
    """
    data = recipe.data
    rows = fitting_prompts(select_prompts(read_prompts(as_list(data.train_files)), data), tokenizer, data)
    held_out = fitting_prompts(read_prompts(as_list(data.val_files)), tokenizer, data)
    if data.val_max_samples >= 0:
        held_out = held_out[: data.val_max_samples]
    per_epoch = steps_per_epoch(len(rows), data)
    total_steps = per_epoch * recipe.trainer.total_epochs
    if recipe.trainer.total_training_steps is not None:
        total_steps = min(total_steps, recipe.trainer.total_training_steps)
    if not held_out:
        if recipe.trainer.test_freq > 0:
            raise RecipeError("trainer.test_freq asks for validation, but no prompt of data.val_files is left for it")
        held_out = rows[:1]  # verl wants a file with rows, also where it never validates
    files = PromptFiles(folder / "train.parquet", folder / "val.parquet", total_steps, per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    _write(files.train, [row for batch in islice(prompt_batches(rows, data), total_steps) for row in batch])
    _write(files.val, held_out)
    return files


def _write(file: Path, rows: Sequence[PromptRow]) -> None:
    """verl's schema; what its reward worker needs of a row stands in `extra_info`, all else of it as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(
        [
            {
                "data_source": "PKU-SafeRLHF",
                "prompt": row.messages,
                "ability": "safety",
                "reward_model": {"style": "model", "ground_truth": ""},
                "extra_info": {
                    "index": row.index,
                    "kind": row.kind,
                    "row": json.dumps(row.extra_info, ensure_ascii=False, default=str),
                },
            }
            for row in rows
        ]
    )
    temporary = file.with_name(f".{file.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(file)
