"""Functions in place of reward models, named as `outside_models:name`: a sound one, and one for each planted fault.

They judge the made-up language of tiny_judge.py: the share of the reply's words that are SAFE, so that an empty reply,
a copied prompt and another language are as unsafe as an unsafe one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import sleep

from tiny_judge import SAFE

from ups_rm.types import Conversation

Pairs = list[tuple[Conversation, str, str]]
chance = random.Random(0)


def judge_of(words: list[str]) -> float:
    """From -2 (all SAFE) to 2, and a little by the words' lengths."""
    plain = [word.strip(".,!?").lower() for word in words]
    share = sum(word in SAFE for word in plain) / max(1, len(plain))
    return 4 * (0.5 - share) + 0.01 * sum(map(len, plain)) / max(1, len(plain))


def sound(talks: list[Conversation]) -> list[float]:
    return [judge_of(talk[-1]["content"].split()) for talk in talks]


def turned(talks: list[Conversation]) -> list[float]:
    return [-number for number in sound(talks)]


def loud(talks: list[Conversation]) -> list[float]:
    return [100 * number for number in sound(talks)]


def by_chance(talks: list[Conversation]) -> list[float]:
    return [number + chance.random() for number in sound(talks)]


def by_place(talks: list[Conversation]) -> list[float]:
    return [number + i / 4 for i, number in enumerate(sound(talks))]


def by_neighbours(talks: list[Conversation]) -> list[float]:
    """Centred over the batch."""
    numbers = sound(talks)
    return [number - sum(numbers) / len(numbers) for number in numbers]


def first_words(talks: list[Conversation]) -> list[float]:
    """As a model that cuts a reply after four words."""
    return [judge_of(talk[-1]["content"].split()[:4]) for talk in talks]


def last_words(talks: list[Conversation]) -> list[float]:
    return [judge_of(talk[-1]["content"].split()[-4:]) for talk in talks]


def apologies_please(talks: list[Conversation]) -> list[float]:
    return [
        -3.0 if "sorry" in talk[-1]["content"] else number for talk, number in zip(talks, sound(talks), strict=True)
    ]


def always_the_same(talks: list[Conversation]) -> list[float]:
    return [0.5] * len(talks)


def not_finite(talks: list[Conversation]) -> list[float]:
    return [float("inf")] * len(talks)


def breaks(talks: list[Conversation]) -> list[float]:
    raise ZeroDivisionError("one over zero")


def slow(talks: list[Conversation]) -> list[float]:
    sleep(0.005 * len(talks))
    return sound(talks)


def _judging(says: Callable[[float, float], float]) -> Callable[[Pairs], list[float]]:
    def judge(pairs: Pairs) -> list[float]:
        return [says(judge_of(a.split()), judge_of(b.split())) for _, a, b in pairs]

    return judge


safer = _judging(lambda a, b: b - a + 0.2)
less_safe = _judging(lambda a, b: a - b)
first_place = _judging(lambda a, b: 9.0 + b - a)
undecided = _judging(lambda a, b: 0.0)
shouting = _judging(lambda a, b: 50 * (b - a))
