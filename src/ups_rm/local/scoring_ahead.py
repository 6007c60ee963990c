"""Groups are scored while others still decode, where the reward model computes elsewhere.

A reward model in this process shares the cores or the GPU that decode, so nothing is won by asking it early. One behind
a `url` has a machine of its own: a group goes there when its last reply has ended, and `timing_s/reward` is then only
what is still to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ups_rm.local.scoring import FAILURES
from ups_rm.recipe import RewardModel
from ups_rm.types import Conversation, Score, Scorer

GROUPS_AT_ONCE = 4
"""Requests on their way."""


def computes_elsewhere(settings: RewardModel) -> bool:
    """Every model that is asked stands behind a `url`."""
    asked = settings.asked()
    return bool(asked) and all(entry.url for entry in asked)


class ScoringAhead:
    """A scorer that has asked already where it computes elsewhere; used as a context manager, for one rollout.

    A group is always asked for by itself, so its scores do not depend on which other groups had ended. A request that
    failed is as if it had not been made: `score` asks again, and raises what it then raises.
    """

    def __init__(self, scorer: Scorer, settings: RewardModel) -> None:
        self.scorer = scorer
        self.on_group: Callable[[list[Conversation]], None] | None = self.ask if computes_elsewhere(settings) else None
        self._pool = ThreadPoolExecutor(GROUPS_AT_ONCE, thread_name_prefix="scoring-ahead")
        self._asked: dict[str, tuple[Future[list[Score]], int]] = {}  # by conversation; its place in that request

    def __enter__(self) -> ScoringAhead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, conversations: list[Conversation]) -> None:
        """Of a group whose replies have all ended."""
        future = self._pool.submit(self.scorer.score, conversations)
        for place, conversation in enumerate(conversations):
            self._asked[repr(conversation)] = future, place

    def score(self, conversations: list[Conversation]) -> list[Score]:
        """As the scorer's own: of what was asked for the answers, waited for if need be; the others are asked for now.

        An answer is given once. Who asks again (score_replies does so for a score that is no number) asks the model.
        """
        found: dict[int, Score] = {}
        for row, conversation in enumerate(conversations):
            future, place = self._asked.get(repr(conversation), (None, 0))
            if future is None:
                continue
            with suppress(*FAILURES):
                found[row] = future.result()[place]
        self._asked.clear()
        rest = [row for row in range(len(conversations)) if row not in found]
        if rest:
            found |= zip(rest, self.scorer.score([conversations[row] for row in rest]), strict=True)
        return [found[row] for row in range(len(conversations))]
