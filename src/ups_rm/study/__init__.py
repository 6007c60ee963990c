"""A study: one recipe trained in several ways, each with several seeds, and one table and one picture of them all.

`plan.py` reads the file, `run.py` does what is not done yet, `results.py` compares what the runs left, `picture.py`
draws it. Each training is an `ups-rm run` in a folder of its own; what they share (prompts, reward model) is made once.
"""

from ups_rm.study.plan import Cell, Study, read_study
from ups_rm.study.results import ArmResult, arm_results
from ups_rm.study.run import run_study

__all__ = ["ArmResult", "Cell", "Study", "arm_results", "read_study", "run_study"]
