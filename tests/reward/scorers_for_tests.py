"""Functions that tests name as `scorers_for_tests:name`: small reward models whose right answers can be worked out."""

from __future__ import annotations

import threading

import numpy
import torch

from ups_rm.types import Conversation

calls: list[int] = []


def length(conversations: list[Conversation]) -> list[float]:
    """Characters of the reply."""
    calls.append(len(conversations))
    return [float(len(messages[-1]["content"])) for messages in conversations]


def vowels(conversations: list[Conversation]) -> numpy.ndarray:
    """Vowels of the reply, as an array."""
    return numpy.array([sum(c in "aeiou" for c in messages[-1]["content"]) for messages in conversations])


def as_tensor(conversations: list[Conversation]) -> torch.Tensor:
    return torch.tensor(length(conversations))


def constant(conversations: list[Conversation]) -> list[float]:
    return [1.0] * len(conversations)


def by_place(conversations: list[Conversation]) -> list[float]:
    """Not a reward model: the number hangs on the place in the batch."""
    return [float(i) for i in range(len(conversations))]


def one_too_few(conversations: list[Conversation]) -> list[float]:
    return length(conversations)[1:]


def texts(conversations: list[Conversation]) -> list[str]:
    return [messages[-1]["content"] for messages in conversations]


def not_a_number(conversations: list[Conversation]) -> list[float]:
    return [float("nan")] * len(conversations)


def longer(pairs: list[tuple[Conversation, str, str]]) -> list[float]:
    """Bradley-Terry on the length, with a fixed liking for what stands first."""
    return [len(a) - len(b) + 5.0 for _, a, b in pairs]


NUMBER = 3


hold = threading.Event()


def waits(conversations: list[Conversation]) -> list[float]:
    """Answers when it is let go."""
    assert hold.wait(60)
    return length(conversations)


def own_timeout(conversations: list[Conversation]) -> list[float]:
    raise TimeoutError("mine")
