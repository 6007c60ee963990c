"""The queue between requests and models: everything is answered once, batches are full and even, room is bounded."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest

from ups_rm.errors import RMError
from ups_rm.reward.batch_queue import BatchQueue, BatchReport, QueueFullError
from ups_rm.reward.batching import token_batches
from ups_rm.reward.render import Rendered
from ups_rm.reward.shared_prompt import Row, shared_rows


class Recorder:
    """Stands for a loaded RM: a logit is a function of the ids; each batch waits at a gate and is written down."""

    device = "cpu"

    def __init__(self, *, max_batch_tokens: int = 64, enough_tokens: int = 32) -> None:
        self.max_batch_tokens, self.enough_tokens = max_batch_tokens, enough_tokens
        self.gate = threading.Event()
        self.started = threading.Event()
        self.batches: list[list[list[int]]] = []
        self.packed: list[list[Row]] = []
        self.fails_on: int | None = None

    def rows_of(self, ids: Sequence[list[int]], prompts: Sequence[Hashable] | None = None) -> list[Row]:
        if prompts is None:
            return [Row((i,), 0, len(one)) for i, one in enumerate(ids)]
        return shared_rows(ids, prompts, self.max_batch_tokens)

    def laid_out(self) -> AbstractContextManager[None]:
        return nullcontext()

    def row_answers(self, packed: Sequence[Row], ids: Sequence[list[int]]) -> list[tuple[float, ...]]:
        rows = [ids[i] for row in packed for i in row.texts]
        self.batches.append(rows)
        self.packed.append(list(packed))
        self.started.set()
        assert self.gate.wait(30)
        if self.fails_on is not None and any(row[0] == self.fails_on for row in rows):
            raise MemoryError("too much")
        return [(logit(row),) for row in rows]


def logit(row: list[int]) -> float:
    return math.nan if row[0] == 13 else float(sum(row) % 101)


def rows(*lengths: int, first: int = 1) -> list[Rendered]:
    return [Rendered([first + i, *range(length - 1)], False) for i, length in enumerate(lengths)]


def blocked(recorder: Recorder, queue: BatchQueue) -> None:
    """A first request keeps the model busy, so that what follows waits in the queue."""
    queue.submit(rows(1, first=7))
    assert recorder.started.wait(10)


@pytest.mark.parametrize("models", [1, 3])
def test_every_conversation_is_answered_once_and_in_place(models):
    recorders = [Recorder() for _ in range(models)]
    for recorder in recorders:
        recorder.gate.set()
    reports: list[BatchReport] = []
    queue = BatchQueue(recorders, max_waiting=10_000, on_batch=reports.append)
    draw = random.Random(3)
    requests = [rows(*(draw.randint(1, 30) for _ in range(draw.randint(0, 9))), first=20 + 10 * k) for k in range(60)]
    found: dict[int, list[tuple[float, ...]]] = {}

    def client(part: int) -> None:
        for k in range(part, len(requests), 6):
            found[k] = queue.submit(requests[k]).future.result(30)

    threads = [threading.Thread(target=client, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close()
    assert found == {k: [(logit(row.input_ids),) for row in request] for k, request in enumerate(requests)}
    seen = [tuple(row) for recorder in recorders for batch in recorder.batches for row in batch]
    assert sorted(seen) == sorted(tuple(row.input_ids) for request in requests for row in request)
    assert sum(report.tokens for report in reports) == sum(map(len, seen))
    assert sum(report.conversations for report in reports) == len(seen)


def test_what_waits_together_is_batched_by_length_within_the_token_limit():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000)
    blocked(recorder, queue)
    draw = random.Random(5)
    jobs = [queue.submit(rows(draw.randint(1, 40))) for _ in range(80)]
    recorder.gate.set()
    queue.close()
    lengths = [len(job.rendered[0].input_ids) for job in jobs]
    expected = [sorted(lengths[i] for i in batch) for batch in token_batches(lengths, 64, enough_tokens=32)]
    found = [sorted(map(len, batch)) for batch in recorder.batches[1:]]
    assert sorted(found) == sorted(expected)
    assert max(len(batch) for batch in found) > 1


def test_one_request_on_an_idle_server_makes_the_batches_of_the_in_process_scorer():
    recorder = Recorder()
    recorder.gate.set()
    queue = BatchQueue([recorder], max_waiting=1000)
    lengths = [random.Random(k).randint(1, 50) for k in range(70)]
    request = rows(*lengths, first=200)
    queue.submit(request).future.result(30)
    queue.close()
    expected = [[request[i].input_ids for i in batch] for batch in token_batches(lengths, 64, enough_tokens=32)]
    assert sorted(recorder.batches) == sorted(expected)


def test_replies_to_one_prompt_stand_in_one_row_within_a_request_alone():
    """A row holds the prompt once; answers are each reply's own, also beside rows of other requests."""
    recorder, reports = Recorder(max_batch_tokens=500, enough_tokens=400), list[BatchReport]()
    queue = BatchQueue([recorder], max_waiting=1000, on_batch=reports.append)
    blocked(recorder, queue)

    def group(prompt: int) -> list[Rendered]:
        begin = [prompt, *range(40)]  # 41 tokens in common
        return [Rendered([*begin, 60 + i, 61, 62], False) for i in range(3)]

    lone = rows(20, first=300)
    requests = [group(200) + lone, group(200)]
    prompts = [["a", "a", "a", "b"], ["a", "a", "a"]]
    jobs = [queue.submit(request, names) for request, names in zip(requests, prompts, strict=True)]
    assert queue.queued_tokens == 2 * (41 + 3 * 3) + 20
    recorder.gate.set()
    queue.close()
    for job, request in zip(jobs, requests, strict=True):
        assert job.future.result(30) == [(logit(row.input_ids),) for row in request]
    packed = [row for batch in recorder.packed[1:] for row in batch]
    assert sorted((len(row.texts), row.shared, row.length) for row in packed) == [(1, 0, 20), (3, 41, 50), (3, 41, 50)]
    for batch in recorder.packed:  # numbers of texts are those of the batch
        assert [i for row in batch for i in row.texts] == list(range(sum(len(row.texts) for row in batch)))
    assert sum(report.tokens for report in reports[1:]) == 120
    assert sum(report.conversations for report in reports[1:]) == 7


