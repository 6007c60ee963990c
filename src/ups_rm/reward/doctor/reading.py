"""Reads the right token? The same logits whatever the padding, its id, the neighbours, the order, the number format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.render import Rendered

NATIVE = "load it with our code (without trust_remote_code), which reads the last attended token by mask"
MIN_SPREAD = 1e-3
UNSEEN = 1e-6


def finite(exam: Exam) -> Result:
    """No NaN and no infinity among the answers to BATTERY."""
    broken = [logit for logit in exam.alone if not math.isfinite(logit)]
    if broken:
        finding = f"{len(broken)} of {len(exam.alone)} logits are not finite in {exam.scorer.dtype}"
        return Result("fail", finding, float(len(broken)), 0.0, "dtype float32; if it stays, the weights are broken")
    low, high = min(exam.alone), max(exam.alone)
    return Result("pass", f"{len(exam.alone)} conversations, logits {low:.3f} to {high:.3f}", 0.0, 0.0)


def padding_id(exam: Exam) -> Result:
    """Masked positions may hold any id: 0, pad, EOS, the end token, BOS. pad == EOS does not matter either."""
    own = exam.scorer.tokenizer
    end = own.convert_tokens_to_ids(exam.scorer.policy.end_token) if exam.scorer.policy.end_token else None
    ids = {"0": 0, "pad": own.pad_token_id, "EOS": own.eos_token_id, "end token": end, "BOS": own.bos_token_id}
    usable = {name: i for name, i in ids.items() if i is not None and i < exam.embedding_rows}
    logits = {name: exam.padded(i) for name, i in usable.items()}
    differences = {name: exam.worst(found, logits["0"]) for name, found in logits.items()}
    name = max(differences, key=lambda one: differences[one])
    details = {"ids": usable, "differences": differences}
    if differences[name] > exam.tolerance:
        equal = f" (pad is id {own.pad_token_id}, EOS {own.eos_token_id})"
        finding = (
            f"pad == eos bug: logits depend on the id in masked positions, {name} against 0{equal}: it is read by id"
        )
        return Result("fail", finding, differences[name], exam.tolerance, NATIVE, details)
    finding = f"padding of id {', '.join(usable)}: the same logits"
    return Result("pass", finding, differences[name], exam.tolerance, "", details)


def right_padding(exam: Exam) -> Result:
    return _same(exam, exam.scorer.batch_logits(exam.rows), "right padding against none")


def left_padding(exam: Exam) -> Result:
    if exam.is_encoder:
        return Result("skip", "an encoder: the scorer pads it on the right only")
    return _same(exam, exam.scorer.batch_logits(exam.rows, side="left"), "left padding against none")


def batch(exam: Exam) -> Result:
    """Each conversation beside the next one, against each alone."""
    circle = [*exam.rows, exam.rows[0]]
    found = [exam.scorer.batch_logits([a, b])[0] for a, b in pairwise(circle)]
    return _same(exam, found, "each with another neighbour against each alone")


def order(exam: Exam) -> Result:
    """The scorer's own way, batches sorted by length, asked forwards and backwards."""
    backwards = exam.scorer.logits([Rendered(row, False) for row in reversed(exam.rows)])
    forwards = exam.scorer.logits([Rendered(row, False) for row in exam.rows])
    worse = max(backwards[::-1], forwards, key=exam.worst)
    return _same(exam, worse, "the scorer's batches in either order against each alone")


def _same(exam: Exam, found: Sequence[float], what: str) -> Result:
    worst = exam.worst(found)
    if worst <= exam.tolerance:
        return Result("pass", f"{what}: the same logits", worst, exam.tolerance)
    return Result("fail", f"logits change, {what}: by {worst:.3g}", worst, exam.tolerance, NATIVE)


def missing_end(exam: Exam) -> Result:
    """Is a conversation that ends without the end token another one to the RM? It must be, or it reads elsewhere."""
    own, token = exam.scorer.tokenizer, exam.scorer.policy.end_token
    if token is None:
        return Result("skip", "there is no end token to leave out")
    end = own.convert_tokens_to_ids(token)
    cut = [row[: len(row) - 1 - row[::-1].index(end)] for row in exam.rows]
    moved = [abs(exam.scorer.batch_logits([row])[0] - logit) for row, logit in zip(cut, exam.alone, strict=True)]
    details = {"moved": moved}
    if max(moved) <= UNSEEN * max(map(abs, exam.alone)):
        finding = f"without {token} no logit moves: the RM does not read the last attended token"
        return Result("fail", finding, max(moved), UNSEEN, NATIVE, details)
    spread = statistics.pstdev(exam.alone) or math.nan
    finding = (
        f"without {token} logits move by {statistics.mean(moved):.3g} on average: the scorer adds it where it lacks"
    )
    return Result("pass", finding, statistics.mean(moved) / spread, None, "", details)


def spread(exam: Exam) -> Result:
    deviation = statistics.pstdev(exam.alone)
    finding = f"logits differ between conversations (std {deviation:.3g})"
    if deviation > MIN_SPREAD:
        return Result("pass", finding, deviation, MIN_SPREAD)
    way_out = "the head answers the same to everything: train it again"
    return Result("fail", finding, deviation, MIN_SPREAD, way_out)


def bfloat16(exam: Exam) -> Result:
    """The same folder in bfloat16, as GPUs compute it: how far its logits lie from float32's, and do ranks stay?"""
    if exam.dtype != "float32":
        return Result("skip", f"examined in {exam.dtype}; float32 is what bfloat16 is measured against")
    other = exam.reload("bfloat16")
    logits = [other.batch_logits([row])[0] for row in exam.rows]
    padded = other.batch_logits(exam.rows, side="right" if exam.is_encoder else "left")
    worst, deviation = exam.worst(logits), statistics.pstdev(exam.alone) or math.nan
    mean = statistics.mean(abs(a - b) for a, b in zip(logits, exam.alone, strict=True))
    details = {"padding": exam.worst(padded, logits), "mean": mean, "mean_by_std": mean / deviation}
    finding = (
        f"bfloat16 differs from float32 by {mean:.2g} on average ({mean / deviation:.0%} of the std), at most "
        f"{worst:.2g} of the largest; padding moves it by {details['padding']:.2g}"
    )
    if not mean <= 0.5 * deviation:
        way_out = "reward_model.model.dtype=float32, or replies are ranked by rounding"
        return Result("warn", finding, worst, None, way_out, details)
    return Result("pass", finding, worst, None, "", details)
