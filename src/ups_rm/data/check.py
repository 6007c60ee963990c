"""Is this parquet what verl and UPS-RM expect? Every problem with its row number, all of them counted.

`check_parquet` reads one or more prompt files row by row and never stops at the first fault. Faults ("error") are what
would break training or silently change it; the rest ("warning") is what one should know, such as a prompt that stands
in two of the files given.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ups_rm.data.prompts import Kind, kind_of, prompt_problem
from ups_rm.data.rows import text_hash
from ups_rm.data.sources import open_parquet, parquet_rows
from ups_rm.durable import file_sha256

Level = Literal["error", "warning"]
COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
SHOWN_PER_KIND = 5
REPORT = "report.json"


@dataclass(frozen=True)
class Problem:
    """One fault. `row` counts from 0, as dataframes do; None where it is about the whole file."""

    level: Level
    file: str
    row: int | None
    what: str

    def __str__(self) -> str:
        where = f"{self.file}: row {self.row}" if self.row is not None else self.file
        return f"{self.level}: {where}: {self.what}"


@dataclass
class FileSummary:
    """What one file holds. `kinds` and `splits` count rows."""

    path: str
    rows: int = 0
    distinct_prompts: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    longest_prompt_chars: int = 0


@dataclass
class CheckResult:
    """`problems` holds the first SHOWN_PER_KIND of each kind; `counts` counts them all, by level."""

    files: list[FileSummary] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[Level] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return self.counts["error"] == 0


def check_parquet(files: Sequence[Path | str]) -> CheckResult:
    """Checks prompt parquet against verl's schema, row by row.

    Raises:
        DataError: a file is missing or is not parquet at all.
    """
    result = CheckResult()
    prompts: dict[str, npt.NDArray[np.uint64]] = {}
    for path in map(Path, files):
        checker = _FileChecker(path, result)
        checker.run()
        prompts[str(path)] = np.unique(np.array(checker.hashes, dtype=np.uint64))
        checker.summary.distinct_prompts = len(prompts[str(path)])
        result.files.append(checker.summary)
    names = list(prompts)
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            if shared := len(np.intersect1d(prompts[first], prompts[second], assume_unique=True)):
                what = f"{shared} of {len(prompts[second])} distinct prompts also stand in {first}"
                way_out = "; ups-rm data prepare --group-split keeps them apart"
                _add(result, Problem("warning", second, None, what + way_out))
    return result


def _add(result: CheckResult, problem: Problem, shown: bool = True) -> None:
    result.counts[problem.level] += 1
    if shown:
        result.problems.append(problem)


class _FileChecker:
    """The state of one pass over one file."""

    def __init__(self, path: Path, result: CheckResult) -> None:
        self.path, self.result = path, result
        self.summary = FileSummary(str(path))
        self.hashes = array("Q")
        self._kinds_seen: Counter[str] = Counter()
        self._indices = array("q")

    def run(self) -> None:
        with open_parquet(self.path) as file:
            present = [name for name in COLUMNS if name in file.schema_arrow.names]
            for name in COLUMNS:
                if name not in present:
                    level: Level = "error" if name in ("prompt", "data_source", "reward_model") else "warning"
                    self._report(level, None, f"has no column `{name}`")
            for value in parquet_rows(file, self.path, columns=present):
                self._row(self.summary.rows, value)
                self.summary.rows += 1
        if not self.summary.rows:
            self._report("error", None, "has no rows")
        if repeated := len(self._indices) - len(np.unique(np.array(self._indices, dtype=np.int64))):
            self._report("warning", None, f"`extra_info.index` is not unique: {repeated} rows repeat another's")
        self._compare_with_report()

    def _report(self, level: Level, row: int | None, what: str, kind: str | None = None) -> None:
        kind = kind or what
        self._kinds_seen[kind] += 1
        shown = self._kinds_seen[kind] <= SHOWN_PER_KIND
        _add(self.result, Problem(level, str(self.path), row, what), shown)

    def _row(self, number: int, value: dict[str, Any]) -> None:
        if "prompt" in value:
            if problem := prompt_problem(value["prompt"]):
                self._report("error", number, problem, "prompt")
            else:
                last = value["prompt"][-1]["content"]
                self.hashes.append(text_hash(*(turn["content"] for turn in value["prompt"])))
                self.summary.longest_prompt_chars = max(self.summary.longest_prompt_chars, len(last))
        if "data_source" in value and not isinstance(value["data_source"], str):
            self._report("error", number, "`data_source` is null, expected text", "data_source")
        if "reward_model" in value:
            self._reward_model(number, value["reward_model"])
        if "extra_info" in value:
            self._extra_info(number, value["extra_info"])

    def _reward_model(self, number: int, found: Any) -> None:
        if not isinstance(found, dict) or "ground_truth" not in found:
            self._report(
                "error", number, "`reward_model` has no `ground_truth` (null is fine; verl reads it)", "reward"
            )
        elif found.get("style") != "model":
            style = str(found.get("style"))[:60]
            self._report("warning", number, f"`reward_model.style` is {style!r}, expected 'model'", "style")

    def _extra_info(self, number: int, found: Any) -> None:
        if not isinstance(found, dict):
            self._report("warning", number, "`extra_info` is null", "extra_info")
            return
        index, split, source = found.get("index"), found.get("split"), found.get("prompt_source")
        if isinstance(index, int):
            self._indices.append(index)
        else:
            self._report("warning", number, "`extra_info.index` is missing", "index")
        self.summary.splits[str(split)] += 1
        self.summary.kinds[kind_of(source if isinstance(source, str) else None) or "unsafe"] += 1

    def _compare_with_report(self) -> None:
        """Says when the report.json beside the file, as `prepare` writes it, is about another file."""
        report = self.path.with_name(REPORT)
        try:
            written = json.loads(report.read_text("utf-8"))["written"][self.path.name]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # not made by `prepare`: nothing to compare with
        if written != file_sha256(self.path):
            self._report("warning", None, f"is not the file that {report.name} beside it describes; prepare again")
