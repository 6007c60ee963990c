"""Preference rows: one checked `Row` per line of a source, streamed, with every bad line reported and left out.

Three forms are understood, per row: PKU-SafeRLHF's full schema of 16 fields, the older one of 7, and plain pairs
`{prompt, safe_response, unsafe_response}`. Only `prompt` and the two responses must be there; a label that is null or
absent stays None. Nothing is stripped or repaired: text comes out as it went in.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ups_rm.control_tokens import surrogate_at
from ups_rm.data.schema import MAX_SEVERITY, Split
from ups_rm.data.sources import OnBytes, Part, Record, iter_records, list_parts
from ups_rm.errors import DataError

SAMPLE = "sample"


@dataclass(frozen=True)
class Row:
    """Two responses to one prompt, with what is known of each. Pairs of values are (of response_0, of response_1).

    `categories` names the harms that are flagged, in the row's order; None where the row has no such field.
    """

    prompt: str
    response_0: str
    response_1: str
    is_response_0_safe: bool | None
    is_response_1_safe: bool | None
    safer_response_id: int | None
    better_response_id: int | None
    severity: tuple[int | None, int | None] = (None, None)
    categories: tuple[tuple[str, ...] | None, tuple[str, ...] | None] = (None, None)
    sources: tuple[str | None, str | None] = (None, None)
    sha256: tuple[str | None, str | None] = (None, None)
    prompt_source: str | None = None
    subset: str = ""
    split: Split = "train"
    file: str = ""
    line: int = 0
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def responses(self) -> tuple[str, str]:
        return self.response_0, self.response_1

    @property
    def safe(self) -> tuple[bool | None, bool | None]:
        return self.is_response_0_safe, self.is_response_1_safe

    def sha256_mismatches(self) -> list[int]:
        """Ids of responses whose recorded sha256 is not that of prompt + response (UTF-8, nothing between)."""
        return [
            i
            for i, (response, recorded) in enumerate(zip(self.responses, self.sha256, strict=True))
            if recorded is not None and recorded != response_sha256(self.prompt, response)
        ]


@dataclass(frozen=True)
class Reject:
    """A line that is left out, and why."""

    file: str
    line: int
    reason: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def response_sha256(prompt: str, response: str) -> str:
    return hashlib.sha256((prompt + response).encode("utf-8")).hexdigest()


def text_hash(*texts: str) -> int:
    """64 bits of BLAKE2b over the texts, the same in every process. One million texts collide with probability 3e-8."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def good_rows(source: str | Path) -> Iterator[Row]:
    """As `read_rows`, for readers that go on without bad rows: one warning says how many were left out, and the first.

    Raises:
        DataError: as `read_rows`.
    """
    rejects: list[Reject] = []
    try:
        yield from read_rows(source, on_reject=rejects.append)
    finally:
        if rejects:
            warnings.warn(f"{len(rejects)} rows of {source} are left out, the first is {rejects[0]}", stacklevel=2)


