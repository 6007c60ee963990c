"""Which prompts step s sees: a pure function of the seed, so that a resumed run continues where it stopped.

Both engines draw from here: the local one as it goes, the verl engine into a file that verl reads front to back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ups_rm.console import console
from ups_rm.data.prompts import PromptRow, distinct_prompts, encode_prompts
from ups_rm.errors import RecipeError
from ups_rm.recipe import Data


def select_prompts(rows: Sequence[PromptRow], settings: Data) -> list[PromptRow]:
    """`unique_prompts` and `train_max_samples` applied, in file order."""
    chosen = distinct_prompts(rows) if settings.unique_prompts else list(rows)
    return chosen if settings.train_max_samples < 0 else chosen[: settings.train_max_samples]


def fitting_prompts(rows: Sequence[PromptRow], tokenizer: Any, settings: Data) -> list[PromptRow]:
    """Rows whose prompt is within `max_prompt_length` tokens of the policy's tokenizer; how many are not is printed.

    Raises:
        RecipeError: a prompt is longer, and `filter_overlong_prompts` is off.
    """
    limit = settings.max_prompt_length
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [row.messages for row in rows])]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    if len(fitting) < len(rows):
        longest = max(lengths)
        if not settings.filter_overlong_prompts:
            raise RecipeError(
                f"{len(rows) - len(fitting)} prompts are longer than data.max_prompt_length={limit} tokens "
                f"(longest {longest})\n  fix: raise it, or set data.filter_overlong_prompts=true"
            )
        console.print(f"{len(rows) - len(fitting)} prompts over {limit} tokens are left out (longest {longest})")
    return fitting


def steps_per_epoch(count: int, settings: Data) -> int:
    """Full batches in one pass over `count` prompts; the last, incomplete one is dropped (as in verl).

    Raises:
        RecipeError: fewer prompts than one batch.
    """
    if count < settings.train_batch_size:
        raise RecipeError(
            f"data.train_batch_size={settings.train_batch_size}, but there are only {count} prompts to train on; "
            "lower it, or give more data in data.train_files"
        )
    return count // settings.train_batch_size


def prompt_batches(rows: Sequence[PromptRow], settings: Data) -> Iterator[list[PromptRow]]:
    """Endless batches of `train_batch_size` prompts.

    As they come (`benign_share` < 0), each epoch is one permutation. With a share, harmless and other prompts are two
    pools, each shuffled and passed through at its own pace, and every batch holds the same number of each.

    Raises:
        RecipeError: a share is asked for, but one of the pools is empty.
    """
    size = settings.train_batch_size
    if settings.benign_share < 0:
        yield from _epochs(list(rows), size, settings.shuffle, settings.seed, drop_last=True)
        return
    benign = [row for row in rows if row.kind == "benign"]
    others = [row for row in rows if row.kind != "benign"]
    of_benign = round(size * settings.benign_share)
    if (of_benign and not benign) or (size - of_benign and not others):
        raise RecipeError(
            f"data.benign_share={settings.benign_share} needs both kinds of prompts; there are {len(benign)} harmless "
            f"and {len(others)} others in data.train_files"
        )
    pools = zip(
        _epochs(benign, of_benign, settings.shuffle, settings.seed, drop_last=False),
        _epochs(others, size - of_benign, settings.shuffle, settings.seed + 1, drop_last=False),
        strict=False,
    )
    for harmless, harmful in pools:
        yield harmless + harmful


def _epochs(
    rows: list[PromptRow], size: int, shuffle: bool, seed: int, *, drop_last: bool
) -> Iterator[list[PromptRow]]:
    """Endless batches; an epoch's rest is dropped, or goes in front of the next epoch."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[PromptRow] = []
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist() if shuffle else range(len(rows))
        waiting = [] if drop_last else waiting
        waiting += [rows[i] for i in order]
        while size == 0 or len(waiting) >= size:
            batch, waiting = waiting[:size], waiting[size:]
            yield batch
