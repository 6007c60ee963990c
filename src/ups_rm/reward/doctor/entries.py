"""What is checked of each reward model of a recipe before it is trained against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ups_rm.recipe import RewardModel, RewardModelModel
from ups_rm.reward.doctor.check import check_rm
from ups_rm.reward.doctor.labelled import read_labelled
from ups_rm.reward.doctor.outside import BEFORE_TRAINING, FAST, SPREAD, check_outside, examine
from ups_rm.reward.doctor.report import CheckReport
from ups_rm.reward.helpfulness import HelpfulnessModel
from ups_rm.types import Conversation, Score

ROWS = 48
"""Of `reward_model.reference_data`, for models that are asked from outside."""
SECONDS = 20.0
"""What their rows may take, about."""


def check_entries(settings: RewardModel, device: str) -> Iterator[tuple[str, RewardModelModel, CheckReport]]:
    """(name, entry, report) of each reward model of the recipe.

    Folders with one logit get the fast part of `check_rm`. Services, functions and judges of pairs, of which nothing
    else can be seen, are asked a few labelled rows too. There a `reward` of the wrong direction is a warning: it may
    be about something else than safety. How flat a score would be is asked where the recipe's transform is the sigmoid
    of the model's own number.

    Raises:
        RMError: what an entry names can't be told. DataError: `reference_data` can't be read.
    """
    from ups_rm.reward.open import EXAMINED, entry_names, kind_of, normalization, template_of

    entries = settings.entries()
    for name, entry in zip(entry_names(entries), entries, strict=True):
        kind = kind_of(entry)
        if kind in EXAMINED:
            report = check_rm(
                entry.path,
                device=device,
                dtype=entry.dtype,
                kind=kind,
                output=entry.output,
                trust_remote_code=entry.trust_remote_code,
                chat_template=template_of(entry),
            )
            yield name, entry, report
            continue
        bent = settings.transform == "sigmoid" and normalization(entry, len(entries)) == "none"
        report = check_outside(
            replace(entry, kind=kind),
            entry.url or entry.callable or entry.path,
            read_labelled(settings.reference_data, max_rows=ROWS),
            device=device,
            max_batch_tokens=settings.max_batch_tokens,
            seconds=SECONDS,
            only=[step for step in BEFORE_TRAINING if bent or step not in ("saturation", "groups")],
        )
        yield name, entry, _lenient(report) if entry.output == "reward" else report


def check_helpfulness(settings: RewardModel, device: str) -> CheckReport | None:
    """Of the second model, `reward_model.helpfulness`, only that it answers, and not always the same: there are no
    labels of helpfulness here. None if there is none.

    Raises:
        RMError: it can't be opened.
    """
    from ups_rm.reward.open import open_helpfulness

    if not settings.helpfulness.named:
        return None
    model = open_helpfulness(settings.helpfulness, device, settings.max_batch_tokens)
    rows = read_labelled(settings.reference_data, max_rows=ROWS)
    name = f"reward_model.helpfulness {model.name}"
    return examine(_AsScorer(model), name, (*FAST, SPREAD), rows, kind="helpfulness", seconds=SECONDS)


@dataclass(frozen=True)
class _AsScorer:
    """A helpfulness model's numbers as scores."""

    model: HelpfulnessModel

    def score(self, conversations: list[Conversation]) -> list[Score]:
        numbers = self.model.numbers(conversations)
        return [Score(logit=number, safe_score=math.nan, tokens=0, truncated=False) for number in numbers]


def _lenient(report: CheckReport) -> CheckReport:
    """The report with a failed direction as a warning."""
    checks = [
        replace(check, verdict="warn") if (check.name, check.verdict) == ("direction", "fail") else check
        for check in report.checks
    ]
    return replace(report, checks=tuple(checks))
