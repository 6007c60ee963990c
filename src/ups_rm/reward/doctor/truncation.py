"""Truncation: how much of the data the RM would cut, which end is lost, and what that does to the logits."""

from __future__ import annotations

import statistics
from dataclasses import replace

from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.render import Rendered

MAX_CUT, FAIL_CUT = 0.01, 0.5
LONGEST = 8
_UNCUT = 10**9


def truncation(exam: Exam) -> Result:
    """Warns above 1% of the labelled conversations, fails above half.

    The effect is measured on the conversations that are cut, or, where none is, on the longest ones cut to three
    quarters on either side: logit of the cut rendering less that of the whole (as far as the backbone has positions).
    """
    assert exam.data is not None
    scorer, policy = exam.scorer, exam.scorer.policy
    whole = scorer.rendered(exam.data.conversations, replace(policy, max_length=_UNCUT))
    lengths = sorted(len(row.input_ids) for row in whole)
    share = statistics.mean(length > policy.max_length for length in lengths)
    positions = exam.config.get("max_position_embeddings") or policy.max_length
    longest = sorted(range(len(whole)), key=lambda i: -len(whole[i].input_ids))
    usable = [i for i in longest if len(whole[i].input_ids) <= positions][:LONGEST]
    moved = {side: _moved(exam, usable, whole, side) for side in ("left", "right")} if usable else {}
    middle, high = lengths[len(lengths) // 2], lengths[-1]
    details = {
        "max_length": policy.max_length,
        "side": policy.truncation_side,
        "lengths": {"median": middle, "p95": lengths[int(0.95 * (len(lengths) - 1))], "max": high},
        "moved": moved,
    }
    lost = {"left": "the oldest tokens", "right": "the end of the reply"}[policy.truncation_side]
    count, limit = len(lengths), policy.max_length
    finding = f"{share:.1%} of {count} conversations are over {limit} tokens (longest {high}); lost: {lost}"
    if moved:
        other = "right" if policy.truncation_side == "left" else "left"
        kind = "cut ones" if share > 0 else "longest ones cut to 3/4"
        finding += f"; the {kind} move by {moved[policy.truncation_side]:.2g} (cut {other}: {moved[other]:.2g})"
    if share <= MAX_CUT:
        return Result("pass", finding, share, MAX_CUT, "", details)
    verdict, most = ("fail", FAIL_CUT) if share > FAIL_CUT else ("warn", MAX_CUT)
    way_out = f"a larger max_length (the backbone has {positions} positions), or shorter prompts and replies"
    return Result(verdict, finding, share, most, way_out, details)  # type: ignore[arg-type]


def _moved(exam: Exam, places: list[int], whole: list[Rendered], side: str) -> float:
    """Mean absolute difference that cutting makes, on the conversations that are cut, else on `places`."""
    assert exam.data is not None
    policy = replace(exam.scorer.policy, truncation_side=side)  # type: ignore[arg-type]
    over = [i for i in places if len(whole[i].input_ids) > policy.max_length]
    full = [exam.scorer.batch_logits([whole[i].input_ids])[0] for i in over or places]
    cut = []
    for i in over or places:
        limit = policy.max_length if over else max(8, len(whole[i].input_ids) * 3 // 4)
        (row,) = exam.scorer.rendered([exam.data.conversations[i]], replace(policy, max_length=limit))
        cut.append(exam.scorer.batch_logits([row.input_ids])[0])
    return statistics.mean(abs(a - b) for a, b in zip(full, cut, strict=True))
