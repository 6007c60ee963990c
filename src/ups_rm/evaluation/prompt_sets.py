"""Prompts to evaluate on: the packaged ones, public sets by local file or Hub id, files of one's own.

A public set is one entry of `SETS`: its columns, licence and where it comes from. Every prompt is of one group:
`unsafe` (a good policy does not help), `alarming` (sounds dangerous, is harmless: a good policy answers) or `benign`
(everyday). Out come `PromptRow`s whose `extra_info` names set, group and harm categories. Nothing is downloaded for a
set that is given as a file.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ups_rm.data.prompts import PromptRow, distinct_prompts, kind_of, read_prompts
from ups_rm.data.rows import read_rows
from ups_rm.data.sources import EXCERPT_CHARS, Part, Record, iter_records
from ups_rm.errors import DataError
from ups_rm.types import Message

Group = Literal["unsafe", "alarming", "benign"]
GROUPS: tuple[Group, ...] = ("unsafe", "alarming", "benign")
PACKAGED = "packaged"

Row = Mapping[str, Any]


def _group_field(row: Row) -> Group | None:
    return next((group for group in GROUPS if row.get("group") == group), None)


def _xstest_group(row: Row) -> Group | None:
    """By `label`; the first editions have none, there the types of the unsafe prompts begin with "contrast"."""
    label = row.get("label")
    if label is None and isinstance(row.get("type"), str):
        return "unsafe" if row["type"].startswith("contrast") else "alarming"
    return {"safe": "alarming", "unsafe": "unsafe"}.get(str(label))  # type: ignore[return-value]


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts and how its rows are read.

    `prompt` and `category` name columns, the first that a row has is taken: mirrors rename them. `group` is one for
    all rows, or a function of the row that gives None where it can't tell; `group_from` names the columns it reads.
    `context` names a column that is put in front of the prompt.
    """

    name: str
    source: str
    licence: str
    hub: str = ""
    prompt: tuple[str, ...] = ("prompt",)
    category: tuple[str, ...] = ("category",)
    group: Group | Callable[[Row], Group | None] = "unsafe"
    group_from: str = ""
    context: str = ""


SETS: dict[str, PromptSet] = {
    entry.name: entry
    for entry in (
        PromptSet(PACKAGED, "UPS-RM, data/eval_prompts", "Apache-2.0", group=_group_field, group_from="group"),
        PromptSet("sample", "UPS-RM, the packaged rows, test split", "Apache-2.0"),
        PromptSet("saferlhf", "PKU-SafeRLHF", "CC BY-NC 4.0", "PKU-Alignment/PKU-SafeRLHF"),
        PromptSet(
            "xstest",
            "XSTest, github.com/paul-rottger/xstest, xstest_prompts.csv",
            "CC BY 4.0",
            "walledai/XSTest",
            category=("type",),
            group=_xstest_group,
            group_from="label or type",
        ),
        PromptSet(
            "simplesafetytests",
            "SimpleSafetyTests, github.com/bertiev/SimpleSafetyTests",
            "CC BY 4.0",
            "Bertievidgen/SimpleSafetyTests",
            category=("harm_area", "category"),
        ),
        PromptSet(
            "harmbench",
            "HarmBench, github.com/centerforaisafety/HarmBench, harmbench_behaviors_text_all.csv",
            "MIT",
            "walledai/HarmBench",
            prompt=("Behavior", "prompt"),
            category=("SemanticCategory", "category"),
            context="ContextString",
        ),
        PromptSet(
            "advbench",
            "AdvBench, github.com/llm-attacks/llm-attacks, harmful_behaviors.csv",
            "MIT",
            "walledai/AdvBench",
            prompt=("goal", "prompt"),
        ),
        PromptSet(
            "strongreject",
            "StrongREJECT, github.com/alexandrasouly/strongreject, strongreject_dataset.csv",
            "MIT",
            "walledai/StrongREJECT",
            prompt=("forbidden_prompt", "prompt"),
        ),
        PromptSet(
            "beavertails",
            "BeaverTails-Evaluation, PKU-Alignment",
            "CC BY-NC 4.0",
            "PKU-Alignment/BeaverTails-Evaluation",
        ),
        PromptSet(
            "alpacaeval",
            "AlpacaEval, github.com/tatsu-lab/alpaca_eval, alpaca_eval.json",
            "CC BY-NC 4.0",
            "tatsu-lab/alpaca_eval",
            prompt=("instruction", "prompt"),
            category=("dataset",),
            group="benign",
        ),
        *(PromptSet(group, "your file", "yours", group=group) for group in GROUPS),
    )
}
"""By the name that `--prompts` takes. Licences as their owners state them; look there before you publish results."""

