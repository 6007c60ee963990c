"""The bounded queue between requests and models: many small requests in, full batches of like length out.

A request reserves room for its conversations (`reserve`: refused when there is none), hands its token ids over
(`submit`) and gets a future of its logits. Those of one prompt in one request stand in one row, which holds the prompt
once (`RewardScorer.rows_of`, as in-process). One thread per model takes, whenever its model is free, the batch that the
oldest waiting row is in; what has arrived meanwhile fills it up, nearest lengths first, within the batch's token limit
(`token_batches`, as in-process). So nothing waits for a full batch, nothing starves, and padding is small.

Nothing here knows HTTP; text and tokenizers are done before.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

from ups_rm.errors import RMError
from ups_rm.reward.batching import token_batches
from ups_rm.reward.render import Rendered

if TYPE_CHECKING:
    from ups_rm.reward.scorer import Answer, RewardScorer
    from ups_rm.reward.shared_prompt import Row

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """No room; `retry_after` is in how many seconds, by the speed so far, what is queued now will be done."""

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{waiting} conversations are waiting, the limit is {limit}; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class BatchReport:
    """What one batch was, for metrics. `tokens`: that were computed, a shared prompt once. `longest_wait`: seconds from
    `submit` to the start of the batch, of the conversation that waited longest."""

    device: str
    conversations: int
    tokens: int
    padding: int
    seconds: float
    longest_wait: float


@dataclass(eq=False)
class Job:
    """The conversations of one request on their way through the models."""

    rendered: list[Rendered]
    answers: list[Answer]
    left: int
    future: Future[list[Answer]] = field(default_factory=Future)
    submitted: float = field(default_factory=perf_counter)


class BatchQueue:
    """Models, one thread each, and the conversations that wait for them. Thread-safe.

    Args:
        scorers: one loaded RM per device, all of the same folder.
        max_waiting: conversations that may be reserved, waiting or computed at one time.
        by_request: batches hold conversations of one request only, as the in-process scorer would make them: the same
            request gets bitwise the same logits whatever else the server does, and small requests get small batches.
        on_batch: called after each batch, from the model's thread.
    """

    def __init__(
        self,
        scorers: Sequence[RewardScorer],
        *,
        max_waiting: int,
        by_request: bool = False,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self.max_waiting = max_waiting
        self.by_request = by_request
        self.waiting = 0  # conversations reserved and not yet released
        self.queued_tokens = 0
        self.tokens_per_second = 0.0  # of all models together, a moving mean
        self._on_batch = on_batch
        self._models, self._rows_of = len(scorers), scorers[0].rows_of
        self._queue: list[tuple[Job, Row]] = []  # oldest first
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, args=(scorer,), name=f"rm-{scorer.device}-{i}", daemon=True)
            for i, scorer in enumerate(scorers)
        ]
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        """Whether every model still has its thread and requests are taken."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def reserve(self, conversations: int) -> None:
        """Keep room for a request; `release` gives it back.

        Raises:
            QueueFullError: it does not fit now.
        """
        with self._changed:
            if self.waiting + conversations > self.max_waiting:
                seconds = self.queued_tokens / self.tokens_per_second if self.tokens_per_second else 1.0
                raise QueueFullError(self.waiting, self.max_waiting, max(1, min(60, math.ceil(seconds))))
            self.waiting += conversations

    def release(self, conversations: int) -> None:
        """Give back what `reserve` kept."""
        with self._changed:
            self.waiting -= conversations

    def submit(self, rendered: Sequence[Rendered], prompts: Sequence[Hashable] | None = None) -> Job:
        """Queue a request's conversations, all at once; `job.future` gives every head's logits in this order.

        Args:
            prompts: equal for conversations that differ in the last message only: what they share is computed once.
        """
        job = Job(list(rendered), [()] * len(rendered), len(rendered))
        if not rendered:
            job.future.set_result([])
            return job
        rows = self._rows_of([one.input_ids for one in rendered], prompts)
        with self._changed:
            if self._closing:
                raise RuntimeError("submit after close")
            self._queue += [(job, row) for row in rows]
            self.queued_tokens += sum(row.length for row in rows)
            self._changed.notify_all()
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job any more: what is still queued of it is not computed."""
        with self._changed:
            self._finish(job, TimeoutError("abandoned"))

    def close(self) -> None:
        """Compute everything that is queued, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self, scorer: RewardScorer) -> None:
        with scorer.laid_out():
            self._serve_batches(scorer)

    def _serve_batches(self, scorer: RewardScorer) -> None:
        while batch := self._take(scorer):
            started = perf_counter()
            places = [(job, i) for job, row in batch for i in row.texts]
            ids, rows = [job.rendered[i].input_ids for job, i in places], [row for _, row in batch]
            try:
                answers = scorer.row_answers(_numbered_anew(rows), ids)
            except Exception as error:  # whatever it is: it answers these requests and does not end the server
                log.exception("a batch of %d conversations failed on %s", len(ids), scorer.device)
                with self._changed:
                    for job, _ in batch:
                        self._finish(job, error)
                continue
            seconds = perf_counter() - started
            tokens = sum(row.length for row in rows)
            with self._changed:
                for (job, i), answer in zip(places, answers, strict=True):
                    self._answer(job, i, answer)
                rate = self._models * tokens / max(seconds, 1e-6)
                self.tokens_per_second += (rate - self.tokens_per_second) * (0.1 if self.tokens_per_second else 1.0)
            padding = len(rows) * max(row.length for row in rows) - tokens
            wait = started - min(job.submitted for job, _ in batch)
            self._on_batch(BatchReport(str(scorer.device), len(ids), tokens, padding, seconds, wait))

    def _take(self, scorer: RewardScorer) -> list[tuple[Job, Row]]:
        """The next batch for this model, waiting for one; empty when the queue is closed and done."""
        with self._changed:
            while True:
                self._queue = [item for item in self._queue if not item[0].future.done()]
                if self._queue:
                    break
                self.queued_tokens = 0
                if self._closing:
                    return []
                self._changed.wait()
            oldest = self._queue[0][0]
            candidates = [item for item in self._queue if item[0] is oldest] if self.by_request else self._queue
            lengths = [row.length for _, row in candidates]
            batches = token_batches(lengths, scorer.max_batch_tokens, enough_tokens=scorer.enough_tokens)
            chosen = next(batch for batch in batches if 0 in batch)  # candidate 0 is the oldest
            batch = [candidates[k] for k in chosen]
            taken = {(id(job), row) for job, row in batch}
            self._queue = [item for item in self._queue if (id(item[0]), item[1]) not in taken]
            self.queued_tokens = sum(row.length for _, row in self._queue)
            return batch

    def _answer(self, job: Job, i: int, answer: Answer) -> None:
        if not all(map(math.isfinite, answer)):
            logit = next(value for value in answer if not math.isfinite(value))
            self._finish(
                job,
                RMError(
                    f"the RM's logit is {logit} for conversation {i} of {len(job.rendered)}\n"
                    "  fix: serve in float32, and `ups-rm rm check` on the folder"
                ),
            )
            return
        job.answers[i] = answer
        job.left -= 1
        if job.left == 0 and not job.future.done():
            job.future.set_result(job.answers)

    @staticmethod
    def _finish(job: Job, error: BaseException) -> None:
        """End a job without logits, unless it has ended. Called with the lock held."""
        if not job.future.done():
            job.future.set_exception(error)


def _numbered_anew(rows: Sequence[Row]) -> list[Row]:
    """Their texts counted through the batch, in the order they stand there."""
    counted, found = 0, []
    for row in rows:
        found.append(replace(row, texts=tuple(range(counted, counted + len(row.texts)))))
        counted += len(row.texts)
    return found
