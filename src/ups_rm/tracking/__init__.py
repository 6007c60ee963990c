"""Where the numbers of a run go: trackers for metrics, the group log for what was actually said."""

from ups_rm.tracking.group_log import GroupLog, GroupLogFile, GroupRecord, SampleRecord, group_records, read_group_log
from ups_rm.tracking.jsonl import MetricsFile, read_metrics
from ups_rm.tracking.trackers import Trackers

__all__ = [
    "GroupLog",
    "GroupLogFile",
    "GroupRecord",
    "MetricsFile",
    "SampleRecord",
    "Trackers",
    "group_records",
    "read_group_log",
    "read_metrics",
]
