"""Speed: tokens per second at the batch sizes that fit."""

from __future__ import annotations

from time import perf_counter

from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Result

TOKENS = 128
LARGEST = 256


def speed(exam: Exam) -> Result:
    """128 tokens a conversation, batches of 1, 2, 4, ... until memory, max_batch_tokens or a tenth of the time ends."""
    import torch

    base = [token for row in exam.rows for token in row]
    row = (base * (TOKENS // len(base) + 1))[:TOKENS]
    limit = min(TOKENS, int(exam.config.get("max_position_embeddings") or TOKENS))
    found: dict[int, float] = {}
    size, started, stopped = 1, perf_counter(), "largest batch tried"
    exam.scorer.batch_logits([row[:limit]])  # the first forward allocates
    while size <= LARGEST:
        if size * limit > exam.scorer.max_batch_tokens:
            stopped = f"max_batch_tokens {exam.scorer.max_batch_tokens}"
            break
        begun = perf_counter()
        try:
            exam.scorer.batch_logits([row[:limit]] * size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            stopped = "out of memory"
            break
        found[size] = size * limit / (perf_counter() - begun)
        if 3 * (perf_counter() - started) > exam.seconds / 10:  # the next one takes twice as long
            stopped = "time"
            break
        size *= 2
    best = max(found, key=lambda one: found[one])
    finding = f"{found[best]:,.0f} tokens/s in batches of {best} x {limit} ({found[1]:,.0f} alone); ended by {stopped}"
    details = {"tokens_per_second": {str(size): speed for size, speed in found.items()}, "tokens": limit}
    return Result("pass", finding, found[best], None, "", details)
