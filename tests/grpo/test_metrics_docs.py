"""docs/metrics.md names every metric that the code can log, and none that it can't.

What the code can log is found twice: by reading the source for names in our namespaces (so that a metric that is added
anywhere is noticed), and by calling the functions that make metrics.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

from grpo_batches import make_batch
from ups_rm.evaluation import text_metrics
from ups_rm.grpo import rollout_metrics, throughput_metrics, timing_metrics

REPO = Path(__file__).resolve().parents[2]
NAMESPACES = (
    "actor", "alarm", "critic", "group", "judge", "kl", "numbers", "objective", "perf", "prompt_length", "response",
    "response_length",
    "response_length_non_aborted", "reward", "rollout", "score", "text", "timing_per_token_ms", "timing_s", "training",
    "val-aux", "val-core",
)  # fmt: skip
NAME = re.compile(rf"(?:{'|'.join(NAMESPACES)})(?:/[\w{{}}@.-]+)+")
PACKAGE_PARTS = ("grpo/*.py", "local/*.py", "evaluation/*.py", "monitor/*.py", "tracking/*.py", "objective.py")


def documented() -> set[str]:
    """Names in backquotes that look like metrics; `{kind}`, `{n}` and the like become {}."""
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([^`\s]+)`", text))
    return {blank(name) for name in names if NAME.fullmatch(blank(name))}


def blank(name: str) -> str:
    return re.sub(r"\{\w*\}", "{}", name)


def in_the_source() -> set[str]:
    """Every string of the package that is a metric's name; the expressions in f-strings become {}."""
    names = set()
    for part in PACKAGE_PARTS:
        for file in sorted((REPO / "src" / "ups_rm").glob(part)):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            f_strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
            pieces = {id(piece) for f_string in f_strings for piece in f_string.values}
            names |= {"".join(map(_text, f_string.values)) for f_string in f_strings}
            names |= {_text(node) for node in nodes if isinstance(node, ast.Constant) and id(node) not in pieces}
    return {name for name in names if NAME.fullmatch(name)}


def _text(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def emitted() -> set[str]:
    """What the functions of grpo/ and evaluation/ return when given everything they take."""
    batch = make_batch([3, 0, 2, 1], [0, 0, 1, 1], 3)
    flags = torch.tensor([True, False, True, False])
    metrics = rollout_metrics(
        token_level_scores=batch.token_level_scores,
        token_level_rewards=batch.token_level_rewards,
        advantages=batch.advantages,
        response_mask=batch.mask,
        prompt_lengths=batch.prompt_lengths,
        group_ids=batch.group_ids,
        kl=batch.logprobs,
        truncated=flags,
        rm_truncated=flags,
        benign=flags,
        logits=torch.arange(4.0),
    )
    metrics |= timing_metrics({"gen": 1.0}, num_prompt_tokens=1, num_response_tokens=1)
    metrics |= throughput_metrics(total_num_tokens=1, seconds=1.0)
    metrics |= text_metrics(["a b", "c d"], ["unsafe", "benign"], ["a", "c"])
    return set(metrics)


def matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\{\}", r"[^/]+?"), name) is not None


def test_every_metric_that_can_be_logged_is_documented() -> None:
    docs = documented()
    prefixes = {name.rsplit("/", 1)[0] for name in docs}  # "critic/score" stands in the source without its /mean
    missing = {name for name in in_the_source() if not any(matches(name, known) for known in docs)} - prefixes
    missing |= {name for name in emitted() if not any(matches(name, known) for known in docs)}
    assert not missing, f"add to docs/metrics.md: {sorted(missing)}"


def test_every_documented_metric_can_be_logged() -> None:
    known = in_the_source() | emitted()
    invented = {name for name in documented() if not any(matches(other, name) for other in known)}
    assert not invented, f"docs/metrics.md lists what nothing logs: {sorted(invented)}"


def test_the_search_would_notice_a_new_metric() -> None:
    """Guards the two tests above against looking in the wrong place."""
    assert {"actor/loss", "kl/mean", "critic/score", "timing_s/{}", "score/saturated_share"} <= in_the_source()
    assert {"actor/loss", "critic/score/mean", "val-core/PKU-SafeRLHF/reward/mean@{}"} <= documented()
    assert len(documented()) > 60
