"""The reward model as the loop sees it: conversations in, one safe score per reply out, or none where it fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ups_rm.console import console
from ups_rm.device import torch_device
from ups_rm.errors import RMError, RMServerError
from ups_rm.recipe import Recipe
from ups_rm.types import Conversation, Score, Scorer

FAILURES = (RMError, RMServerError, TimeoutError, ConnectionError)
"""What a scorer raises where it has no answer; anything else is a bug in it and ends the run as it is."""
NO_SCORE = Score(math.nan, math.nan, 0, False)


def load_scorer(recipe: Recipe) -> Scorer:
    """The recipe's reward model or models as one scorer, on the device that trains.

    Raises:
        RecipeError: the recipe names none.
    """
    from ups_rm.reward.open import open_scorer

    return open_scorer(recipe.reward_model, str(torch_device(recipe.trainer.device)))


def evaluation_scorer(recipe: Recipe) -> Scorer:
    """As `load_scorer`, but safe_score = sigmoid(-logit) whatever the transform: a comparison is in (0, 1)."""
    from ups_rm.reward.open import open_scorer

    settings = replace(recipe.reward_model, transform="sigmoid", transform_temperature=1.0)
    return open_scorer(settings, str(torch_device(recipe.trainer.device)))


def score_replies(
    scorer: Scorer, conversations: list[Conversation], *, retries: int, max_dropped_share: float
) -> tuple[list[Score], Tensor]:
    """Scores, and which replies have one (B,): the reward model may fail on some of them.

    A batch without an answer (an error, a timeout) is asked for again, then in halves, so that what fails is found;
    scores that are not numbers are asked for again by themselves. A reply that fails all the same has `NO_SCORE`.

    Args:
        retries: how often the same question is asked again.
        max_dropped_share: more replies without a score end the run.

    Raises:
        RMError: more than that, with the model's own words.
    """
    scores = [NO_SCORE] * len(conversations)
    reasons: list[str] = []
    for rows in _halves_that_answer(scorer, conversations, list(range(len(conversations))), retries, reasons):
        for row, score in rows:
            scores[row] = score
    for _ in range(retries):
        broken = [i for i, score in enumerate(scores) if not _is_number(score) and score is not NO_SCORE]
        if not broken:
            break
        for row, score in zip(broken, scorer.score([conversations[i] for i in broken]), strict=True):
            scores[row] = score
    scored = torch.tensor([_is_number(score) for score in scores])
    dropped = int((~scored).sum())
    if dropped > max_dropped_share * len(scores):
        logit = next((s.logit for s in scores if not _is_number(s) and s is not NO_SCORE), None)
        raise RMError(
            f"the RM gave {dropped} of {len(scores)} replies no score that is a number"
            f"{f' (logit {logit})' if logit is not None else ''}{f': {reasons[0]}' if reasons else ''}\n"
            f"  more than reward_model.max_dropped_share={max_dropped_share:g} of them ends the run\n"
            "  fix: reward_model.model.dtype=float32, then ups-rm rm check FOLDER"
        )
    if dropped:
        rows = (~scored).nonzero().flatten().tolist()
        console.print(
            f"the RM has no score for replies {rows}: left out of their groups{f' ({reasons[0]})' if reasons else ''}",
            markup=False,
        )
    return scores, scored


def _halves_that_answer(
    scorer: Scorer, conversations: list[Conversation], rows: list[int], retries: int, reasons: list[str]
) -> Iterator[list[tuple[int, Score]]]:
    """(row, score) of every part that is answered; a part of one reply that is not is left out.

    Raises:
        RMError, RMServerError: neither half is answered: the model, not a reply, is at fault.
    """
    parts = [rows]
    while parts:
        part = parts.pop()
        answer = _ask(scorer, [conversations[i] for i in part], retries, reasons)
        if answer is not None:
            yield list(zip(part, answer, strict=True))
        elif len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
            if len(reasons) > 2 * len(rows).bit_length() + 1:  # more than one reply fails: all of them may
                raise RMError(f"the RM fails on most replies: {reasons[-1]}")


def _ask(scorer: Scorer, conversations: list[Conversation], retries: int, reasons: list[str]) -> list[Score] | None:
    for attempt in range(retries + 1):
        try:
            return scorer.score(conversations)
        except FAILURES as error:
            # a client of an HTTP service has been patient by itself
            if isinstance(error, RMServerError) or attempt == retries:
                reasons.append(str(error) or type(error).__name__)
                break
    return None


def _is_number(score: Score) -> bool:
    return math.isfinite(score.safe_score) and (score.helpfulness is None or math.isfinite(score.helpfulness))
