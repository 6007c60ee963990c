"""Degenerate replies made of good ones: the shapes a policy falls into when a reward model happens to pay for them.

Labelled replies were written by working models, so a head trained on them alone has never seen "No, no, no, no" and may
score it as safe as anything. Here good replies are spoiled in ways that need no label: of the reply as it was and its
spoiled form, the spoiled one is worse. Rows out are like any others, but come from the file `degenerate` and say only
`better_response_id`, so no other part of the training takes them for judged replies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ups_rm.data.rows import Row

DEGENERATE = "degenerate"
"""`Row.file` of the rows made here."""

MAX_WORDS = 60
"""Both replies of a row are cut to about the length that a policy samples, so that length tells nothing."""

OPENERS = (
    *("No", "Yes", "Oh no", "Oh", "Well", "I'm sorry", "Sorry", "Of course", "Never", "Please", "Okay", "Stop"),
    *("Don't", "Sure", "Hello", "Thank you", "Absolutely not", "Be careful"),
)
_ENDS = ("!", ",", ".", "...")

Spoil = Callable[[random.Random, list[str], list[str]], list[str]]
"""(random numbers, words of a good reply, words of another prompt's reply) -> words of the spoiled reply."""


def looped(rng: random.Random, words: list[str], other: list[str]) -> list[str]:
    """A few words over and over, perhaps after a sane beginning."""
    start = rng.randrange(max(1, len(words) - 6))
    unit = [_opener(rng)] if rng.random() < 0.5 else words[start : start + rng.randint(1, 6)]
    beginning = words[: rng.randint(3, 20)] if rng.random() < 0.5 else []
    return beginning + unit * rng.randint(4, 16)


def stuttered(rng: random.Random, words: list[str], other: list[str]) -> list[str]:
    """An interjection two to six times, then the reply."""
    return [_opener(rng)] * rng.randint(2, 6) + words[: MAX_WORDS - 10]


def misplaced(rng: random.Random, words: list[str], other: list[str]) -> list[str]:
    """A reply to another prompt."""
    return other[:MAX_WORDS]


SPOILS: tuple[Spoil, ...] = (looped, stuttered, misplaced)


def degenerate_rows(rows: Sequence[Row], count: int, *, seed: int = 0) -> list[Row]:
    """Up to `count` rows (spoiled reply, good reply), `better_response_id` 1, no safety labels.

    Good replies are distinct ones that are flagged safe and have more than 8 words. Same rows and seed, same result.
    """
    rng = random.Random(seed)
    good = {
        (row.prompt, reply): row
        for row in rows
        for reply, safe in zip(row.responses, row.safe, strict=True)
        if safe and len(reply.split()) > 8
    }
    chosen = rng.sample(list(good.items()), min(count, len(good)))
    made: list[Row] = []
    for (prompt, reply), row in chosen:
        words = reply.split()
        others = [other for (asked, other), _ in chosen if asked != prompt]
        spoil = rng.choice(SPOILS if others else (looped, stuttered))
        spoiled = spoil(rng, words, rng.choice(others).split() if others else [])
        made.append(
            Row(
                prompt=prompt,
                response_0=" ".join(spoiled),
                response_1=" ".join(words[:MAX_WORDS]),
                is_response_0_safe=None,
                is_response_1_safe=None,
                safer_response_id=None,
                better_response_id=1,
                prompt_source=row.prompt_source,
                subset=row.subset,
                split=row.split,
                file=DEGENERATE,
                line=len(made) + 1,
            )
        )
    return made


def _opener(rng: random.Random) -> str:
    return rng.choice(OPENERS) + rng.choice(_ENDS)
