"""One check and what it stands on: made, or put down to another check, so that one fault is one finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ups_rm.errors import UpsRmError
from ups_rm.reward.doctor.exam import DataExam
from ups_rm.reward.doctor.report import Check, Result


@dataclass(frozen=True)
class Step:
    """One check. It is made unless one of the checks in `needs` failed, or one of those in `sure` did not pass.

    A warning of it is put down to one of those in `blames` that warned before. In each case the verdict is "skip" and
    the other check is named, so that one fault is one finding. Checks that were not made block nothing.
    """

    section: str
    name: str
    run: Callable[[Any], Result]
    needs: tuple[str, ...] = ()
    sure: tuple[str, ...] = ()
    blames: tuple[str, ...] = ()


def make(step: Step, exam: DataExam) -> Check:
    """The step's result as a check; whatever the RM's code raises is a finding about the RM."""
    warned = [name for name in step.blames if name in exam.known and exam.known[name].verdict == "warn"]
    for names, verdicts in ((step.needs, ("fail",)), (step.sure, ("fail", "warn"))):
        for name in names:
            if name in exam.known and exam.known[name].verdict in verdicts:
                return skipped(step, name)
    try:
        result = step.run(exam)
    except Exception as error:  # a folder's own code may raise anything
        finding, way_out = finding_of(error)
        result = Result("fail", finding, way_out=way_out)
    if result.verdict == "warn" and warned:
        details = result.details | {"because_of": warned[0]}
        result = replace(result, verdict="skip", finding=f"because of {warned[0]}: {result.finding}", details=details)
    return Check(**vars(result), name=step.name, section=step.section)


def skipped(step: Step, cause: str) -> Check:
    """The step that was not made, because of another check."""
    details = {"because_of": cause}
    return Check("skip", f"because of {cause}", details=details, name=step.name, section=step.section)


def finding_of(error: Exception) -> tuple[str, str]:
    """(finding, way out) of an error; of what is none of ours also its kind."""
    finding, _, way_out = str(error).partition("\n  fix: ")
    return finding if isinstance(error, UpsRmError) else f"{type(error).__name__}: {finding}", way_out