def read_rows(
    source: Path | str,
    *,
    split: Split | None = None,
    subsets: Sequence[str] | None = None,
    on_reject: Callable[[Reject], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[Row]:
    """Streams the rows of a source, in file order, subset by subset (all train files before the test files).

    Args:
        source: folder in PKU layout (`<root>/data/<subset>/{train,test}.jsonl`, `.jsonl.gz` or `.parquet`), one such
            file (which counts as train), a Hub id (`PKU-Alignment/PKU-SafeRLHF`, or with `hub:` in front), or
            "sample".
        split: only these rows; None for both.
        subsets: names of subset folders; None for the three published ones, or whatever folders there are.
        on_reject: hears of each bad line; without it the first one raises.
        on_bytes: hears how many bytes of all files together have been read.

    Raises:
        DataError: the source does not exist, lacks a subset, or one of its files is unreadable as a whole.
    """
    return read_parts(source_parts(source, split=split, subsets=subsets), on_reject or _raise_reject, on_bytes)


def resolve_source(source: Path | str) -> Path | str:
    """The word `sample` becomes the folder of the packaged rows; anything else stays as it is."""
    if source == SAMPLE:
        from ups_rm.data.sample import sample_root

        return sample_root()
    return source


def source_parts(source: Path | str, *, split: Split | None = None, subsets: Sequence[str] | None = None) -> list[Part]:
    """The parts that `read_rows` would read. Raises DataError when there is something amiss with the source."""
    return list_parts(resolve_source(source), split=split, subsets=subsets)


def size_of(parts: Sequence[Part]) -> int:
    """Bytes of all local files together; parts on the Hub count 0."""
    return sum(part.path.stat().st_size for part in parts if part.path is not None)


def read_parts(
    parts: Sequence[Part], on_reject: Callable[[Reject], None], on_bytes: OnBytes | None = None
) -> Iterator[Row]:
    """Streams the rows of parts, one after the other; see `read_rows`."""
    done = 0
    for part in parts:
        hear = None if on_bytes is None else (lambda count, base=done: on_bytes(base + count))
        for record in iter_records(part, hear):
            try:
                yield parse_row(record, part)
            except BadRow as error:
                on_reject(Reject(part.name, record.line, str(error), record.excerpt))
        done += size_of([part])


def _raise_reject(reject: Reject) -> None:
    raise DataError(str(reject))


class BadRow(ValueError):
    """Why a record is not a row."""


def parse_row(record: Record, part: Part) -> Row:
    """The row that a record holds. Raises BadRow, with the reason as its text."""
    if record.problem:
        raise BadRow(record.problem)
    value = record.value
    if not isinstance(value, dict):
        raise BadRow(f"row is {_kind(value)}, expected an object")
    prompt = _text(value, "prompt")
    if not prompt.strip():
        raise BadRow('field "prompt" is empty')
    where: dict[str, Any] = {"split": part.split, "file": part.name, "line": record.line, "raw": value}
    prompt_source = _optional(value, "prompt_source", str, "text")
    if "safe_response" in value and "unsafe_response" in value:
        return _pair_row(value, prompt, prompt_source, part, where)
    sources = (
        _optional(value, "response_0_source", str, "text"),
        _optional(value, "response_1_source", str, "text"),
    )
    return Row(
        prompt=prompt,
        response_0=_text(value, "response_0"),
        response_1=_text(value, "response_1"),
        is_response_0_safe=_optional(value, "is_response_0_safe", bool, "true or false"),
        is_response_1_safe=_optional(value, "is_response_1_safe", bool, "true or false"),
        safer_response_id=_small_int(value, "safer_response_id", 1),
        better_response_id=_small_int(value, "better_response_id", 1),
        severity=(
            _small_int(value, "response_0_severity_level", MAX_SEVERITY),
            _small_int(value, "response_1_severity_level", MAX_SEVERITY),
        ),
        categories=(_categories(value, "response_0_harm_category"), _categories(value, "response_1_harm_category")),
        sources=sources,
        sha256=(
            _optional(value, "response_0_sha256", str, "text"),
            _optional(value, "response_1_sha256", str, "text"),
        ),
        prompt_source=prompt_source,
        subset=part.subset or sources[0] or default_subset(part),
        **where,
    )


def _pair_row(
    value: Mapping[str, Any], prompt: str, prompt_source: str | None, part: Part, where: dict[str, Any]
) -> Row:
    """A pair as a row. A hash of the texts alone, which does not know the label, says at which id the safe one
    stands.
    """
    safe, unsafe = _text(value, "safe_response"), _text(value, "unsafe_response")
    first = text_hash(prompt, *sorted((safe, unsafe))) & 1
    safe_id = first if safe <= unsafe else 1 - first
    return Row(
        prompt=prompt,
        response_0=unsafe if safe_id else safe,
        response_1=safe if safe_id else unsafe,
        is_response_0_safe=safe_id == 0,
        is_response_1_safe=safe_id == 1,
        safer_response_id=safe_id,
        better_response_id=None,
        prompt_source=prompt_source,
        subset=part.subset or default_subset(part),
        **where,
    )


def default_subset(part: Part) -> str:
    return part.path.name.split(".")[0] if part.path is not None else part.hub_id


def _text(value: Mapping[str, Any], name: str) -> str:
    if name not in value:
        raise BadRow(f'field "{name}" is missing')
    found = value[name]
    if not isinstance(found, str):
        raise BadRow(f'field "{name}" is {_kind(found)}, expected text')
    if (at := surrogate_at(found)) is not None:
        raise BadRow(f'field "{name}" has half a surrogate pair at character {at}')
    return found


def _optional(value: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    found = value.get(name)
    if found is None:
        return None
    if type(found) is not kind:
        raise BadRow(f'field "{name}" is {_kind(found)}, expected {expected}, or null')
    return _text(value, name) if kind is str else found


def _small_int(value: Mapping[str, Any], name: str, most: int) -> int | None:
    """An integer 0..most, or None. Parquet made by pandas holds such a column with nulls as floats: 1.0 is 1."""
    found = value.get(name)
    if found is None or found != found:  # NaN: pandas' null
        return None
    if type(found) not in (int, float) or found not in range(most + 1):
        shown = str(found)[:60] if type(found) in (int, float) else _kind(found)
        raise BadRow(f'field "{name}" is {shown}, expected a whole number from 0 to {most}, or null')
    return int(found)


def _categories(value: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    found = value.get(name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise BadRow(f'field "{name}" is {_kind(found)}, expected an object of true and false')
    for category, flag in found.items():
        if (at := surrogate_at(category)) is not None:
            raise BadRow(f'field "{name}" has a category with half a surrogate pair at character {at}')
        if flag is not None and type(flag) is not bool:
            raise BadRow(f'field "{name}.{category[:60]}" is {_kind(flag)}, expected true or false')
    return tuple(category for category, flag in found.items() if flag)


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")
