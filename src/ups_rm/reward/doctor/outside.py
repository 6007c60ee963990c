"""Reward models that are asked from outside: a service, a function, a judge of pairs.

Weights, tokens and template can't be seen; what can be is whether the model answers, whether its answer hangs on
anything but the conversation, and what it says of labelled replies. Those checks are the ones for folders. A judge of
pairs scores a reply among the other replies to its prompt, so it is asked in groups, and a tricked reply meets the
labelled reply of the other kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from ups_rm.errors import UpsRmError
from ups_rm.reward.doctor import direction, outside_checks, scale, tricks
from ups_rm.reward.doctor.battery import BATTERY
from ups_rm.reward.doctor.exam import DataExam
from ups_rm.reward.doctor.report import Check, CheckReport
from ups_rm.reward.doctor.steps import Step, finding_of, make, skipped
from ups_rm.reward.transforms import unsafety_logit
from ups_rm.types import Conversation, Message

if TYPE_CHECKING:
    import torch

    from ups_rm.recipe import RewardModelModel
    from ups_rm.reward.doctor.labelled import Labelled
    from ups_rm.reward.pairwise import PairwiseScorer
    from ups_rm.types import Score, Scorer

# each conversation of BATTERY twice, the second one's reply with more: a judge of pairs needs something to compare
ASKED: tuple[Conversation, ...] = tuple(
    [*talk[:-1], Message(role="assistant", content=f"{talk[-1]['content']}{more}")]
    for talk in BATTERY
    for more in ("", " I hope that this helps you.")
)

ANSWERS = "answers"
_ANSWERED = ("answers", "finite")
_ALIKE = (*_ANSWERED, "repeat", "order", "batch", "place", "spread")
_TOLD = ("direction", "saturation")
FAST: tuple[Step, ...] = (
    Step(ANSWERS, "answers", outside_checks.answers),
    Step(ANSWERS, "finite", outside_checks.finite, ("answers",)),
    Step(ANSWERS, "repeat", outside_checks.repeat, _ANSWERED),
    Step(ANSWERS, "order", outside_checks.order, (*_ANSWERED, "repeat")),
    Step(ANSWERS, "batch", outside_checks.batch, (*_ANSWERED, "repeat", "order")),
)
PLACE = Step(ANSWERS, "place", outside_checks.place, _ANSWERED)
SPREAD = Step(ANSWERS, "spread", outside_checks.spread, (*_ANSWERED, "place"))
FULL: tuple[Step, ...] = (
    Step("truncation", "truncation", outside_checks.truncation, _ALIKE),
    Step("direction", "direction", direction.direction, _ALIKE),
    Step("scale", "saturation", scale.saturation, _ALIKE),
    Step("scale", "groups", scale.groups, _ALIKE, ("saturation",)),
    Step("scale", "calibration", scale.calibration, (*_ALIKE, *_TOLD), (), _TOLD),
    *(Step("cheap tricks", name, tricks.trick(name), _ALIKE, _TOLD) for name in tricks.TRICKS),
    Step("speed", "speed", outside_checks.speed, _ANSWERED),
)
BEFORE_TRAINING = ("truncation", "direction", "saturation", "groups")
"""Of FULL, what is asked before every training: what ruins one and is told from few rows."""


@dataclass(kw_only=True)
class OutsideExam(DataExam):
    """A model that scores conversations by itself."""

    data_seconds: float = math.nan

    smallest: ClassVar[int] = 1
    """How many conversations can be asked by themselves."""

    @property
    def conversations(self) -> list[Conversation]:
        """What every model is asked, harmless."""
        return list(ASKED)

    @cached_property
    def scores(self) -> list[Score]:
        """Its scores of them in one call."""
        return self.scorer.score(self.conversations)

    @cached_property
    def again(self) -> list[Score]:
        """The same call once more."""
        return self.scorer.score(self.conversations)

    @property
    def numbers(self) -> list[float]:
        return [score.logit for score in self.scores]

    @cached_property
    def data_scores(self) -> list[Score]:
        """As for folders, and timed."""
        assert self.data is not None
        begun = perf_counter()
        found = self.scorer.score(self.data.conversations)
        self.data_seconds = perf_counter() - begun
        return found

    def judged(self, data: Labelled, tricked: int) -> int:
        """How many judgements the data and so many tricked replies of each label cost."""
        return len(data.conversations) + 2 * len(tricks.TRICKS) * tricked

    def moves(self, before: Sequence[Conversation], after: Sequence[Conversation]) -> list[float]:
        """How far the model's number moves from each conversation to a changed one."""
        asked = self.scorer.score([*before, *after])
        logits = [score.logit for score in asked]
        return [b - a for a, b in zip(logits[: len(before)], logits[len(before) :], strict=True)]


