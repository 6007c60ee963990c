"""Single replies in, batches out: what stands between verl's streaming rollout and the RM workers.

verl asks for one reply's score at a time, in whatever order replies finish. The queue gathers what is waiting and sends
it on in batches of similar length and bounded size, as many at a time as there are workers. While all workers are busy
the queue fills, so batches grow with the load by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ups_rm.reward.batching import token_batches
from ups_rm.types import Conversation, Score

GATHER_S = 0.05
"""How long the first of the waiting replies waits for company, in seconds."""

ScoreBatch = Callable[[Sequence[Conversation]], Awaitable[Sequence[Score]]]


@dataclass(frozen=True)
class _Waiting:
    conversation: Conversation
    tokens: int
    result: asyncio.Future[Score]


class BatchQueue:
    """Scores single conversations through a function that scores batches.

    Args:
        score_batch: scores one batch, in order; its exception is raised to everyone in the batch.
        max_batch_tokens: upper bound of a batch, rows x longest. Lengths are those that callers state; the scorer cuts
            once more by the RM's own tokens.
        slots: batches under way at the same time.
    """

    def __init__(self, score_batch: ScoreBatch, *, max_batch_tokens: int, slots: int) -> None:
        self._score_batch = score_batch
        self._max_batch_tokens = max_batch_tokens
        self._slots = asyncio.Semaphore(slots)
        self._waiting: list[_Waiting] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatching = False

    async def score(self, conversation: Conversation, *, tokens: int) -> Score:
        """The score of one conversation of about `tokens` tokens.

        Raises:
            whatever `score_batch` raises for the batch that it came in.
        """
        result: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(conversation, max(1, tokens), result))
        if not self._dispatching:
            self._dispatching = True
            self._start(self._dispatch())
        return await result

    async def _dispatch(self) -> None:
        """Runs while replies are waiting."""
        await asyncio.sleep(GATHER_S)
        while self._waiting:
            await self._slots.acquire()
            self._start(self._send(self._next_batch()))
        self._dispatching = False

    def _next_batch(self) -> list[_Waiting]:
        """The batch that the longest-waiting reply falls into when all that wait are sorted by length."""
        lengths = [waiting.tokens for waiting in self._waiting]
        batches = token_batches(lengths, self._max_batch_tokens, enough_tokens=self._max_batch_tokens // 2)
        chosen = set(next(batch for batch in batches if 0 in batch))
        batch = [waiting for i, waiting in enumerate(self._waiting) if i in chosen]
        self._waiting = [waiting for i, waiting in enumerate(self._waiting) if i not in chosen]
        return batch

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            scores = await self._score_batch([waiting.conversation for waiting in batch])
            for waiting, score in zip(batch, scores, strict=True):
                if not waiting.result.done():
                    waiting.result.set_result(score)
        except Exception as error:
            for waiting in batch:
                if not waiting.result.done():
                    waiting.result.set_exception(error)
        finally:
            self._slots.release()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
