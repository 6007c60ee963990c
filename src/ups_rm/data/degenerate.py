"""Degenerate replies made of good ones: what a policy falls into when a reward model happens to pay for it.

Labelled replies were written by working models, so a head trained on them alone has never seen "No, no, no, no" and may
score it as safe as anything; and it learns that refusing is safe, but not that a harmless question deserves an answer.
Here good replies are spoiled in ways that need no label: of the reply as it was and its spoiled form, the spoiled one
is worse. Rows out are like any others, but come from the file `degenerate` and say only `better_response_id`, so no
other part of the training takes them for judged replies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ups_rm.data.prompts import kind_of
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
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but as an AI language model, I don't have the ability to do this.",
    "As an AI, I do not have personal experience or opinions, so I cannot answer this.",
    "I am a specialized AI and do not have the capabilities for this.",
    "I apologize, but I am not able to provide information on that topic.",
    "I'm sorry for the misunderstanding, but I'm only a computer program and can't assist with this request.",
    "I'm not able to discuss this. Is there anything else I can help you with?",
    "Unfortunately, I'm unable to give advice about that. Please ask a professional.",
    "I'm here to assist you with your questions, but this one is outside of what I was designed for.",
    "It is important to remember that I am a digital assistant. I must not engage in this topic.",
)

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


def degenerate_rows(
    rows: Sequence[Row], count: int, *, refuses: Callable[[str], bool] = lambda reply: False, seed: int = 0
) -> list[Row]:
    """Rows (spoiled reply, good reply), `better_response_id` 1, without safety labels.

    Up to `count` good replies are drawn: distinct ones that are flagged safe and have more than 8 words. Each is
    spoiled once; if its prompt is harmless and it does not refuse, it is also set against a refusal, a stock phrase or
    one from the rows. Same rows and seed, same result.

    Args:
        refuses: tells a refusal (`ups_rm.evaluation.is_refusal`). Without it, refusals are stock phrases only.
    """
    rng = random.Random(seed)
    good = {
        (row.prompt, reply): row
        for row in rows
        for reply, safe in zip(row.responses, row.safe, strict=True)
        if safe and len(reply.split()) > 8
    }
    chosen = rng.sample(list(good.items()), min(count, len(good)))
    refusals = sorted({reply for _, reply in good if refuses(reply)})
    places: dict[str, list[int]] = {}
    for i, ((prompt, _), _) in enumerate(chosen):
        places.setdefault(prompt, []).append(i)
    made: list[Row] = []
    for (prompt, reply), row in chosen:
        words, other = reply.split(), list[str]()
        others = len(chosen) - len(places[prompt])
        spoil = rng.choice(SPOILS if others else (looped, stuttered))
        if others:
            other = chosen[_skipping(rng.randrange(others), places[prompt])][0][1].split()
        spoiled = [spoil(rng, words, other)]
        if kind_of(row.prompt_source) == "benign" and not refuses(reply):
            stock = not refusals or rng.random() < 1 / 3
            text = " ".join(rng.sample(REFUSALS, rng.randint(1, 3))) if stock else rng.choice(refusals)
            spoiled.append(text.split()[:MAX_WORDS])
        made += [_row(row, " ".join(one), " ".join(words[:MAX_WORDS]), len(made) + i) for i, one in enumerate(spoiled)]
    return made


def _row(source: Row, spoiled: str, good: str, line: int) -> Row:
    return Row(
        prompt=source.prompt,
        response_0=spoiled,
        response_1=good,
        is_response_0_safe=None,
        is_response_1_safe=None,
        safer_response_id=None,
        better_response_id=1,
        prompt_source=source.prompt_source,
        subset=source.subset,
        split=source.split,
        file=DEGENERATE,
        line=line + 1,
    )


def _skipping(number: int, left_out: Sequence[int]) -> int:
    """The place of the `number`-th item when those at some places, in ascending order, are not counted."""
    for place in left_out:
        number += number >= place
    return number


def _opener(rng: random.Random) -> str:
    return rng.choice(OPENERS) + rng.choice(_ENDS)
