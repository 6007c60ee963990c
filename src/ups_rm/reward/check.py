"""The doctor under its earlier name."""

from ups_rm.reward.doctor import BATTERY, Check, CheckReport, check_rm

__all__ = ["BATTERY", "Check", "CheckReport", "check_rm"]
