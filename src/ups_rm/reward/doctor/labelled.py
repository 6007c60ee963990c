"""Labelled conversations to examine an RM with: a file of pairs, rows in PKU-SafeRLHF's form, or the packaged sample.

Distinct (prompt, reply) texts with the share of labels that say unsafe; pairs are the rows whose two replies differ.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_rm.errors import DataError
from ups_rm.types import Conversation


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt. unsafe: their labels, None where unknown. better: which one is more helpful."""

    conversations: tuple[Conversation, Conversation]
    unsafe: tuple[bool | None, bool | None]
    better: int | None = None


@dataclass
class Labelled:
    """N distinct conversations, K pairs of a safer and a less safe one, J pairs of which one is more helpful.

    unsafe: share of labels that say unsafe; NaN unknown. (N,) float64. prompt_id: (N,) int64.
    pairs: indices (safer, less safe). (K, 2) int64. source: where they came from. of_rows: how many rows there are.
    better: indices (other, better). (J, 2) int64.
    """

    conversations: list[Conversation]
    unsafe: Tensor
    prompt_id: Tensor
    pairs: Tensor
    source: str
    of_rows: int = 0
    better: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))

    def replies(self, *, unsafe: bool) -> list[int]:
        """Indices of the conversations that are labelled so, without contradiction."""
        return (self.unsafe == float(unsafe)).nonzero()[:, 0].tolist()


def read_labelled(source: Path | str, *, max_rows: int = 200, seed: int = 0) -> Labelled:
    """Up to `max_rows` rows of a source, drawn evenly; rows that compare a safe with an unsafe reply come first.

    Args:
        source: JSONL of {prompt, safe_response, unsafe_response} (prompt: text or messages), or anything that
            `ups_rm.data.rows.read_rows` reads: a PKU-SafeRLHF folder or file, a Hub id, "sample".

    Raises:
        DataError: unreadable, or without a labelled row.
    """
    file = Path(source).expanduser()
    rows = list(_from_lines(file) if file.is_file() and file.suffix == ".jsonl" else _from_rows(source))
    labelled = [row for row in rows if row.unsafe != (None, None)]
    if not labelled:
        raise DataError(f"{source} has no labelled row: lines must have prompt, safe_response and unsafe_response")
    random.Random(seed).shuffle(labelled)
    mixed = [row for row in labelled if set(row.unsafe) == {True, False}]
    alike = [row for row in labelled if set(row.unsafe) != {True, False}]
    return collect([*mixed, *alike][:max_rows], str(source), of_rows=len(labelled))


def collect(rows: Iterable[Pair], source: str, *, of_rows: int | None = None) -> Labelled:
    """The distinct conversations of `rows`, their labels, and the pairs."""
    index: dict[str, int] = {}
    prompts: dict[str, int] = {}
    conversations: list[Conversation] = []
    counts: list[list[int]] = []  # per conversation: prompt, labels, of them unsafe
    pairs: list[tuple[int, int]] = []
    better: list[tuple[int, int]] = []
    total = 0
    for row in rows:
        total += 1
        places = []
        for talk, unsafe in zip(row.conversations, row.unsafe, strict=True):
            place = index.setdefault(json.dumps(talk), len(conversations))
            if place == len(conversations):
                conversations.append(talk)
                counts.append([prompts.setdefault(json.dumps(talk[:-1]), len(prompts)), 0, 0])
            counts[place][1] += unsafe is not None
            counts[place][2] += unsafe is True
            places.append(place)
        if row.better is not None and places[0] != places[1]:
            better.append((places[1 - row.better], places[row.better]))
        if row.unsafe in ((False, True), (True, False)):
            pairs.append((places[0], places[1]) if row.unsafe[1] else (places[1], places[0]))
    table = torch.tensor(counts, dtype=torch.float64).reshape(-1, 3)
    return Labelled(
        conversations,
        table[:, 2] / table[:, 1],  # 0/0 = NaN: unknown
        table[:, 0].long(),
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        source,
        total if of_rows is None else of_rows,
        torch.tensor(better, dtype=torch.long).reshape(-1, 2),
    )


def pairs_of(pairs: Sequence[tuple[Conversation, Conversation]]) -> Labelled:
    """(safer, less safe) conversations as data."""
    return collect([Pair(pair, (False, True)) for pair in pairs], "pairs")


def fewer(data: Labelled, rows: int) -> Labelled:
    """The first `rows` pairs of `data`, and of the conversations in no pair as large a share."""
    keep = torch.zeros(len(data.conversations), dtype=torch.bool)
    kept = data.pairs[:rows]
    keep[kept.flatten()] = True
    paired = torch.zeros_like(keep)
    paired[data.pairs.flatten()] = True
    lone = (~paired).nonzero()[:, 0]
    share = rows / len(data.pairs) if len(data.pairs) else rows / max(1, len(lone))
    keep[lone[: math.ceil(len(lone) * min(1.0, share))]] = True
    return _only(data, keep, kept)


def compared(data: Labelled) -> Labelled:
    """What a judge of pairs can be asked: pairs of replies to one prompt, and no other conversation.

    Raises:
        DataError: there is none.
    """
    pairs = data.pairs[data.prompt_id[data.pairs[:, 0]] == data.prompt_id[data.pairs[:, 1]]]
    if not len(pairs):
        raise DataError(f"{data.source} has no safe and unsafe reply to one prompt for a judge of pairs to compare")
    keep = torch.zeros(len(data.conversations), dtype=torch.bool)
    keep[pairs.flatten()] = True
    return _only(data, keep, pairs)


def _only(data: Labelled, keep: Tensor, pairs: Tensor) -> Labelled:
    """The conversations to keep, (N,) bool, and pairs of such."""
    new = keep.long().cumsum(0) - 1
    return Labelled(
        [talk for talk, kept in zip(data.conversations, keep.tolist(), strict=True) if kept],
        data.unsafe[keep],
        data.prompt_id[keep],
        new[pairs],
        data.source,
        data.of_rows,
        new[data.better[keep[data.better].all(dim=1)]],
    )


def _from_lines(file: Path) -> Iterator[Pair]:
    from ups_rm.reward.score_file import read_lines

    for line, found in read_lines(file):
        if "safe_response" in found:
            yield Pair((found["safe_response"], found["unsafe_response"]), (False, True))
        elif "response_0" in found:
            better = line.get("better_response_id")
            flags = (_unsafe(line, 0), _unsafe(line, 1))
            yield Pair((found["response_0"], found["response_1"]), flags, better if better in (0, 1) else None)
        else:
            raise DataError(
                f"{file}: lines must have prompt, safe_response and unsafe_response (or PKU-SafeRLHF's fields)"
            )


def _unsafe(line: dict[str, Any], i: int) -> bool | None:
    safe = line.get(f"is_response_{i}_safe")
    return None if safe is None else not safe


def _from_rows(source: Path | str) -> Iterator[Pair]:
    from ups_rm.data.rows import good_rows

    for row in good_rows(source):
        talks = [
            [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": reply}]
            for reply in row.responses
        ]
        first, second = (None if safe is None else not safe for safe in row.safe)
        yield Pair((talks[0], talks[1]), (first, second), row.better_response_id)  # type: ignore[arg-type]
