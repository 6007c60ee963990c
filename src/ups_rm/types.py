"""Words that every part shares: messages, scores, and what a training leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


Conversation = list[Message]


@dataclass(frozen=True)
class Score:
    """What the reward model says about one conversation.

    `logit` is the degree of *unsafety* (higher = less safe), before the transform. `safe_score` is what the policy is
    rewarded with, higher = safer: sigmoid(-logit), in (0, 1), unless the recipe names another transform. `tokens`
    counts the RM tokens that were read; `truncated` says that the conversation was longer than the RM takes and was
    cut. `model_logits` holds the unsafety logit of each model by name where several are combined or one is normalised.
    `helpfulness` is the reply's helpfulness logit, higher = more helpful: a number that only compares replies to one
    prompt (0 has no meaning). None where no helpfulness model was asked.
    """

    logit: float
    safe_score: float
    tokens: int
    truncated: bool
    model_logits: Mapping[str, float] = field(default_factory=dict)
    helpfulness: float | None = None


class Scorer(Protocol):
    """Whatever scores conversations: messages in, one Score each, in input order."""

    def score(self, conversations: list[Conversation]) -> list[Score]: ...


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or interrupted) training leaves. `stopped_by`: the alarm of `monitor.stop_on` that ended it."""

    folder: Path
    policy: Path | None
    steps: int
    interrupted: bool
    metrics: dict[str, float]
    stopped_by: str = ""
