"""The page that people look at: a run's answer, curves, replies, reward model, data and recipe in one HTML file.

`read_run` reads a run folder into plain JSON values, `page.write_report` makes the file, `watch` serves the same page
while the run goes on. Nothing here computes what a run should have logged: what a run lacks, the page says it lacks.
"""

from ups_rm.report.page import write_report
from ups_rm.report.run import read_run

__all__ = ["read_run", "write_report"]
