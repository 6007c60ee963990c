"""What the runs of a study left, arm by arm: changes against the policy that all of them began with.

Every training answers the same held-out prompts before and after, so a change is a mean over seeds and prompts of
paired differences; its interval draws both anew (`crossed_bootstrap`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ups_rm.durable import check_file
from ups_rm.errors import RunError
from ups_rm.evaluation.bootstrap import Interval, crossed_bootstrap
from ups_rm.study.plan import Study

Row = dict[str, Any]
FIX = "remove its run folder, the study makes it anew"


@dataclass(frozen=True)
class Change:
    """Mean before and after, and the difference with its 95% interval; `per_seed` are the seeds' own differences."""

    before: float
    after: float
    interval: Interval
    per_seed: list[float]


@dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
        seeds: those that are done.
        safe_score: on unsafe prompts.
        benign_refusals: share of replies to harmless prompts that refuse.
        helpfulness, benign_helpfulness: logit, on all and on harmless prompts; None where no model judged it.
        kl: nats per token, mean over seeds.
        distinct_2: after, as a share of before; mean over seeds.
        multiplier: lambda in the last step, mean over seeds; None without.
    """

    arm: str
    seeds: list[int]
    safe_score: Change
    benign_refusals: Change
    helpfulness: Change | None
    benign_helpfulness: Change | None
    kl: float
    distinct_2: float
    multiplier: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def arm_results(study: Study, out: Path) -> list[ArmResult]:
    """Results of every arm that has a finished run.

    Raises:
        RunError: a run's files can't be read, by file.
    """
    results = []
    for arm in study.arms:
        folders = {seed: out / arm / f"seed-{seed}" for seed in study.seeds}
        done = {seed: folder for seed, folder in folders.items() if (folder / "summary.json").is_file()}
        if done:
            results.append(_arm(arm, done))
    return results


def _arm(arm: str, folders: dict[int, Path]) -> ArmResult:
    pairs = [_read_lines(folder / "eval" / "pairs.jsonl") for folder in folders.values()]
    summaries = [_read(folder / "summary.json") for folder in folders.values()]
    lasts = [_read(folder / "train_result.json")["metrics"] for folder in folders.values()]
    multipliers = [last["objective/lambda"] for last in lasts if "objective/lambda" in last]
    return ArmResult(
        arm=arm,
        seeds=list(folders),
        safe_score=_known(_change(pairs, "unsafe", lambda reply: reply["safe_score"]), arm),
        benign_refusals=_known(_change(pairs, "benign", lambda reply: float(reply["refusal"])), arm),
        helpfulness=_change(pairs, None, lambda reply: reply.get("helpfulness")),
        benign_helpfulness=_change(pairs, "benign", lambda reply: reply.get("helpfulness")),
        kl=sum(summary["kl"] for summary in summaries) / len(summaries),
        distinct_2=sum(s["distinct_2"]["after"] / s["distinct_2"]["before"] for s in summaries) / len(summaries),
        multiplier=sum(multipliers) / len(multipliers) if multipliers else None,
    )


def _change(pairs: list[list[Row]], kind: str | None, value: Callable[[Row], float | None]) -> Change | None:
    """The change of a reply's value over the prompts of a kind; replies to one prompt are averaged first."""
    sides: dict[str, list[list[float]]] = {"before": [], "after": []}
    for rows in pairs:
        for side, of_seeds in sides.items():
            by_prompt: dict[int, list[float]] = {}
            for row in rows:
                found = value(row[side])
                if kind in (None, row["kind"]) and found is not None:
                    by_prompt.setdefault(row["index"], []).append(found)
            of_seeds.append([sum(values) / len(values) for _, values in sorted(by_prompt.items())])
    if not sides["before"][0]:
        return None
    differences = [
        [a - b for b, a in zip(before, after, strict=True)]
        for before, after in zip(sides["before"], sides["after"], strict=True)
    ]
    return Change(
        before=_mean([_mean(row) for row in sides["before"]]),
        after=_mean([_mean(row) for row in sides["after"]]),
        interval=crossed_bootstrap(differences),
        per_seed=[_mean(row) for row in differences],
    )


def study_table(results: list[ArmResult]) -> Table:
    """One row per arm, for the console."""
    table = Table(title="Change against the policy before training, 95% over seeds and prompts")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for result in results:
        table.add_row(*_row(result))
    return table


def to_markdown(results: list[ArmResult]) -> str:
    """The same as a Markdown table."""
    lines = [" | ".join(HEADINGS), " | ".join(["---"] * len(HEADINGS))]
    lines += [" | ".join(_row(result)) for result in results]
    return "".join(f"| {line} |\n" for line in lines)


HEADINGS = ("arm (seeds)", "safe score, unsafe prompts", "refusals, harmless prompts", "helpfulness",
            "helpfulness, harmless prompts", "KL", "distinct-2", "lambda")  # fmt: skip


def _row(result: ArmResult) -> list[str]:
    return [
        f"{result.arm} ({len(result.seeds)})",
        _shown(result.safe_score, 3),
        _shown(result.benign_refusals, 1, percent=True),
        "-" if result.helpfulness is None else _shown(result.helpfulness, 2),
        "-" if result.benign_helpfulness is None else _shown(result.benign_helpfulness, 2),
        f"{result.kl:.3f}",
        f"{result.distinct_2:.0%}",
        "-" if result.multiplier is None else f"{result.multiplier:.2f}",
    ]


def _shown(change: Change, digits: int, *, percent: bool = False) -> str:
    scale, unit = (100, " points") if percent else (1, "")
    low, high = scale * change.interval.low, scale * change.interval.high
    return f"{scale * change.interval.diff:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _known(change: Change | None, arm: str) -> Change:
    if change is None:
        raise RunError(f"arm {arm}: the comparison has no prompts of one kind\n  fix: held-out prompts of both kinds")
    return change


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _read(file: Path) -> Row:
    check_file(file, RunError, FIX)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} can't be read: {error}\n  fix: {FIX}") from error
    assert isinstance(content, dict)
    return content


def _read_lines(file: Path) -> list[Row]:
    check_file(file, RunError, FIX)
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{file} can't be read: {error}\n  fix: {FIX}") from error
