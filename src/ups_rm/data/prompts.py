"""Prompts for training and evaluation, read from parquet in verl's schema: ours, or one that verl's users already
have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ups_rm.control_tokens import ControlTokens, surrogate_at
from ups_rm.data.sources import open_parquet, parquet_rows
from ups_rm.errors import DataError
from ups_rm.types import Conversation, Message

Kind = Literal["unsafe", "benign"]
KINDS: tuple[Kind, ...] = ("unsafe", "benign")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptRow:
    """One prompt. `index` counts from 0 over all files read, so it is unique; `extra_info` is what the file says."""

    index: int
    messages: Conversation
    kind: Kind
    extra_info: dict[str, Any] = field(default_factory=dict)


def kind_of(prompt_source: str | None) -> Kind | None:
    """What `prompt_source` says the prompt is, by its ending; None where it says nothing, as in the original data."""
    for kind in KINDS:
        if prompt_source is not None and prompt_source.endswith(kind):
            return kind
    return None


def read_prompts(parquet: Path | str | Sequence[Path | str]) -> list[PromptRow]:
    """All prompts of one or several parquet files, in order.

    A prompt is `benign` when `extra_info.prompt_source` ends in "benign", else `unsafe`. Columns other than `prompt`
    and `extra_info` are not needed here.

    Raises:
        DataError: a file is missing, is not parquet, has no rows, or a row (named by number, from 0) is not a list of
            messages that a model can answer.
    """
    files = [parquet] if isinstance(parquet, (str, Path)) else list(parquet)
    rows: list[PromptRow] = []
    for file in map(Path, files):
        before = len(rows)
        for number, prompt, extra_info in _iter_prompts(file):
            if problem := prompt_problem(prompt):
                raise DataError(f"{file}: row {number}: {problem}\n  fix: ups-rm data check {file} lists all such rows")
            info = extra_info if isinstance(extra_info, dict) else {}
            messages: Conversation = [Message(role=turn["role"], content=turn["content"]) for turn in prompt]
            rows.append(PromptRow(len(rows), messages, kind_of(_source(info)) or "unsafe", info))
        if len(rows) == before:
            raise DataError(f"{file}: has no rows")
    return rows


def distinct_prompts(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The first row of every distinct prompt, in file order; its harm categories are those of all the prompt's rows."""
    first: dict[str, PromptRow] = {}
    categories: dict[str, dict[str, None]] = {}
    for row in rows:
        key = json.dumps(row.messages, sort_keys=True)
        first.setdefault(key, row)
        if names := categories_of(row):
            categories.setdefault(key, {}).update(dict.fromkeys(names))
    return [
        replace(row, extra_info={**row.extra_info, "categories": list(categories[key])}) if key in categories else row
        for key, row in first.items()
    ]


def categories_of(row: PromptRow) -> tuple[str, ...]:
    """The prompt's harm categories, as far as its file or set names them."""
    found = row.extra_info.get("categories")
    return tuple(str(name) for name in found) if isinstance(found, (list, tuple)) else ()


def encode_prompts(tokenizer: Any, prompts: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of each prompt with the policy's own chat template and the opening of the reply.

    Text that spells a control token stays text, see `as_text`.

    Raises:
        DataError: a prompt that is no Unicode text, that the template refuses, or that would forge a turn in spite of
            all; it is named by its place in `prompts`.
    """
    if not prompts:
        return []
    tokens, encoded = ControlTokens.of(tokenizer), []
    for i, messages in enumerate(prompts):
        try:
            text = tokenizer.apply_chat_template(
                as_text(tokens, messages, i), add_generation_prompt=True, tokenize=False
            )
        except DataError:
            raise
        except Exception as error:  # jinja2's own errors, and raise_exception() in templates
            raise DataError(
                f"prompt {i}: the policy's chat template refuses it: {type(error).__name__}: {error}"
            ) from error
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens.forged(text, ids):
            raise DataError(
                f"prompt {i}: the policy's tokenizer reads special tokens where the text spells none: it could forge a "
                "turn\n  fix: leave the prompt out"
            )
        encoded.append(ids)
    return encoded


def as_text(tokens: ControlTokens, messages: Conversation, number: int = 0) -> Conversation:
    """The messages as a chat template may write them: what spells a control token of the policy's is broken up.

    Raises:
        DataError: half a surrogate pair, which no tokenizer takes; prompt `number` is named.
    """
    for message in messages:
        if (at := surrogate_at(message["role"] + message["content"])) is not None:
            raise DataError(f"prompt {number}: half a surrogate pair at character {at} of a message: not Unicode text")
    return [Message(role=tokens.broken(one["role"]), content=tokens.broken(one["content"])) for one in messages]


def _source(info: dict[str, Any]) -> str | None:
    found = info.get("prompt_source")
    return found if isinstance(found, str) else None


def _iter_prompts(path: Path) -> Iterator[tuple[int, Any, Any]]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if "prompt" not in names:
            raise DataError(
                f"{path}: has no column `prompt`, only {short_list(names)}\n  fix: ups-rm data prepare makes one"
            )
        wanted = [n for n in ("prompt", "extra_info") if n in names]
        for number, value in enumerate(parquet_rows(file, path, columns=wanted)):
            yield number, value["prompt"], value.get("extra_info")


def short_list(names: Sequence[str]) -> str:
    """Names for a message, not all of a million."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{', '.join(name[:60] for name in names[:20])}{more}"


def prompt_problem(prompt: Any) -> str:
    """Why a value of the column `prompt` can't be answered by a model, or "" if it can."""
    if not isinstance(prompt, list) or not prompt:
        return f"`prompt` is {'an empty list' if prompt == [] else type(prompt).__name__}, expected a list of messages"
    for position, turn in enumerate(prompt):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            return f"`prompt[{position}]` has no role and content"
        if turn["role"] not in ROLES:
            return f"`prompt[{position}].role` is {str(turn['role'])[:60]!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(turn["content"], str):
            return f"`prompt[{position}].content` is {type(turn['content']).__name__}, expected text"
    if prompt[-1]["role"] == "assistant":
        return "`prompt` ends with the assistant's turn, so there is nothing to answer"
    if not prompt[-1]["content"].strip():
        return "the last message of `prompt` is empty"
    return ""
