"""Does it answer at all, how long will the examination take, and how much is a slow RM asked?"""

from __future__ import annotations

from time import perf_counter

from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.labelled import fewer
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.doctor.tricks import TRICKS

FEWEST_PAIRS, FEWEST_TRICKED, FEWEST_CONVERSATIONS = 20, 4, 3
_FAST_PASSES = 16
"""How often the fast part, bfloat16 included, goes through BATTERY."""
_SHARE_OF_TRICKS = 0.4


def answers(exam: Exam) -> Result:
    """One logit for one conversation, and the time that it took; a slow RM is asked less, so that `seconds` are kept.

    At least 3 conversations, 20 pairs and 4 tricked replies of each label stay: below, no figure says anything. `tell`
    hears the estimate before anything else is computed.
    """
    row = max(exam.rows[:FEWEST_CONVERSATIONS], key=len)
    exam.scorer.batch_logits([row])  # the first forward allocates
    times: list[float] = []
    while len(times) < 5 and sum(times) < 1.0:
        begun = perf_counter()
        exam.scorer.batch_logits([row])
        times.append(perf_counter() - begun)
    speed = len(row) / min(times)
    seconds = _FAST_PASSES * sum(map(len, exam.rows)) / speed
    if seconds > exam.seconds / 2:
        exam.rows = exam.rows[:FEWEST_CONVERSATIONS]
        seconds = _FAST_PASSES * sum(map(len, exam.rows)) / speed
    finding = f"one logit for one conversation; {speed:,.0f} tokens/s alone"
    details: dict[str, float | str] = {"tokens_per_second": speed}
    if exam.data is not None:
        more, asked = _subset(exam, speed, max(exam.seconds - seconds, exam.seconds / 2))
        seconds += more
        details["asked"] = asked
        finding += f"; {asked}"
    details["estimated_seconds"] = seconds
    if exam.data is not None or seconds > 10:
        exam.tell(f"about {seconds:,.0f} s: {finding}")
    return Result("pass", finding, seconds, None, "", details)


def _subset(exam: Exam, speed: float, seconds: float) -> tuple[float, str]:
    """Cuts the data and the tricked replies to what `seconds` allow; the seconds they take, and what is asked."""
    data = exam.data
    assert data is not None
    lengths = [len(row.input_ids) for row in exam.scorer.rendered(data.conversations)]
    mean, times = sum(lengths) / len(lengths), 2 * len(TRICKS)
    allowed = seconds * speed / mean
    if len(lengths) + times * exam.trick_replies > allowed:
        wanted = int(allowed * _SHARE_OF_TRICKS / times)
        exam.trick_replies = min(exam.trick_replies, max(FEWEST_TRICKED, wanted))
        share = (allowed - times * exam.trick_replies) / len(lengths)
        if share < 1:
            data = exam.data = fewer(data, max(FEWEST_PAIRS, int(len(data.pairs) * share)))
    texts = len(data.conversations)
    subset = f"{texts} of {len(lengths)}" if texts < len(lengths) else f"{texts}"
    asked = f"{subset} labelled texts of {mean:.0f} tokens ({data.source}), {exam.trick_replies} of each label tricked"
    return (texts + times * exam.trick_replies) * mean / speed, asked
