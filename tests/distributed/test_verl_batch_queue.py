"""The queue between single replies and RM workers: every reply gets its own score, batches are bounded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.distributed.batch_queue import BatchQueue
from ups_rm.errors import RMError
from ups_rm.types import Conversation, Score


def conversation(name: int) -> Conversation:
    return [{"role": "user", "content": str(name)}]


class Recorder:
    """Scores a conversation by its number, and remembers batches and how many ran at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.running = self.most = 0

    async def __call__(self, conversations: Sequence[Conversation]) -> list[Score]:
        names = [int(messages[0]["content"]) for messages in conversations]
        self.batches.append(names)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        if 13 in names:
            raise RMError("unlucky")
        return [Score(logit=float(name), safe_score=0.5, tokens=1, truncated=False) for name in names]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_tokens=st.integers(1, 1000),
    slots=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_reply_gets_its_score_in_bounded_batches(
    lengths: list[int], max_tokens: int, slots: int, seed: int
) -> None:
    recorder, draw = Recorder(), random.Random(seed)
    lengths = lengths[:13] + lengths[14:]  # 13 is unlucky

    async def one(queue: BatchQueue, i: int) -> float:
        await asyncio.sleep(draw.random() / 100)
        return (await queue.score(conversation(i), tokens=lengths[i])).logit

    async def run() -> list[float]:
        queue = BatchQueue(recorder, max_batch_tokens=max_tokens, slots=slots)
        return list(await asyncio.gather(*(one(queue, i) for i in range(len(lengths)) if i != 13)))

    names = [i for i in range(len(lengths)) if i != 13]
    assert asyncio.run(run()) == names
    assert sorted(name for batch in recorder.batches for name in batch) == names
    for batch in recorder.batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    assert recorder.most <= slots


def test_similar_lengths_go_together() -> None:
    recorder = Recorder()

    async def run() -> None:
        queue = BatchQueue(recorder, max_batch_tokens=400, slots=1)
        await asyncio.gather(*(queue.score(conversation(i), tokens=100 if i % 2 else 10) for i in range(8)))

    asyncio.run(run())
    assert {frozenset(batch) for batch in recorder.batches} == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}


def test_batches_grow_while_workers_are_busy() -> None:
    recorder = Recorder(seconds=0.2)

    async def run() -> None:
        queue = BatchQueue(recorder, max_batch_tokens=1000, slots=1)
        first = asyncio.create_task(queue.score(conversation(0), tokens=10))
        await asyncio.sleep(0.1)  # the first is on its way alone
        await asyncio.gather(first, *(queue.score(conversation(i), tokens=10) for i in range(1, 12)))

    asyncio.run(run())
    assert [len(batch) for batch in recorder.batches] == [1, 11]


def test_a_failed_batch_fails_its_own_replies_only() -> None:
    recorder = Recorder()

    async def run() -> list[float | BaseException]:
        queue = BatchQueue(recorder, max_batch_tokens=20, slots=2)
        calls = [queue.score(conversation(name), tokens=10) for name in (11, 12, 13, 14, 15, 16)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [answer.logit if isinstance(answer, Score) else answer for answer in answers]

    answers = asyncio.run(run())
    unlucky = next(batch for batch in recorder.batches if 13 in batch)
    for name, answer in zip((11, 12, 13, 14, 15, 16), answers, strict=True):
        if name in unlucky:
            assert isinstance(answer, RMError)
        else:
            assert answer == name


def test_an_idle_queue_starts_again() -> None:
    recorder = Recorder()

    async def run() -> None:
        queue = BatchQueue(recorder, max_batch_tokens=100, slots=2)
        for name in (1, 2, 3):
            assert (await queue.score(conversation(name), tokens=5)).logit == name
            await asyncio.sleep(0.07)

    asyncio.run(run())
    assert recorder.batches == [[1], [2], [3]]
    with pytest.raises(RMError, match="unlucky"):
        asyncio.run(BatchQueue(recorder, max_batch_tokens=9, slots=1).score(conversation(13), tokens=5))