@dataclass(kw_only=True)
class JudgeExam(OutsideExam):
    """A judge of pairs. `data` holds only replies that are in a pair of a safe and an unsafe one."""

    scorer: PairwiseScorer
    rival: ClassVar[str] = "the safe reply to the same prompt"
    smallest: ClassVar[int] = 2

    @property
    def bar(self) -> float:
        return 0.0

    def unsafety(self, numbers: torch.Tensor) -> torch.Tensor:
        """A preference has a zero whatever is preferred: only the sign is turned."""
        return numbers * unsafety_logit(1.0, self.output)

    def before(self, places: Sequence[int]) -> list[float]:
        assert self.data is not None
        return self.asked(places, [self.data.conversations[i] for i in places])

    def asked(self, places: Sequence[int], conversations: list[Conversation]) -> list[float]:
        """Each against the labelled reply of the other kind to the prompt of `places`."""
        others = [self._partners[i] for i in places]
        moved = self.moves(others, conversations)
        return [unsafety_logit(preference, self.output) for preference in moved]

    def judged(self, data: Labelled, tricked: int) -> int:
        groups = Counter(data.prompt_id.tolist()).values()
        return sum(n * (n - 1) for n in groups) + 4 * (len(tricks.TRICKS) + 1) * tricked

    def moves(self, before: Sequence[Conversation], after: Sequence[Conversation]) -> list[float]:
        """Its preference for the changed conversation."""
        return [(a - b) / 2 for a, b in self.both_orders(after, before)]

    def both_orders(self, first: Sequence[Conversation], second: Sequence[Conversation]) -> list[tuple[float, float]]:
        """s(a, b) and s(b, a) of replies to the prompt of `second`; (0, 0) for equal texts."""
        from ups_rm.reward.pairwise import Pair

        texts = [(a[-1]["content"], b[-1]["content"], b[:-1]) for a, b in zip(first, second, strict=True)]
        differ = [(a, b, prompt) for a, b, prompt in texts if a != b]
        pairs = [Pair(prompt, *two) for a, b, prompt in differ for two in ((a, b), (b, a))]
        judged = iter(self.scorer.judge.judge(pairs) if pairs else [])
        return [(0.0, 0.0) if a == b else (next(judged).logit, next(judged).logit) for a, b, _ in texts]

    @cached_property
    def _partners(self) -> dict[int, Conversation]:
        """A reply of the other kind for each reply of the data."""
        assert self.data is not None
        found: dict[int, Conversation] = {}
        for safer, less_safe in self.data.pairs.tolist():
            found.setdefault(safer, self.data.conversations[less_safe])
            found.setdefault(less_safe, self.data.conversations[safer])
        return found


def entry_of(target: Path | str, kind: str = "auto", **more: Any) -> RewardModelModel:
    """What `rm check` was given as an entry of a recipe.

    Raises:
        RMError: a kind that is unknown, or one that does not fit what is given.
    """
    from ups_rm.errors import RMError
    from ups_rm.recipe import RewardModelModel
    from ups_rm.recipe_checks import CALLABLE

    given = str(target)
    is_url = given.startswith(("http:", "https:"))
    is_function = not is_url and not Path(given).exists() and CALLABLE.fullmatch(given) is not None
    kinds = (
        {"http"} if is_url else {"function", "pairwise"} if is_function else {"myrm", "sequence", "token", "pairwise"}
    )
    if kind not in ("auto", *kinds):
        raise RMError(f"kind is {kind!r}: {given} can be {', '.join(sorted(kinds))}")
    if is_url:
        return RewardModelModel(url=given, kind="http", **more)
    if is_function:
        return RewardModelModel(callable=given, kind="pairwise" if kind == "pairwise" else "function", **more)
    return RewardModelModel(path=given, kind=kind, **more)


def check_outside(
    entry: RewardModelModel,
    name: str,
    data: Labelled | None,
    *,
    device: str = "cpu",
    max_batch_tokens: int = 8192,
    template: str | None = None,
    seconds: float = 60.0,
    plot: Path | None = None,
    tell: Callable[[str], None] = lambda _text: None,
    only: Sequence[str] | None = None,
) -> CheckReport:
    """Examine a service, a function or a judge of pairs.

    Args:
        name: how the report calls it.
        data: labelled conversations; None: only what is asked without.
        template: of a judge the text of a pair, if not the entry's file.
        only: of the checks on data, those that are made. All if None.
        Others: as in `check_rm`.
    """
    fast = (*FAST, *([PLACE] if entry.kind == "pairwise" else []), SPREAD)
    steps = [*fast, *(step for step in FULL if data is not None and (only is None or step.name in only))]
    try:
        scorer = _open(entry, device, max_batch_tokens, template)
    except UpsRmError as error:
        finding, way_out = finding_of(error)
        load = Check("fail", finding, way_out=way_out, name="load", section=ANSWERS)
        return CheckReport(name, "", (load, *(skipped(step, "load") for step in steps)))
    how = {"kind": entry.kind, "output": entry.output, "seconds": seconds, "plot": plot, "tell": tell}
    return examine(scorer, name, steps, data, **how)  # type: ignore[arg-type]


def examine(
    scorer: Scorer, name: str, steps: Sequence[Step], data: Labelled | None, *, kind: str, **how: Any
) -> CheckReport:
    """The report of a model that could be opened. `how`: fields of `OutsideExam`."""
    from ups_rm.reward.doctor.labelled import compared

    if data is not None and kind == "pairwise":
        data = compared(data)
    of: type[OutsideExam] = JudgeExam if kind == "pairwise" else OutsideExam
    exam = of(scorer=scorer, kind=kind, data=data, **how)
    opened = {"http": "the service answers", "function": "it can be called", "pairwise": "the judge is there"}
    exam.known["load"] = Check("pass", opened.get(kind, "it is loaded"), name="load", section=ANSWERS)
    for step in steps:
        exam.known[step.name] = make(step, exam)
    answered = exam.known["answers"].verdict == "pass"
    return CheckReport(name, "", tuple(exam.known.values()), tuple(exam.numbers) if answered else ())


def _open(entry: RewardModelModel, device: str, max_batch_tokens: int, template: str | None) -> Scorer:
    """The entry's scorer. A service is asked once first, so that a dead one is told soon; a judge is asked without
    its reference replies, which are of other prompts than ours.

    Raises:
        UpsRmError: it can't be opened, or does not answer.
    """
    from ups_rm.reward.open import ask_service, open_entry

    if entry.kind == "http":
        ask_service(entry)
    return open_entry(replace(entry, reference_replies=""), device, max_batch_tokens, template=template)
