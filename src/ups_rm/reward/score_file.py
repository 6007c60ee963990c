"""Scoring a JSONL file: one conversation or several replies per line in, the same lines with scores out.

A line has `messages` (ending with the reply), or `prompt` (text or messages) with `response`, or with PKU-SafeRLHF's
`response_0` and `response_1`, or with `safe_response` and `unsafe_response`. Added fields: `logit`, `safe_score`,
`tokens`, `truncated`, and `helpfulness` of an RM with such a head; with two replies per line each name gets the reply's
field in front (`response_0_logit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ups_rm.errors import DataError
from ups_rm.reward.scorer import RewardScorer
from ups_rm.types import Conversation, Message

REPLIES = (("response",), ("response_0", "response_1"), ("safe_response", "unsafe_response"))


def conversations_of(line: dict[str, Any], where: str) -> dict[str, Conversation]:
    """The conversations of one line by the field their reply is in ("" for `messages`).

    Raises:
        DataError: none of the known forms; the message begins with `where`.
    """
    if "messages" in line:
        return {"": _messages(line["messages"], f"{where}: messages")}
    for names in REPLIES:
        if "prompt" not in line or not all(name in line for name in names):
            continue
        prompt = line["prompt"]
        before = [Message(role="user", content=prompt)] if isinstance(prompt, str) else None
        before = before or _messages(prompt, f"{where}: prompt")
        for name in names:
            if not isinstance(line[name], str):
                raise DataError(f"{where}: {name} is a {type(line[name]).__name__}, expected text")
        return {name: [*before, Message(role="assistant", content=line[name])] for name in names}
    raise DataError(
        f"{where}: neither messages, nor prompt with response, response_0/response_1 or safe_response/unsafe_response"
    )


def read_lines(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, Conversation]]]:
    """Each line as it is, and its conversations. Blank lines are passed over.

    Raises:
        DataError: a line that can't be used, with file and line number.
    """
    try:
        stream = file.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from error
    with stream:
        for number, text in enumerate(_decoded(stream, file), start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON: {error}") from error
            if not isinstance(line, dict):
                raise DataError(f"{file}:{number}: a {type(line).__name__}, expected an object")
            yield line, conversations_of(line, f"{file}:{number}")


def score_lines(
    scorer: RewardScorer,
    lines: Iterable[tuple[dict[str, Any], dict[str, Conversation]]],
    *,
    chunk: int = 4096,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """The lines with their scores, `chunk` lines in memory at a time."""
    iterator = iter(lines)
    while block := list(islice(iterator, chunk)):
        flat = [conversation for _, conversations in block for conversation in conversations.values()]
        scores = iter(scorer.score(flat, progress=progress))
        for line, conversations in block:
            added: dict[str, Any] = {}
            for name in conversations:
                prefix = "" if name in ("", "response") else f"{name}_"
                of_reply = asdict(next(scores))
                of_reply = {key: value for key, value in of_reply.items() if value not in ({}, None)}
                added |= {f"{prefix}{key}": value for key, value in of_reply.items()}
            yield line | added


def _messages(value: Any, where: str) -> Conversation:
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good or not value:
        raise DataError(f"{where} must be a list of {{'role': text, 'content': text}}")
    return [Message(role=m["role"], content=m["content"]) for m in value]


def _decoded(stream: Iterable[str], file: Path) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}") from error