def test_the_oldest_is_never_overtaken_by_more_than_the_batch_in_work():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000)
    blocked(recorder, queue)
    queue.submit(rows(60, first=50))  # of a length that nothing else has
    for k in range(40):
        queue.submit(rows(5, first=100 + k))
    recorder.gate.set()
    queue.close()
    assert recorder.batches[1][0][0] == 50


def test_by_request_keeps_requests_apart():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000, by_request=True)
    blocked(recorder, queue)
    for k in range(6):
        queue.submit(rows(4, 4, first=100 * k + 100))
    recorder.gate.set()
    queue.close()
    assert [{row[0] // 100 for row in batch} for batch in recorder.batches[1:]] == [{k + 1} for k in range(6)]


def test_room_is_bounded_and_comes_back():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=5)
    queue.reserve(3)
    with pytest.raises(QueueFullError, match="3 conversations are waiting, the limit is 5") as full:
        queue.reserve(3)
    assert 1 <= full.value.retry_after <= 60
    queue.reserve(2)
    queue.release(3)
    queue.reserve(3)
    recorder.gate.set()
    queue.close()


def test_close_computes_what_is_queued():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000)
    blocked(recorder, queue)
    jobs = [queue.submit(rows(9)) for _ in range(30)]
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert queue.alive() is False
    recorder.gate.set()
    closing.join(30)
    assert all(job.future.done() and job.future.result() == [(logit(job.rendered[0].input_ids),)] for job in jobs)


def test_an_abandoned_request_is_not_computed():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000)
    blocked(recorder, queue)
    gone, kept = queue.submit(rows(9, 9, first=40)), queue.submit(rows(9, first=60))
    queue.abandon(gone)
    recorder.gate.set()
    assert kept.future.result(30) == [(logit(kept.rendered[0].input_ids),)]
    queue.close()
    assert not [row for batch in recorder.batches for row in batch if row[0] in (40, 41)]


def test_a_failing_model_fails_its_batch_and_serves_on():
    recorder = Recorder()
    recorder.fails_on = 90
    recorder.gate.set()
    queue = BatchQueue([recorder], max_waiting=1000)
    with pytest.raises(MemoryError, match="too much"):
        queue.submit(rows(5, first=90)).future.result(30)
    assert queue.alive()
    assert queue.submit(rows(5, first=91)).future.result(30) == [(logit(rows(5, first=91)[0].input_ids),)]
    queue.close()


def test_a_logit_that_is_not_finite_is_an_error_of_its_request_only():
    recorder = Recorder()
    queue = BatchQueue([recorder], max_waiting=1000)
    blocked(recorder, queue)
    bad, good = queue.submit(rows(4, 4, first=12)), queue.submit(rows(4, first=30))
    recorder.gate.set()
    with pytest.raises(RMError, match="nan for conversation 1 of 2"):
        bad.future.result(30)
    assert good.future.result(30) == [(logit(good.rendered[0].input_ids),)]
    queue.close()
