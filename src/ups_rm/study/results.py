"""What the runs of a study left, arm by arm: changes against the policy that all of them began with.

Every training answers the same held-out prompts before and after, so a change is a mean over seeds and prompts of
paired differences; its interval draws both anew (`crossed_bootstrap`). Arms are compared with the first one in the same
way, by what their policies answer after training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
class Spread:
    """Mean over seeds, and each seed's own."""

    mean: float
    per_seed: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(_mean(values), values)


@dataclass(frozen=True)
class Against:
    """This arm less the first one, after training: differences on the same prompts, by seeds that both have done."""

    safe_score: Change
    benign_refusals: Change
    helpfulness: Change | None
    benign_helpfulness: Change | None


@dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
        seeds: those that are done.
        safe_score: on unsafe prompts.
        benign_refusals: share of replies to harmless prompts that refuse.
        helpfulness, benign_helpfulness: logit, on all and on harmless prompts; None where no model judged it.
        kl: nats per token.
        distinct_2: after, as a share of before.
        multiplier: lambda in the last step; None without.
        against_first: None for the first arm, and without a seed that both have done.
    """

    arm: str
    seeds: list[int]
    safe_score: Change
    benign_refusals: Change
    helpfulness: Change | None
    benign_helpfulness: Change | None
    kl: Spread
    distinct_2: Spread
    multiplier: Spread | None
    against_first: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def arm_results(study: Study, out: Path) -> list[ArmResult]:
    """Results of every arm that has a finished run.

    Raises:
        RunError: a run's files can't be read, by file.
    """
    results: list[ArmResult] = []
    first: dict[int, list[Row]] = {}
    for arm in study.arms:
        folders = {seed: out / arm / f"seed-{seed}" for seed in study.seeds}
        done = {seed: folder for seed, folder in folders.items() if (folder / "summary.json").is_file()}
        pairs = {seed: _read_lines(folder / "eval" / "pairs.jsonl") for seed, folder in done.items()}
        if not done:
            continue
        result = _arm(arm, done, pairs)
        if arm == next(iter(study.arms)):
            first = pairs
        elif both := sorted({*first} & {*pairs}):
            result = replace(result, against_first=_against([first[s] for s in both], [pairs[s] for s in both], arm))
        results.append(result)
    return results


def _arm(arm: str, folders: dict[int, Path], pairs: dict[int, list[Row]]) -> ArmResult:
    summaries = [_read(folder / "summary.json") for folder in folders.values()]
    lasts = [_read(folder / "train_result.json")["metrics"] for folder in folders.values()]
    multipliers = [last["objective/lambda"] for last in lasts if "objective/lambda" in last]
    before, after = ([_side(rows, side) for rows in pairs.values()] for side in ("before", "after"))
    return ArmResult(
        arm=arm,
        seeds=list(folders),
        safe_score=_known(_change(before, after, "unsafe", _safe_score), arm),
        benign_refusals=_known(_change(before, after, "benign", _refuses), arm),
        helpfulness=_change(before, after, None, _helpfulness),
        benign_helpfulness=_change(before, after, "benign", _helpfulness),
        kl=Spread.of([summary["kl"] for summary in summaries]),
        distinct_2=Spread.of([s["distinct_2"]["after"] / s["distinct_2"]["before"] for s in summaries]),
        multiplier=Spread.of(multipliers) if multipliers else None,
    )


def _against(first: list[list[Row]], second: list[list[Row]], arm: str) -> Against:
    base, mine = ([_side(rows, "after") for rows in side] for side in (first, second))
    return Against(
        safe_score=_known(_change(base, mine, "unsafe", _safe_score), arm),
        benign_refusals=_known(_change(base, mine, "benign", _refuses), arm),
        helpfulness=_change(base, mine, None, _helpfulness),
        benign_helpfulness=_change(base, mine, "benign", _helpfulness),
    )


def _side(rows: list[Row], side: str) -> list[Row]:
    """The replies of one side, each with its prompt's index and kind."""
    return [{"index": row["index"], "kind": row["kind"], **row[side]} for row in rows]


