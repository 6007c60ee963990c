"""The doctor: may this reward model be trained against? Named checks, each with a verdict, a number and a way out.

`check_rm(folder)` is the fast part, made before every training: the folder loads exactly, reads the right token and
renders as its card says. `check_rm(folder, full=True)` goes on with labelled data: direction, scale, calibration,
truncation, cheap tricks, speed. "fail": do not train. "warn": it may be right, look. "skip": it could not be told,
because of what failed before it; so one fault is one finding. Every check is explained in docs/doctor.md.
"""

from ups_rm.reward.doctor.battery import BATTERY
from ups_rm.reward.doctor.check import check_rm
from ups_rm.reward.doctor.report import Check, CheckReport, Result, Verdict

__all__ = ["BATTERY", "Check", "CheckReport", "Result", "Verdict", "check_rm"]
