"""What is kept of a block of rows: counts, 64-bit hashes, and the few fields that reach the parquet.

A digest is a tenth of its block and is made without looking at any other block, so blocks can be worked on in several
processes (block_workers.py). Distinct prompts and texts are counted later, by their hashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from ups_rm.data.columns import Columns, block_columns
from ups_rm.data.hash_bag import Hashes
from ups_rm.data.prompts import kind_of
from ups_rm.data.rows import Reject
from ups_rm.data.schema import Split
from ups_rm.data.sources import Block, Part

PairLabels = tuple[str, "bool | None", "bool | None", "int | None", "int | None"]
UNKNOWN = 255
CODES = {None: UNKNOWN, 0: 0, 1: 1}  # False and True too: they equal 0 and 1
ReplyLabels = tuple[str, "bool | None", "int | None", "tuple[str, ...] | None"]


@dataclass(frozen=True)
class Digest:
    """Of n rows of one split, which stood on so many `lines` of JSONL; `rejects` are those that are left out.

    `pairs` counts rows by (subset, is_response_0_safe, is_response_1_safe, safer, better), `replies` responses by
    (subset, safe, severity, categories). `prompts` (n,) and `texts` (2n,) are hashes of prompts and of (prompt,
    response); the lowest bit of a text's hash is its safety label, texts without one stand in `unlabelled`. `kept` are
    the rows that may reach the parquet.
    """

    split: Split
    lines: int
    rejects: list[Reject]
    pairs: Counter[PairLabels]
    replies: Counter[ReplyLabels]
    prompts: Hashes
    texts: Hashes
    unlabelled: Hashes
    sha256_checked: int
    sha256_mismatches: int
    kept: KeptRows | None = None


@dataclass(frozen=True)
class KeptRows:
    """The fields of m rows that go into the parquet.

    `texts` are the prompts in UTF-8, one behind the other, each of `sizes` bytes, and `hashes` their hashes. `labels`
    (m, 4) are safe_0, safe_1, safer and better, UNKNOWN for null. `kinds` are the places in `sources` of those
    prompt_sources that say what kind of prompt it is, -1 for the others. `harms` are the places in `harm_sets` of the
    harms that are flagged in either response, -1 for none; all -1 where they are not to be kept.
    """

    texts: bytes
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.int32]
    hashes: Hashes
    sources: tuple[str, ...]
    harms: npt.NDArray[np.int32]
    harm_sets: tuple[tuple[str, ...], ...] = ()


def block_digest(
    block: Block, part: Part, categories: frozenset[str], keep: bool, keep_categories: bool = False
) -> Digest:
    """Check and count a block; with `keep`, keep its rows for the parquet: of `categories`, or all if none is named."""
    columns, rejects, lines = block_columns(block, part)
    return digest(columns, rejects, categories, keep, lines, keep_categories)


def digest(
    columns: Columns,
    rejects: list[Reject],
    categories: frozenset[str] = frozenset(),
    keep: bool = False,
    lines: int = 0,
    keep_categories: bool = False,
) -> Digest:
    """The digest of rows that are columns already."""
    encoded = [prompt.encode() for prompt in columns.prompt]
    prompts, texts, checked, mismatches = _hashes(encoded, columns)
    labels = np.stack([_codes(column) for column in (*columns.safe, columns.safer, columns.better)], axis=1)
    safe = labels[:, :2].flatten()
    replies: Counter[ReplyLabels] = Counter()
    for i in (0, 1):
        replies.update(zip(columns.subset, columns.safe[i], columns.severity[i], columns.categories[i], strict=True))
    return Digest(
        split=columns.split,
        lines=lines,
        rejects=rejects,
        pairs=Counter(zip(columns.subset, *columns.safe, columns.safer, columns.better, strict=True)),
        replies=replies,
        prompts=prompts,
        texts=(texts & ~np.uint64(1) | safe)[safe != UNKNOWN],
        unlabelled=texts[safe == UNKNOWN],
        sha256_checked=checked,
        sha256_mismatches=mismatches,
        kept=_kept(columns, encoded, labels, prompts, categories, keep_categories) if keep else None,
    )


def _codes(column: Sequence[bool | int | None]) -> npt.NDArray[np.uint8]:
    """Small numbers and flags as bytes."""
    return np.frombuffer(bytes(map(CODES.__getitem__, column)), dtype=np.uint8)


def _hashes(prompts: Sequence[bytes], columns: Columns) -> tuple[Hashes, Hashes, int, int]:
    """Hashes of prompts (n,) and of (prompt, response) (2n,); how many sha256 were recorded, and how many are wrong.

    The recorded sha256 is that of prompt and response, nothing between, so its first 64 bits are the text's hash once
    the prompt's length is mixed in: "ab" + "c" is another text than "a" + "bc".
    """
    heads, texts = list[str](), list[str]()
    for prompt, first, second in zip(prompts, *columns.response, strict=True):
        whole = sha256(prompt)
        heads.append(whole.hexdigest())
        other = whole.copy()
        whole.update(first.encode())
        other.update(second.encode())
        texts += (whole.hexdigest(), other.hexdigest())
    recorded = [value for pair in zip(*columns.sha256, strict=True) for value in pair]
    checked = len(recorded) - recorded.count(None)
    wrong = recorded != texts and sum(a is not None and a != b for a, b in zip(recorded, texts, strict=True))
    lengths = np.fromiter(map(len, prompts), dtype=np.uint64, count=len(prompts))
    mixed = np.repeat(lengths * np.uint64(0x9E3779B97F4A7C15), 2)
    return _first_64_bits(heads), _first_64_bits(texts) ^ mixed, checked, int(wrong)


def _first_64_bits(hashes: list[str]) -> Hashes:
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype="<u8")[::4].astype(np.uint64)


def _kept(
    columns: Columns,
    prompts: Sequence[bytes],
    labels: npt.NDArray[np.uint8],
    hashes: Hashes,
    categories: frozenset[str],
    keep_categories: bool,
) -> KeptRows:
    """All rows, or those with one of the categories flagged in either response."""
    named, flagged = columns.prompt_source, list[tuple[str, ...]]()
    if categories or keep_categories:
        flagged = [tuple(dict.fromkeys((*(a or ()), *(b or ())))) for a, b in zip(*columns.categories, strict=True)]
    if categories:
        rows = np.flatnonzero([not categories.isdisjoint(names) for names in flagged])
        prompts, named = [prompts[i] for i in rows.tolist()], [named[i] for i in rows.tolist()]
        labels, hashes, flagged = labels[rows], hashes[rows], [flagged[i] for i in rows.tolist()]
    sources = tuple(source for source in dict.fromkeys(named) if source and kind_of(source))
    places = {source: place for place, source in enumerate(sources)}
    kinds = np.full(len(prompts), -1, dtype=np.int32)
    if sources:
        kinds[:] = [places.get(source or "", -1) for source in named]
    sizes = np.fromiter(map(len, prompts), dtype=np.int64, count=len(prompts))
    harms = np.full(len(prompts), -1, dtype=np.int32)
    sets = tuple(names for names in dict.fromkeys(flagged) if names) if keep_categories else ()
    if sets:
        place_of = {names: place for place, names in enumerate(sets)}
        harms[:] = [place_of.get(names, -1) for names in flagged]
    return KeptRows(b"".join(prompts), sizes, labels, kinds, hashes, sources, harms, sets)
