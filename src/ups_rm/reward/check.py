"""The doctor under its earlier name."""

from ups_rm.reward.doctor import BATTERY, Check, CheckReport, check_rm
from ups_rm.reward.doctor.reading import MIN_SPREAD

__all__ = ["BATTERY", "MIN_SPREAD", "Check", "CheckReport", "check_rm"]
