"""The group log as the page carries it: as many steps and groups as fit, chosen without looking at what is in them.

Where not everything fits, steps are taken at equal distances, and within a step the groups whose prompt has the lowest
hash: the same prompts in every step, so that one can be followed through the training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ups_rm.errors import DataError
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.report.numbers import short
from ups_rm.tracking.group_log import GroupLogFile, GroupRecord, SampleRecord, read_group_log
from ups_rm.types import Message

FEWEST_STEPS = 24
"""Kept before groups are left out, if the run has as many."""


class Prompts:
    """Distinct prompts of a run, each once; groups and pairs name them by number."""

    def __init__(self) -> None:
        self._place: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []

    def number(self, messages: Sequence[Message], kind: str | None, categories: Sequence[str]) -> int:
        key = prompt_key(messages)
        if key not in self._place:
            self._place[key] = len(self.rows)
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
            self.rows.append({"messages": turns, "kind": kind, "categories": []})
        row = self.rows[self._place[key]]
        row["categories"] = row["categories"] or list(categories)
        return self._place[key]


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same one: the text of their turns."""
    return json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)


def read_groups(folder: Path, prompts: Prompts, *, max_bytes: int, problems: list[str]) -> dict[str, Any]:
    """The group log of a run in at most about `max_bytes` of its files.

    Args:
        folder: `trainer.group_log_dir`; it need not be there.
        prompts: takes the prompts.
        problems: takes a line for every file that can't be read.

    Returns:
        {"steps": [{"step", "kl_coef", "groups": [...]}], "steps_total", "groups_total": groups of the kept steps}.
    """
    files = sorted(folder.glob("step_*.jsonl")) if folder.is_dir() else []
    chosen, step_bytes = _choose(files, max_bytes)
    steps: list[dict[str, Any]] = []
    total = 0
    first_mean: dict[int, float] = {}
    for file in chosen:
        try:
            log, size = read_group_log(file), file.stat().st_size
        except (DataError, OSError) as error:
            problems.append(str(error))
            continue
        total += log.groups_total
        kept = _lowest_hashes(log.groups, step_bytes / max(1, size))
        groups = [_group(group, prompts, first_mean) for group in kept]
        steps.append({"step": log.step, "kl_coef": short(log.kl_coef), "groups": groups, "cut": _cut(log)})
    return {"steps": steps, "steps_total": len(files), "groups_total": total}


def _choose(files: list[Path], max_bytes: int) -> tuple[list[Path], float]:
    """Files at equal distances, the first and the last among them, and the bytes that each of them may give."""
    total = sum(file.stat().st_size for file in files)
    if total <= max_bytes or not files:
        return files, float("inf")
    count = max(min(len(files), FEWEST_STEPS), int(max_bytes / (total / len(files))))
    count = min(len(files), max(2, count))
    places = {round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)}
    return [files[place] for place in sorted(places)], max_bytes / len(places)


def _lowest_hashes(groups: list[GroupRecord], share: float) -> list[GroupRecord]:
    """The share of the groups, at least one, in their order."""
    count = max(1, int(len(groups) * min(1.0, share)))
    if count >= len(groups):
        return groups
    by_hash = sorted(range(len(groups)), key=lambda i: hashlib.sha256(prompt_key(groups[i].messages).encode()).digest())
    return [groups[i] for i in sorted(by_hash[:count])]


def _cut(log: GroupLogFile) -> bool:
    """Whether the file itself holds only some of the step's groups or replies."""
    return len(log.groups) < log.groups_total or any(len(group.samples) < group.n for group in log.groups)


def _group(group: GroupRecord, prompts: Prompts, first_mean: dict[int, float]) -> dict[str, Any]:
    number = prompts.number(group.messages, group.kind, group.categories)
    scores = [sample.safe_score for sample in group.samples]
    mean = sum(scores) / len(scores) if scores else 0.0
    spread = (sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) ** 0.5 if len(scores) > 1 else None
    gain = mean - first_mean[number] if number in first_mean else None
    first_mean.setdefault(number, mean)
    return {
        "prompt": number,
        "n": group.n,
        "mean": short(mean),
        "spread": short(spread),
        "gain": short(gain),
        "disagreement": short(disagreement(group.samples)),
        "samples": [_sample(sample) for sample in group.samples],
    }


def _sample(sample: SampleRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": sample.response,
        "logit": short(sample.logit, 4),
        "score": short(sample.safe_score, 4),
        "reward": short(sample.reward, 4),
        "advantage": short(sample.advantage, 4),
        "kl": short(sample.kl, 4),
        "length": sample.length,
    }
    if sample.truncated:
        row["cut"] = True
    if _refuses(sample.response):
        row["refusal"] = True
    if sample.token_kl:
        row["ends"] = [end - start for start, end in itertools.pairwise((0, *sample.token_ends))]
        row["token_kl"] = [round(value, 2) for value in sample.token_kl]
    if sample.model_logits:
        row["models"] = {name: short(logit, 4) for name, logit in sample.model_logits.items()}
    return row


@lru_cache(maxsize=100_000)
def _refuses(text: str) -> bool:
    """Half a millisecond each, and a live page asks again and again."""
    return is_refusal(text)


def disagreement(samples: Sequence[SampleRecord]) -> float | None:
    """How differently the reward models order a group's replies: 0 all alike, 1 always the other way round.

    Over all pairs of models and of replies: the share that one model orders one way and the other the other way; a tie
    in one of them counts half. None with fewer than two models or replies.
    """
    names = list(samples[0].model_logits) if samples else []
    if len(names) < 2 or len(samples) < 2:
        return None
    found: list[float] = []
    for one, other in itertools.combinations(names, 2):
        for a, b in itertools.combinations(samples, 2):
            signs = [
                (x > y) - (x < y) for x, y in ((a.model_logits[name], b.model_logits[name]) for name in (one, other))
            ]
            found.append(abs(signs[0] - signs[1]) / 2)
    return sum(found) / len(found)