_OWN_FILE = PromptSet("file", "your file", "yours", group=_group_field, group_from="group")


def load_prompts(specs: Sequence[str], *, limit: int | None = None) -> tuple[list[PromptRow], list[dict[str, Any]]]:
    """The distinct prompts of several sets, numbered from 0, and what is to be known of each set.

    Args:
        specs: each a name of `SETS` (packaged, or from the Hub), NAME=PLACE for a file or `hub:OWNER/NAME` in that
            set's columns, or a file: prompt parquet in verl's schema, or .csv, .json, .jsonl, .jsonl.gz, .parquet
            with the fields `prompt`, `group` and perhaps `category`.
        limit: prompts per set and group at most, spread evenly over the set; None: all.

    Returns:
        rows, and per set {set, place, source, licence, prompts: {group: count}}.

    Raises:
        DataError: an unknown set, a file that can't be read, or a row (by line) without what is needed.
    """
    rows: list[PromptRow] = []
    described = []
    for spec in specs:
        entry, place = _entry_of(spec)
        of_set = distinct_prompts(_read(entry, place))
        chosen = [row for group in GROUPS for row in _spread([r for r in of_set if group_of(r) == group], limit)]
        if not chosen:
            raise DataError(f"{place}: has no prompts")
        rows += chosen
        counts = Counter(map(group_of, chosen))
        described.append(
            {
                "set": entry.name,
                "place": place,
                "source": entry.source,
                "licence": entry.licence,
                "prompts": {group: counts[group] for group in GROUPS},
            }
        )
    return [replace(row, index=i) for i, row in enumerate(distinct_prompts(rows))], described


def group_of(row: PromptRow) -> Group:
    """The prompt's group; of prompts that name none, their kind."""
    return row.extra_info.get("group") or row.kind


def _entry_of(spec: str) -> tuple[PromptSet, str]:
    """(entry, place) of what was asked for."""
    name, _, place = spec.partition("=")
    if name in SETS and (place or "=" not in spec):
        entry = SETS[name]
        if place:
            return entry, place
        if name == PACKAGED:
            return entry, str(files("ups_rm") / "data" / "eval_prompts" / "prompts.jsonl")
        if name == "sample":
            return entry, "sample"
        if not entry.hub:
            raise DataError(f"--prompts {name} needs a file\n  fix: --prompts {name}=FILE")
        return entry, f"hub:{entry.hub}"
    if Path(spec).is_file():
        return _OWN_FILE, spec
    near = difflib.get_close_matches(name.lower(), SETS, n=1)
    raise DataError(
        f"--prompts {spec}: no such file, and no set of this name{f'; did you mean {near[0]}?' if near else ''}\n"
        f"  fix: one of {', '.join(SETS)}, NAME=FILE for a copy of such a set on disk, or a file of your own"
    )


def _read(entry: PromptSet, place: str) -> list[PromptRow]:
    if entry.name in ("sample", "saferlhf"):
        return _preference_rows(entry, place)
    if entry is _OWN_FILE and place.endswith(".parquet") and _is_verl(Path(place)):
        return read_prompts(place)
    return [_prompt(entry, place, record) for record in _records(place)]


def _preference_rows(entry: PromptSet, place: str) -> list[PromptRow]:
    """The prompts of preference rows in any form, the test split where there is one; categories are those flagged for
    either reply to the prompt."""
    split = "test" if place.startswith("hub:") or not Path(place).is_file() else None
    found: dict[str, tuple[Group, dict[str, None]]] = {}
    for row in read_rows(place, split=split):  # type: ignore[arg-type]
        kind: Group = kind_of(row.prompt_source) or "unsafe"
        _, categories = found.setdefault(row.prompt, (kind, {}))
        categories |= {name: None for names in row.categories for name in names or ()}
    return [_row(entry, text, group, tuple(categories)) for text, (group, categories) in found.items()]


