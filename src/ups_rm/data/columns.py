"""Blocks of rows as columns, checked column by column: the fast way from a block of a source to what is kept of it.

Nearly all blocks are plain: JSON that orjson takes, every field of its type. `block_columns` checks those by column;
any block with so much as one odd line goes through `parse_row`, line by line, which decides and gives the reasons. So
the fast way may only turn a block down, never let one through that the strict way would not, with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import itemgetter
from types import NoneType
from typing import Any

from ups_rm.data.rows import BadRow, Reject, Row, default_subset, parse_row
from ups_rm.data.schema import MAX_SEVERITY, Split
from ups_rm.data.sources import MAX_ROW_BYTES, Block, Part, strict_records

Pair = tuple[Sequence[Any], Sequence[Any]]
OF_RESPONSES = ("response_{}", "is_response_{}_safe", "response_{}_severity_level", "response_{}_harm_category")
FIELDS = (
    *("prompt", "prompt_source", "safer_response_id", "better_response_id"),
    *(name.format(i) for name in (*OF_RESPONSES, "response_{}_source", "response_{}_sha256") for i in (0, 1)),
)
ALL_FIELDS = itemgetter(*FIELDS)


@dataclass(frozen=True)
class Columns:
    """Rows of one split, one list per field of `Row`; pairs hold (of response_0, of response_1)."""

    split: Split
    prompt: Sequence[str]
    response: tuple[Sequence[str], Sequence[str]]
    safe: Pair
    safer: Sequence[int | None]
    better: Sequence[int | None]
    severity: Pair
    categories: Pair
    sha256: Pair
    prompt_source: Sequence[str | None]
    subset: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompt)


def block_columns(block: Block, part: Part) -> tuple[Columns, list[Reject], int]:
    """The rows of a block, those that are left out (numbered from its first line), and how many lines it has."""
    lines = block.lines()
    if lines and (found := _plain_columns(lines, part)) is not None:
        return found, [], len(lines)
    rows, rejects = list[Row](), list[Reject]()
    for record in chain(block.records, strict_records(lines)):
        try:
            rows.append(parse_row(record, part))
        except BadRow as error:
            rejects.append(Reject(part.name, record.line, str(error), record.excerpt))
    return row_columns(rows, part.split), rejects, len(lines)


def row_columns(rows: Sequence[Row], split: Split) -> Columns:
    """Rows of one split as columns."""
    return Columns(
        split=split,
        prompt=[row.prompt for row in rows],
        response=([row.response_0 for row in rows], [row.response_1 for row in rows]),
        safe=([row.is_response_0_safe for row in rows], [row.is_response_1_safe for row in rows]),
        safer=[row.safer_response_id for row in rows],
        better=[row.better_response_id for row in rows],
        severity=([row.severity[0] for row in rows], [row.severity[1] for row in rows]),
        categories=([row.categories[0] for row in rows], [row.categories[1] for row in rows]),
        sha256=([row.sha256[0] for row in rows], [row.sha256[1] for row in rows]),
        prompt_source=[row.prompt_source for row in rows],
        subset=[row.subset for row in rows],
    )


class _NotPlain(Exception):
    """Something in the block needs the strict way; never leaves this module."""


def _plain_columns(lines: list[bytes], part: Part) -> Columns | None:
    """The rows of some lines if all are plain rows of the full or the older schema; None if one is not."""
    import orjson

    if max(map(len, lines)) > MAX_ROW_BYTES:
        return None
    try:
        values = list(map(orjson.loads, [line for line in lines if line != b"\n"]))
    except orjson.JSONDecodeError:
        return None
    if not {*map(type, values)} <= {dict} or any("safe_response" in value for value in values):
        return None

    try:
        fields = dict(zip(FIELDS, zip(*map(ALL_FIELDS, values), strict=True), strict=True)) if values else {}
    except KeyError:  # the older schema, or a field left out
        fields = {name: tuple(value.get(name) for value in values) for name in FIELDS}

    def column(name: str, *kinds: type) -> Sequence[Any]:
        found = fields.get(name, ())
        if not {*map(type, found)} <= {*kinds}:
            raise _NotPlain
        return found

    def pair(name: str, *kinds: type) -> Pair:
        return column(name.format(0), *kinds), column(name.format(1), *kinds)

    def small(found: Sequence[Any], most: int) -> Sequence[Any]:
        if not {*found} <= {None, *range(most + 1)}:
            raise _NotPlain
        return found

    try:
        prompt = column("prompt", str)
        if not all(map(str.strip, prompt)):
            raise _NotPlain
        sources = pair("response_{}_source", str, NoneType)
        severity = pair("response_{}_severity_level", int, NoneType)
        harms = pair("response_{}_harm_category", dict, NoneType)
        return Columns(
            split=part.split,
            prompt=prompt,
            response=pair("response_{}", str),
            safe=pair("is_response_{}_safe", bool, NoneType),
            safer=small(column("safer_response_id", int, NoneType), 1),
            better=small(column("better_response_id", int, NoneType), 1),
            severity=(small(severity[0], MAX_SEVERITY), small(severity[1], MAX_SEVERITY)),
            categories=(_flagged(harms[0]), _flagged(harms[1])),
            sha256=pair("response_{}_sha256", str, NoneType),
            prompt_source=column("prompt_source", str, NoneType),
            subset=[part.subset or source or default_subset(part) for source in sources[0]],
        )
    except _NotPlain:
        return None


def _flagged(harms: Sequence[dict[str, Any] | None]) -> list[tuple[str, ...] | None]:
    """The names of the harms that are flagged, per response."""
    flags = chain.from_iterable(map(dict.values, filter(None, harms)))
    if not {*map(type, flags)} <= {bool, NoneType}:
        raise _NotPlain
    return [
        None if found is None else tuple(compress(found, found.values())) if True in found.values() else ()
        for found in harms
    ]
