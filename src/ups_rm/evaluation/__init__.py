"""Before against after: is the policy safer, and did it stay useful? Safe score, refusals, length, variety, KL."""

from ups_rm.evaluation.bootstrap import Interval, paired_bootstrap
from ups_rm.evaluation.compare import Comparison, LogprobSums, compare
from ups_rm.evaluation.figures import Reply, Verdict
from ups_rm.evaluation.prompt_sets import load_prompts
from ups_rm.evaluation.refusal import is_refusal, refusal_label, refusal_pattern
from ups_rm.evaluation.text import distinct_n, text_metrics, word_count

__all__ = [
    "Comparison",
    "Interval",
    "LogprobSums",
    "Reply",
    "Verdict",
    "compare",
    "distinct_n",
    "is_refusal",
    "load_prompts",
    "paired_bootstrap",
    "refusal_label",
    "refusal_pattern",
    "text_metrics",
    "word_count",
]