def _prompt(entry: PromptSet, place: str, record: Record) -> PromptRow:
    where = f"{place}:{record.line}"
    if record.problem:
        raise DataError(f"{where}: {record.problem}")
    row = record.value
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, expected an object with the field {entry.prompt[0]}")
    column = next((name for name in entry.prompt if name in row), None)
    if column is None:
        raise DataError(
            f"{where}: has no field {' or '.join(entry.prompt)}, only {', '.join(map(str, row))}\n"
            f"  fix: rename the column of the prompts, or name the set that the file is of: NAME={place}"
        )
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        said = "empty" if text is None or isinstance(text, str) else type(text).__name__
        raise DataError(f"{where}: field {column} is {said}, expected the prompt's text")
    if entry.context and row.get(entry.context):
        text = f"{row[entry.context]}\n\n---\n\n{text}"
    group = entry.group if isinstance(entry.group, str) else entry.group(row)
    if group is None:
        raise DataError(
            f"{where}: can't tell whether the prompt is {', '.join(GROUPS)} from the field {entry.group_from} "
            f"(the row has {', '.join(map(str, row))})\n"
            f"  fix: add the field, or say it for the whole file: --prompts unsafe={place}; "
            f"a copy of a known set is NAME={place}"
        )
    categories = [str(row[name]) for name in entry.category if row.get(name)][:1]
    return _row(entry, text, group, tuple(categories))


def _row(entry: PromptSet, text: str, group: Group, categories: tuple[str, ...]) -> PromptRow:
    return PromptRow(
        index=-1,
        messages=[Message(role="user", content=text)],
        kind="unsafe" if group == "unsafe" else "benign",
        extra_info={"set": entry.name, "group": group, "categories": list(categories)},
    )


def _records(place: str) -> Iterator[Record]:
    """The rows of a file by its ending, or of a Hub data set."""
    path = Path(place)
    if place.startswith("hub:"):
        from ups_rm.data.hub import hub_parts

        for part in hub_parts(place.removeprefix("hub:")):
            yield from iter_records(part)
    elif not path.is_file():
        raise DataError(f"{place}: no such file\n  fix: the path, or hub:OWNER/NAME for a data set on the Hub")
    elif path.suffix == ".csv":
        yield from _csv_records(path)
    elif path.suffix == ".json":
        yield from _json_records(path)
    elif place.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        yield from iter_records(Part(subset="", split="test", path=path))
    else:
        raise DataError(f"{place}: don't know this kind of file; expected .csv, .json, .jsonl, .jsonl.gz or .parquet")


def _csv_records(path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header; a row's line is the one on which it begins."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            line = 2
            for row in reader:
                if None in row or None in row.values():
                    count = len(reader.fieldnames or ())
                    yield Record(line, problem=f"has not the {count} fields of the header", excerpt=str(row)[:80])
                else:
                    yield Record(line, value=row)
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: can't be read as CSV in UTF-8: {error}") from error


def _json_records(path: Path) -> Iterator[Record]:
    """Rows of a JSON file that is one list, numbered from 1."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read as JSON: {str(error)[:EXCERPT_CHARS]}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: is {type(rows).__name__}, expected a list of objects; one object per line is .jsonl")
    for number, row in enumerate(rows, 1):
        yield Record(number, value=row)


def _is_verl(path: Path) -> bool:
    """Whether `prompt` is a list of messages, as in our own prompt parquet, and not a text."""
    import pyarrow as pa

    from ups_rm.data.sources import open_parquet

    with open_parquet(path) as file:
        schema = file.schema_arrow
        return "prompt" in schema.names and not pa.types.is_string(schema.field("prompt").type)


def _spread(rows: list[PromptRow], limit: int | None) -> list[PromptRow]:
    """At most `limit` rows at equal distances, so that every part of a sorted set is there."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[k * len(rows) // limit] for k in range(limit)]
