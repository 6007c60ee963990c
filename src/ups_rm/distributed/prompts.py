"""The prompts as verl reads them: one row per prompt and step, in the order in which the local engine would draw them.

verl's own loader knows neither `data.unique_prompts` nor `data.benign_share`, and shuffles by other means. So the order
is laid out once, before the run: `<run folder>/verl/train.parquet` holds train_batch_size rows for every step, and verl
reads it front to back (shuffle off). Step s of both engines then sees the same prompts, and a checkpoint of verl's
loader is a position in that file.

verl's rollout gives the file's messages to the chat template as they stand, special tokens in them included. So what
spells one is broken up in the file, as the local engine does before its own template; the reward model and the group
log are given the prompt as it was (`extra_info.messages`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ups_rm.control_tokens import ControlTokens
from ups_rm.data.batches import fitting_prompts, prompt_batches, select_prompts, steps_per_epoch
from ups_rm.data.prompts import PromptRow, as_text, read_prompts
from ups_rm.durable import publishing
from ups_rm.errors import RecipeError
from ups_rm.recipe import Recipe, as_list
from ups_rm.types import Conversation, Message


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
    tokens = ControlTokens.of(tokenizer)
    _write(files.train, [row for batch in islice(prompt_batches(rows, data), total_steps) for row in batch], tokens)
    _write(files.val, held_out, tokens)
    return files


def messages_of(raw_prompt: Iterable[Any], extra_info: Any) -> Conversation:
    """The prompt of one of verl's rows as it was before control tokens in it were broken up."""
    kept = extra_info.get("messages") if isinstance(extra_info, Mapping) else None
    found = json.loads(kept) if kept else raw_prompt
    return [Message(role=turn["role"], content=turn["content"]) for turn in found]


def _write(file: Path, rows: Sequence[PromptRow], tokens: ControlTokens) -> None:
    """verl's schema; what its reward worker needs of a row stands in `extra_info`, all else of it as JSON.

    `extra_info.messages` is there only for prompts that were changed, else "".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {row.index: as_text(tokens, row.messages) for row in rows}
    table = pa.Table.from_pylist(
        [
            {
                "data_source": "PKU-SafeRLHF",
                "prompt": texts[row.index],
                "ability": "safety",
                "reward_model": {"style": "model", "ground_truth": ""},
                "extra_info": {
                    "index": row.index,
                    "kind": row.kind,
                    "row": json.dumps(row.extra_info, ensure_ascii=False, default=str),
                    "messages": json.dumps(row.messages) if row.messages != texts[row.index] else "",
                },
            }
            for row in rows
        ]
    )
    with publishing(file) as temporary:
        pq.write_table(table, temporary)