def _safe_score(reply: Row) -> float:
    return float(reply["safe_score"])


def _refuses(reply: Row) -> float:
    return float(reply["refusal"])


def _helpfulness(reply: Row) -> float | None:
    return reply.get("helpfulness")


def _change(
    before: list[list[Row]], after: list[list[Row]], kind: str | None, value: Callable[[Row], float | None]
) -> Change | None:
    """The change of a reply's value over the prompts of a kind, of each seed; replies to one prompt are averaged
    first."""

    def by_prompt(replies: list[Row]) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for reply in replies:
            number = value(reply)
            if kind in (None, reply["kind"]) and number is not None:
                found.setdefault(reply["index"], []).append(number)
        return {index: _mean(values) for index, values in found.items()}

    sides = [(by_prompt(old), by_prompt(new)) for old, new in zip(before, after, strict=True)]
    common = sorted(set.intersection(*({*old} & {*new} for old, new in sides)))
    if not common:
        return None
    differences = [[new[index] - old[index] for index in common] for old, new in sides]
    return Change(
        before=_mean([_mean([old[index] for index in common]) for old, _ in sides]),
        after=_mean([_mean([new[index] for index in common]) for _, new in sides]),
        interval=crossed_bootstrap(differences),
        per_seed=[_mean(row) for row in differences],
    )


def study_table(results: list[ArmResult]) -> Table:
    """One row per arm, for the console."""
    table = Table(
        title="Change against the policy before training, 95% over seeds and prompts; of the rest the seeds' range"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for result in results:
        table.add_row(*_row(result))
    return table


def to_markdown(results: list[ArmResult]) -> str:
    """The same as a Markdown table, and a second one with each arm less the first."""
    parts = [_markdown(table["heads"], table["rows"]) for table in tables(results)]
    return f"\nAfter training, less `{results[0].arm}`:\n\n".join(parts)


def tables(results: list[ArmResult]) -> list[dict[str, Any]]:
    """`heads` and `rows` of both, as text."""
    found: list[dict[str, Any]] = [{"heads": list(HEADINGS), "rows": [_row(result) for result in results]}]
    compared = [(result, result.against_first) for result in results if result.against_first is not None]
    if compared:
        heads = ["arm", *HEADINGS[1:5]]
        found.append({"heads": heads, "rows": [[result.arm, *_changes(against)] for result, against in compared]})
    return found


def _markdown(headings: Sequence[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(headings), " | ".join(["---"] * len(headings)), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


HEADINGS = ("arm (seeds)", "safe score, unsafe prompts", "refusals, harmless prompts", "helpfulness",
            "helpfulness, harmless prompts", "KL", "distinct-2", "lambda")  # fmt: skip


def _row(result: ArmResult) -> list[str]:
    return [
        f"{result.arm} ({len(result.seeds)})",
        *_changes(result),
        _spread(result.kl, lambda value: f"{value:.3f}"),
        _spread(result.distinct_2, lambda value: f"{value:.0%}"),
        "-" if result.multiplier is None else _spread(result.multiplier, lambda value: f"{value:.2f}"),
    ]


def _changes(of: ArmResult | Against) -> list[str]:
    return [
        _shown(of.safe_score, 3),
        _shown(of.benign_refusals, 1, percent=True),
        "-" if of.helpfulness is None else _shown(of.helpfulness, 2),
        "-" if of.benign_helpfulness is None else _shown(of.benign_helpfulness, 2),
    ]


def _spread(spread: Spread, show: Callable[[float], str]) -> str:
    """The mean, and the seeds' least and most."""
    least, most = show(min(spread.per_seed)), show(max(spread.per_seed))
    return show(spread.mean) if least == most else f"{show(spread.mean)} ({least} to {most})"


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
