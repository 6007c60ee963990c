"""What is kept of a block of rows: counts, 64-bit hashes, and the few fields that reach the parquet.

A digest is a tenth of its block and is made without looking at any other block, so blocks can be worked on in several
processes (block_workers.py). Distinct prompts and texts are counted later, by their hashes.
"""

from __future__ import annotations

import marshal
from collections import Counter
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
ReplyLabels = tuple[str, "bool | None", "int | None", "tuple[str, ...] | None"]


@dataclass(frozen=True)
class Digest:
    """Of n rows of one split.

    `pairs` counts rows by (subset, is_response_0_safe, is_response_1_safe, safer, better), `replies` responses by
    (subset, safe, severity, categories). `prompts` (n,) and `texts` (2n,) are hashes of prompts and of (prompt,
    response); the lowest bit of a text's hash is its safety label, texts without one stand in `unlabelled`. `records`
    holds the kept rows in marshal's format, each of `sizes` bytes; `kept` are their places, n where all are kept.
    """

    split: Split
    rejects: list[Reject]
    pairs: Counter[PairLabels]
    replies: Counter[ReplyLabels]
    prompts: Hashes
    texts: Hashes
    unlabelled: Hashes
    sha256_checked: int
    sha256_mismatches: int
    records: bytes = b""
    sizes: npt.NDArray[np.uint32] | None = None
    kept: npt.NDArray[np.int64] | None = None
    names_kinds: bool = False


def block_digest(block: Block, part: Part, categories: frozenset[str], keep: bool) -> Digest:
    """Check and count a block; with `keep`, keep its rows for the parquet: of `categories`, or all if none is named."""
    columns, rejects = block_columns(block, part)
    return digest(columns, rejects, categories, keep)


def digest(
    columns: Columns, rejects: list[Reject], categories: frozenset[str] = frozenset(), keep: bool = False
) -> Digest:
    """The digest of rows that are columns already."""
    prompts, texts, checked, mismatches = _hashes(columns)
    safe = [label for pair in zip(*columns.safe, strict=True) for label in pair]
    labelled = np.array([label is not None for label in safe], dtype=bool)
    label_bits = np.array([label is True for label in safe], dtype=np.uint64)
    replies: Counter[ReplyLabels] = Counter()
    for i in (0, 1):
        replies.update(zip(columns.subset, columns.safe[i], columns.severity[i], columns.categories[i], strict=True))
    whole = Digest(
        split=columns.split,
        rejects=rejects,
        pairs=Counter(zip(columns.subset, *columns.safe, columns.safer, columns.better, strict=True)),
        replies=replies,
        prompts=prompts,
        texts=(texts & ~np.uint64(1) | label_bits)[labelled],
        unlabelled=texts[~labelled],
        sha256_checked=checked,
        sha256_mismatches=mismatches,
    )
    return _with_records(whole, columns, categories) if keep else whole


def _hashes(columns: Columns) -> tuple[Hashes, Hashes, int, int]:
    """Hashes of prompts (n,) and of (prompt, response) (2n,); how many sha256 were recorded, and how many are wrong.

    The recorded sha256 is that of prompt and response, nothing between, so its first 64 bits are the text's hash once
    the prompt's length is mixed in: "ab" + "c" is another text than "a" + "bc".
    """
    heads, texts, lengths = list[bytes](), list[bytes](), list[int]()
    checked = mismatches = 0
    for prompt, *responses, first, second in zip(columns.prompt, *columns.response, *columns.sha256, strict=True):
        encoded = prompt.encode()
        start = sha256(encoded)
        heads.append(start.digest()[:8])
        lengths.append(len(encoded))
        for response, recorded in zip(responses, (first, second), strict=True):
            text = start.copy()
            text.update(response.encode())
            found = text.digest()
            texts.append(found[:8])
            if recorded is not None:
                checked += 1
                mismatches += found.hex() != recorded
    mixed = np.array(lengths, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _numbers(heads), _numbers(texts) ^ np.repeat(mixed, 2), checked, mismatches


def _numbers(hashes: list[bytes]) -> Hashes:
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


def _with_records(whole: Digest, columns: Columns, categories: frozenset[str]) -> Digest:
    kept = np.arange(len(columns))
    if categories:
        flagged = zip(*columns.categories, strict=True)
        kept = np.flatnonzero([not categories.isdisjoint((*(a or ()), *(b or ()))) for a, b in flagged])
    kinds = [source if kind_of(source) else None for source in columns.prompt_source]
    rows = list(zip(columns.prompt, *columns.safe, columns.safer, columns.better, kinds, strict=True))
    records = [marshal.dumps(rows[i]) for i in kept]
    return Digest(
        **{
            **vars(whole),
            "records": b"".join(records),
            "sizes": np.fromiter(map(len, records), np.uint32, len(records)),
            "kept": kept,
            "names_kinds": any(kinds[i] is not None for i in kept),
        }
    )
