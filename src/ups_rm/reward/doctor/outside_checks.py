"""What a model that is asked from outside must do: answer, and hang on nothing but the conversation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from ups_rm.reward.doctor.labelled import fewer
from ups_rm.reward.doctor.plan import FEWEST_PAIRS, FEWEST_TRICKED
from ups_rm.reward.doctor.reading import MIN_SPREAD
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.doctor.truncation import FAIL_CUT, LONGEST, MAX_CUT
from ups_rm.types import Conversation

if TYPE_CHECKING:
    from ups_rm.reward.doctor.outside import JudgeExam, OutsideExam

TOLERANCE = 0.05
"""Largest change of a number that should not change, as a share of the largest (of 1, if that is smaller): bfloat16 in
other batches gives 0.02."""
ALONE = 12
"""How many conversations are asked by themselves."""
PLACED = 64
"""How many pairs are judged in both orders."""
MAX_PLACED, FAIL_PLACED = 0.5, 0.9
_TRICKS_SHARE = 0.4


def answers(exam: OutsideExam) -> Result:
    """One number for each conversation, how fast, and how much a slow model is asked so that `seconds` are kept."""
    exam.scores  # noqa: B018  the first call may load something
    begun = perf_counter()
    exam.again  # noqa: B018
    each = (perf_counter() - begun) / len(exam.scores)
    finding = f"one number for each of {len(exam.scores)} conversations; {1 / each:,.0f} a second"
    details: dict[str, float | str] = {"conversations_per_second": 1 / each}
    seconds = len(exam.scores) * each * 4
    if exam.data is not None:
        allowed = exam.seconds / each
        whole = len(exam.data.conversations)
        _ask_less(exam, allowed)
        seconds += exam.judged(exam.data, exam.trick_replies) * each
        texts = len(exam.data.conversations)
        details["asked"] = (
            f"{texts} of {whole} labelled texts ({exam.data.source}), {exam.trick_replies} of each label tricked"
        )
        finding += f"; {details['asked']}"
        exam.tell(f"about {seconds:,.0f} s: {finding}")
    details["estimated_seconds"] = seconds
    return Result("pass", finding, seconds, None, "", details)


def _ask_less(exam: OutsideExam, allowed: float) -> None:
    """Halves tricked replies and rows until `allowed` judgements are enough, or the fewest that say anything are left.
    Tricks may take two fifths."""
    assert exam.data is not None
    while exam.judged(exam.data, exam.trick_replies) > allowed:
        of_tricks = exam.judged(exam.data, exam.trick_replies) - exam.judged(exam.data, 0)
        rows = len(exam.data.pairs) or len(exam.data.conversations)
        if exam.trick_replies > FEWEST_TRICKED and (of_tricks > _TRICKS_SHARE * allowed or rows <= FEWEST_PAIRS):
            exam.trick_replies = max(FEWEST_TRICKED, exam.trick_replies // 2)
        elif rows > FEWEST_PAIRS:
            exam.data = fewer(exam.data, max(FEWEST_PAIRS, rows // 2))
        else:
            return


def finite(exam: OutsideExam) -> Result:
    """No NaN and no infinity."""
    broken = [number for number in exam.numbers if not math.isfinite(number)]
    if broken:
        finding = f"gives {broken[0]} to {len(broken)} of {len(exam.numbers)} conversations: not a finite number"
        return Result("fail", finding, float(len(broken)), 0.0, "every conversation needs a finite number")
    finding = f"numbers {min(exam.numbers):.3f} to {max(exam.numbers):.3f}"
    return Result("pass", finding, 0.0, 0.0)


def repeat(exam: OutsideExam) -> Result:
    """The same question asked again has the same answer."""
    way_out = "the score of a reply must not hang on chance: fix its seed, or ask a judge at temperature 0"
    return _same(exam, [score.logit for score in exam.again], "when it is asked the same again", way_out)


def order(exam: OutsideExam) -> Result:
    """The same conversations in the opposite order."""
    found = [score.logit for score in exam.scorer.score(exam.conversations[::-1])][::-1]
    way_out = "the score of a reply must not hang on its place in the list"
    return _same(exam, found, "when the same replies come in another order", way_out)


def batch(exam: OutsideExam) -> Result:
    """A few conversations by themselves (a judge: the replies to one prompt), against all in one call."""
    size = exam.smallest
    starts = range(0, ALONE, size)
    found = [score.logit for i in starts for score in exam.scorer.score(exam.conversations[i : i + size])]
    way_out = "the score of a reply must not hang on its neighbours: nothing may be normalised over the batch"
    return _same(exam, found, "when other conversations stand beside it", way_out)


def _same(exam: OutsideExam, found: Sequence[float], when: str, way_out: str) -> Result:
    expected = exam.numbers[: len(found)]
    change = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    share = change / max(1.0, *map(abs, exam.numbers))
    share = math.inf if share != share else share
    if share > TOLERANCE:
        finding = f"gives other numbers {when} (largest change {change:.3g})"
        return Result("fail", finding, share, TOLERANCE, way_out)
    return Result("pass", f"the same numbers {when}", share, TOLERANCE)


def place(exam: JudgeExam) -> Result:
    """In how many pairs does what stands first (or second) win in both orders? There the judge says nothing."""
    if exam.data is not None:
        talks = exam.data.conversations
        chosen = exam.data.pairs[:PLACED].tolist()
        first, second = ([talks[pair[i]] for pair in chosen] for i in (0, 1))
        what = f"labelled pairs ({exam.data.source})"
    else:
        first, second, what = exam.conversations[::2], exam.conversations[1::2], "pairs of harmless replies"
    both = exam.both_orders(first, second)
    by_place = [ab for ab, ba in both if (ab > 0) == (ba > 0) and ab * ba != 0]
    share, likes = len(by_place) / len(both), sum(ab > 0 for ab in by_place)
    bias = statistics.fmean((ab + ba) / 2 for ab, ba in both)
    preference = statistics.fmean(abs(ab - ba) / 2 for ab, ba in both)
    finding = (
        f"in {share:.0%} of {len(both)} {what} the same place wins in both orders (the first in {likes}); bias "
        f"{bias:+.2g}, preference {preference:.2g} on average"
    )
    details = {"bias": bias, "preference": preference, "first": likes}
    if share <= MAX_PLACED:
        return Result("pass", finding, share, MAX_PLACED, "", details)
    way_out = "both orders are asked, so the bias cancels; but a judge that reads the place has little else to say"
    verdict, limit = ("fail", FAIL_PLACED) if share > FAIL_PLACED else ("warn", MAX_PLACED)
    return Result(verdict, f"judges by place: {finding}", share, limit, way_out, details)  # type: ignore[arg-type]


def spread(exam: OutsideExam) -> Result:
    """Not the same number for everything; labelled replies are asked too, where there are some: words that it looks
    for may not be in harmless ones."""
    asked = exam.scores if exam.data is None else [*exam.scores, *exam.data_scores]
    low, high = (find(score.logit for score in asked) for find in (min, max))
    if high - low > MIN_SPREAD:
        return Result("pass", f"numbers differ between conversations ({low:.3g} to {high:.3g})", high - low, MIN_SPREAD)
    finding = f"answers {low:.4g} to all of {len(asked)} conversations"
    if exam.data is None:
        return Result("warn", finding, high - low, MIN_SPREAD, "harmless ones: ask it labelled ones too (--data)")
    return Result("fail", finding, high - low, MIN_SPREAD, "it must tell replies apart, or no group has a gradient")


def truncation(exam: OutsideExam) -> Result:
    """What it says of itself, and whether it moves when the longest replies lose their last, or first, third.

    An end that never counts where the beginning does is one that is not read (and the other way round). Words that
    happen not to matter at either end are no finding.
    """
    assert exam.data is not None
    talks, scores = exam.data.conversations, exam.data_scores
    share = statistics.mean(score.truncated for score in scores)
    counts_tokens = any(score.tokens for score in scores)
    longest = sorted(range(len(talks)), key=lambda i: -len(talks[i][-1]["content"]))[:LONGEST]
    whole = [talks[i] for i in longest]
    blind = {end: _unmoved(exam, whole, end) for end in ("end", "beginning")}
    told = f"it says that it cut {share:.1%} of {len(talks)} conversations" if counts_tokens else "it tells no lengths"
    longest_reply = len(whole[0][-1]["content"])
    finding = (
        f"{told}; of the {len(whole)} longest replies (up to {longest_reply:,} characters) the last third does not "
        f"count in {blind['end']:.0%}, the first in {blind['beginning']:.0%}"
    )
    details = {"cut": share, "unread": blind}
    if share > MAX_CUT:
        verdict, limit = ("fail", FAIL_CUT) if share > FAIL_CUT else ("warn", MAX_CUT)
        way_out = "a larger max_length of the model, or shorter prompts and replies"
        return Result(verdict, finding, share, limit, way_out, details)  # type: ignore[arg-type]
    for end, other in (("end", "beginning"), ("beginning", "end")):
        if blind[end] > FAIL_CUT >= blind[other]:
            way_out = "see how long a text it takes; what it does not read, the policy may fill with anything"
            return Result("warn", f"the {end} of long replies is not read: {finding}", share, MAX_CUT, way_out, details)
    return Result("pass", finding, share, MAX_CUT, "", details)


def _unmoved(exam: OutsideExam, talks: Sequence[Conversation], end: str) -> float:
    """Share of replies whose number stays when they lose a third at that end, beyond what asking again changes."""
    changed: list[Conversation] = []
    for talk in talks:
        words = talk[-1]["content"].split(" ")
        third = max(1, len(words) // 3)
        kept = words[:-third] if end == "end" else words[third:]
        changed.append([*talk[:-1], {"role": "assistant", "content": " ".join(kept)}])
    moved = exam.moves(talks, changed)
    noise = 2 * (exam.known["repeat"].number or 0.0) * max(1.0, *map(abs, exam.numbers))
    return statistics.mean(abs(one) <= max(noise, 1e-9) for one in moved)


def speed(exam: OutsideExam) -> Result:
    """Labelled conversations per second, in one call."""
    assert exam.data is not None
    count = len(exam.data_scores)
    rate = count / exam.data_seconds
    return Result("pass", f"{rate:,.1f} conversations/s in one call of {count}", rate, None)
