"""Random conversations of mixed length, drawn by a seed."""

from __future__ import annotations

import random

from ups_rm.types import Conversation

TEXT = "the quick brown fox jumps over a lazy dog while bread bakes and I play piano in 1999, “quietly”, 你好"
WORDS = TEXT.split()


def talk(draw: random.Random, *, longest: int = 60) -> Conversation:
    """One or two turns; the last reply is empty now and then."""
    messages: Conversation = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        messages.append({"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, longest // 2)))})
        messages.append({"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))})
    if draw.random() < 0.05:
        messages[-1]["content"] = ""
    return messages


def talks(n: int, seed: int = 0, *, longest: int = 60) -> list[Conversation]:
    """`n` conversations."""
    draw = random.Random(seed)
    return [talk(draw, longest=longest) for _ in range(n)]
