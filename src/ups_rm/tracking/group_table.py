"""Questions to the group log of a run: which groups, in which order, and the same as a table for pandas.

The files are read one by one, in the order of the steps, and only the groups that are asked for are kept.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ups_rm.durable import publishing
from ups_rm.errors import DataError, RunError
from ups_rm.tracking.group_log import GroupRecord, read_group_log

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class GroupRow:
    """One group and what it is sorted by.

    Attributes:
        mean, spread: mean and unbiased std of the safe scores of the logged replies; spread is nan for a single one.
        gain: mean minus that of the prompt's first logged group; 0 for that one.
        disagreement: share of pairs of replies that two reward models order the other way round, mean over the pairs
            of models; nan where fewer than two are logged (`model_logits`).
    """

    step: int
    group: GroupRecord
    mean: float
    spread: float
    gain: float
    disagreement: float

    @property
    def prompt(self) -> str:
        """The last message before the replies."""
        return self.group.messages[-1]["content"]


SORTS: dict[str, Callable[[GroupRow], float]] = {
    "spread": lambda row: row.spread,
    "gain": lambda row: row.gain,
    "disagreement": lambda row: row.disagreement,
    "score": lambda row: row.mean,
    "kl": lambda row: sum(sample.kl for sample in row.group.samples) / len(row.group.samples),
    "length": lambda row: sum(sample.length for sample in row.group.samples) / len(row.group.samples),
    "step": lambda row: -row.step,
}
"""What groups can be sorted by; the largest value stands first, so by step the earliest."""


MAPPINGS = ("model_logits", "components", "component_advantages")
"""Fields of a reply that are tables by name."""


@dataclass(frozen=True)
class Query:
    """Which groups. `steps`: first and last, both included. `search`: a text in the prompt or one of the replies,
    `category` one in the name of a harm category of the prompt, both upper or lower case. None or "": any."""

    steps: tuple[int, int] | None = None
    kind: str | None = None
    prompt_id: str | None = None
    search: str = ""
    category: str = ""

    def wants(self, row: GroupRow) -> bool:
        group, text, category = row.group, self.search.casefold(), self.category.casefold()
        return (
            (self.steps is None or self.steps[0] <= row.step <= self.steps[1])
            and self.kind in (None, group.kind)
            and self.prompt_id in (None, str(group.prompt_id))
            and (not category or any(category in name.casefold() for name in group.categories))
            and (
                not text
                or any(text in message["content"].casefold() for message in group.messages)
                or any(text in sample.response.casefold() for sample in group.samples)
            )
        )


def group_files(run: Path) -> list[Path]:
    """The group log's files of a run folder (or of a folder of such files), by step.

    Raises:
        RunError: there are none.
    """
    for folder in (Path(run), Path(run) / "groups", _named_folder(Path(run))):
        if files := sorted(folder.glob("step_*.jsonl")):
            return files
    raise RunError(
        f"{run} has no group log: neither step_*.jsonl nor groups/step_*.jsonl\n"
        "  fix: name a run folder (ups-rm runs lists them); a run with trainer.group_log_freq=0 has none"
    )


def step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def read_groups(run: Path, query: Query) -> Iterator[GroupRow]:
    """The groups that are asked for, by step. Earlier steps are read too: a gain is counted from the first of them."""
    first: dict[str, float] = {}
    for file in group_files(run):
        if query.steps is not None and step_of(file) > query.steps[1]:
            return
        for group in read_group_log(file).groups:
            if group.samples:
                row = _row(step_of(file), group, first)
                if query.wants(row):
                    yield row


def sorted_groups(
    run: Path, query: Query, *, by: str = "spread", reverse: bool = False, limit: int = 10
) -> list[GroupRow]:
    """The first `limit` groups (0: all) in the order of `SORTS`, or in the reverse; what can't be compared is left out.

    Raises:
        DataError: none can be compared so, or a file is broken. RunError: no group log.
    """
    key, sign = SORTS[by], -1 if reverse else 1
    found, unsortable = 0, 0

    def sortable() -> Iterator[GroupRow]:
        nonlocal found, unsortable
        for row in read_groups(run, query):
            found += 1
            if math.isnan(key(row)):
                unsortable += 1
            else:
                yield row

    if limit > 0:
        rows = heapq.nlargest(limit, sortable(), key=lambda row: sign * key(row))
    else:
        rows = sorted(sortable(), key=lambda row: -sign * key(row))
    if found and found == unsortable:
        needs = {"spread": "two replies in a group", "disagreement": "the logits of two reward models (model_logits)"}
        raise DataError(f"none of the {found} groups can be sorted by {by}: that needs {needs.get(by, 'numbers')}")
    return rows


def write_parquet(run: Path, query: Query, file: Path) -> int:
    """One row per reply of the groups that are asked for; returns their number. The file appears when it is whole.

    Raises:
        RunError: the file exists, or there is no group log.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.exists():
        raise RunError(f"{file} exists: nothing is overwritten\n  fix: another --parquet FILE")
    group_files(run)
    schema, replies = _schema(), 0
    batch: list[dict[str, object]] = []
    with publishing(file, manifest=False) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for row in read_groups(run, query):
            batch += _flat(row)
            if len(batch) >= 10_000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                replies, batch = replies + len(batch), []
        writer.write_table(pa.Table.from_pylist(batch, schema))
    return replies + len(batch)


