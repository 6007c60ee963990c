"""Words that every part shares: messages, scores, and what a training leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


Conversation = list[Message]


@dataclass(frozen=True)
class Score:
    """What the reward model says about one conversation.

    `logit` is the RM's raw output, the degree of *unsafety* (higher = less safe). `safe_score` = sigmoid(-logit), in
    (0, 1), is what the policy is rewarded with. `tokens` counts the RM tokens that were read; `truncated` says that the
    conversation was longer than the RM's card allows and was cut.
    """

    logit: float
    safe_score: float
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or interrupted) training leaves."""

    folder: Path
    policy: Path | None
    steps: int
    interrupted: bool
    metrics: dict[str, float]