def _schema() -> pa.Schema:
    import pyarrow as pa

    number, text, whole = pa.float64(), pa.string(), pa.int64()
    fields = {
        "step": whole, "prompt_id": text, "kind": text, "categories": pa.list_(text), "prompt": text,
        "messages": pa.list_(pa.struct([("role", text), ("content", text)])),
        "group_mean": number, "group_spread": number, "group_gain": number, "group_disagreement": number,
        "reply": whole, "response": text, "logit": number, "safe_score": number, "reward": number,
        "advantage": number, "kl": number, "length": whole, "truncated": pa.bool_(),
        "model_logits": pa.map_(text, number), "helpfulness": number,
        "components": pa.map_(text, number),
        "component_advantages": pa.map_(text, number), "charge": number,
    }  # fmt: skip
    return pa.schema(list(fields.items()))


def _flat(row: GroupRow) -> list[dict[str, object]]:
    of_group = {
        "step": row.step, "prompt_id": str(row.group.prompt_id), "kind": row.group.kind,
        "categories": row.group.categories, "prompt": row.prompt,
        "messages": row.group.messages, "group_mean": row.mean, "group_spread": row.spread, "group_gain": row.gain,
        "group_disagreement": row.disagreement,
    }  # fmt: skip
    return [
        of_group | vars(sample) | {"reply": i} | {name: list(getattr(sample, name).items()) for name in MAPPINGS}
        for i, sample in enumerate(row.group.samples)
    ]


def _row(step: int, group: GroupRecord, first: dict[str, float]) -> GroupRow:
    scores = [sample.safe_score for sample in group.samples]
    mean = math.fsum(scores) / len(scores)
    several = len(scores) > 1
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) if several else math.nan
    gain = mean - first.setdefault(str(group.prompt_id), mean)
    return GroupRow(step, group, mean, spread, gain, _disagreement(group))


def _disagreement(group: GroupRecord) -> float:
    models = list(group.samples[0].model_logits)
    opposed = [
        (a.model_logits[one] - b.model_logits[one]) * (a.model_logits[other] - b.model_logits[other]) < 0
        for one, other in combinations(models, 2)
        for a, b in combinations(group.samples, 2)
    ]
    return sum(opposed) / len(opposed) if opposed else math.nan


def _named_folder(run: Path) -> Path:
    """What the run's recipe calls `trainer.group_log_dir`; the run folder itself where it says nothing."""
    import yaml

    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        return Path(recipe["trainer"]["group_log_dir"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return run
