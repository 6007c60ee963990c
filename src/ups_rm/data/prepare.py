"""SafeRLHF rows -> train.parquet and val.parquet in verl's schema, with rejected.jsonl and report.json beside them.

Rows stream through a spool on disk, so memory does not grow with the texts (about 100 bytes a row). With default
settings the values are those of the preprocessing script users know: rows in file order, `extra_info.index` counting
from 0 in each split, null labels kept; without test rows the last 1 - train_ratio of the train rows become validation,
and keep the split "train" and the index they had. Nothing is replaced before everything is written and the bad rows
are few enough.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ups_rm.console import progress_bar
from ups_rm.data.files import file_sha256, publish, staging
from ups_rm.data.prompts import kind_of
from ups_rm.data.reading import bad_rows_message, read_counted, too_many_bad
from ups_rm.data.rows import Reject, Row, source_parts
from ups_rm.data.schema import ABILITY, DATA_SOURCE, SPLITS, Split, verl_schema
from ups_rm.data.sources import Part
from ups_rm.data.spool import Kept, Spool
from ups_rm.data.stats import SourceStats
from ups_rm.errors import DataError

TRAIN, VAL, REJECTED, REPORT = "train.parquet", "val.parquet", "rejected.jsonl", "report.json"
REJECTED_BY_FAILED_RUN = "rejected.failed.jsonl"

BATCH_ROWS = 500
BATCH_CHARS = 4_000_000
ROW_GROUP_BATCHES = 40
ROW_GROUP_BYTES = 8_000_000

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrepareReport:
    """What was read and what was written. `stats` counts everything read; the rest is about the two files."""

    out: Path
    stats: SourceStats
    train_rows: int
    val_rows: int
    train_prompts: int
    val_prompts: int
    shared_prompts: int
    split_from_train: bool
    rejected: int
    settings: dict[str, Any]
    sha256: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        written = {
            TRAIN: {"rows": self.train_rows, "distinct_prompts": self.train_prompts, "sha256": self.sha256[TRAIN]},
            VAL: {"rows": self.val_rows, "distinct_prompts": self.val_prompts, "sha256": self.sha256[VAL]},
        }
        return {
            "settings": self.settings,
            "written": written,
            "prompts_shared_by_train_and_validation": self.shared_prompts,
            "validation_split_from_train": self.split_from_train,
            "rejected": self.rejected,
            "read": self.stats.to_dict(),
        }


@dataclass(frozen=True)
class Settings:
    """How rows become the two files; see `prepare`."""

    train_ratio: float = 0.9
    shuffle: bool = False
    seed: int = 42
    dedup: str | None = None
    group_split: bool = False
    categories: tuple[str, ...] = ()
    max_rows: int | None = None
    max_bad: float = 0.001

    def check(self) -> None:
        if not 0 < self.train_ratio <= 1:
            raise DataError(f"train_ratio is {self.train_ratio}, expected a share above 0 and at most 1, such as 0.9")
        if not 0 <= self.max_bad <= 1:
            raise DataError(f"max_bad is {self.max_bad}, expected a share from 0 to 1, such as 0.001")
        if self.max_rows is not None and self.max_rows < 1:
            raise DataError(f"max_rows is {self.max_rows}, expected at least 1")
        if self.dedup not in (None, "prompt"):
            raise DataError(f"dedup is {self.dedup!r}, expected `prompt` or nothing")


def prepare(
    source: Path | str,
    out: Path | str,
    *,
    subsets: Sequence[str] | None = None,
    train_ratio: float = 0.9,
    shuffle: bool = False,
    seed: int = 42,
    dedup: str | None = None,
    group_split: bool = False,
    categories: Sequence[str] = (),
    max_rows: int | None = None,
    max_bad: float = 0.001,
    progress: bool = False,
) -> PrepareReport:
    """Reads `source` (see `read_rows`) and writes the two parquet files into the folder `out`.

    Args:
        subsets: names of subset folders, in the order they are to be read.
        train_ratio: share of the train rows that stay train when there are no test rows.
        shuffle: permute each file's rows; `seed` says how. The same seed gives the same bytes.
        dedup: "prompt" keeps only the first row of each prompt, in each split.
        group_split: no prompt in both files. Test rows win: train loses the rows of their prompts. Without test rows,
            the prompts that appear last become validation with all their rows: as many as fit into 1 - train_ratio of
            the rows, but at least one.
        categories: keep only rows with one of these harms flagged in either response.
        max_rows: at most this many rows in each file, after everything else.
        max_bad: largest share of unusable rows that is tolerated.

    Raises:
        DataError: the source can't be read, too many rows are bad, a category never occurs, or no row is left.
        RunError: the folder can't be written, is being written by another process, or the disk is full.
    """
    settings = Settings(train_ratio, shuffle, seed, dedup, group_split, tuple(categories), max_rows, max_bad)
    settings.check()
    parts = source_parts(source, subsets=subsets)
    out = Path(out)
    with staging(out) as stage:
        spools = {split: Spool(stage / f"{split}.spool") for split in SPLITS}
        try:
            stats = _read(parts, settings, spools, stage, out, progress)
            train, val = _arrange(spools, settings)
            written = {
                TRAIN: _write(stage / TRAIN, spools, train, "writing train", progress),
                VAL: _write(stage / VAL, spools, val, "writing validation", progress),
            }
            shared = np.intersect1d(train.hashes, val.hashes)
            report = PrepareReport(
                out=out,
                stats=stats,
                train_rows=len(train.rows),
                val_rows=len(val.rows),
                train_prompts=len(np.unique(train.hashes)),
                val_prompts=len(np.unique(val.hashes)),
                shared_prompts=len(shared),
                split_from_train=val.split == "train",
                rejected=stats.rejected,
                settings={"source": str(source), "subsets": list(subsets) if subsets else None, **asdict(settings)},
                sha256=written,
            )
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
            (stage / REPORT).write_text(text + "\n", encoding="utf-8")
            publish(stage, out, [TRAIN, VAL, REJECTED, REPORT])
            (out / REJECTED_BY_FAILED_RUN).unlink(missing_ok=True)
        finally:
            for spool in spools.values():
                spool.close()
    return report


def _read(
    parts: Sequence[Part],
    settings: Settings,
    spools: dict[Split, Spool],
    stage: Path,
    out: Path,
    progress: bool,
) -> SourceStats:
    """Streams the source into the spools; bad rows into rejected.jsonl, which may be too many."""
    wanted = set(settings.categories)

    def on_row(row: Row) -> None:
        if not wanted or wanted & {name for names in row.categories for name in names or ()}:
            spools[row.split].append(row, row.prompt_source if kind_of(row.prompt_source) else None)

    with (stage / REJECTED).open("w", encoding="utf-8") as rejected:

        def on_reject(reject: Reject) -> None:
            rejected.write(json.dumps(asdict(reject)) + "\n")

        stats, first = read_counted(parts, on_row=on_row, on_reject=on_reject, progress=progress)
    if too_many_bad(stats, settings.max_bad):
        # the rejected.jsonl that is there belongs to the parquet that is there, and stays with it
        name = REJECTED_BY_FAILED_RUN if (out / TRAIN).exists() else REJECTED
        (stage / REJECTED).rename(stage / name)
        publish(stage, out, [name])
        raise DataError(
            f"{bad_rows_message(stats, settings.max_bad, first)}; see {out / name}\n"
            "  fix: mend these rows, or raise --max-bad; nothing was replaced"
        )
    if unseen := wanted - set(stats.category_names()):
        raise DataError(
            f"no response is flagged with {', '.join(sorted(unseen))}; "
            f"the categories there are: {', '.join(stats.category_names()) or 'none'}"
        )
    return stats


@dataclass(frozen=True)
class Arrangement:
    """What goes into one file: `rows` are numbers in the spool of `split`, in the order of writing.

    `index` is each row's extra_info.index and `hashes` its prompt's hash. All of shape (rows,).
    """

    split: Split
    rows: Index
    index: Index
    hashes: npt.NDArray[np.uint64]

    def pick(self, positions: Index) -> Arrangement:
        return Arrangement(self.split, self.rows[positions], self.index[positions], self.hashes[positions])


def _arrange(spools: dict[Split, Spool], settings: Settings) -> tuple[Arrangement, Arrangement]:
    """Which rows go where: duplicates out, split, shared prompts out, shuffle, cut. In this order."""
    train, val = (_all_rows("train", spools["train"], settings), _all_rows("test", spools["test"], settings))
    if not len(val.rows):
        train, val = _split_train(train, settings)
    elif settings.group_split:
        train = train.pick(np.flatnonzero(~np.isin(train.hashes, val.hashes)))
    if not len(train.rows):
        raise DataError(
            f"no train row is left: {len(spools['train'])} train and {len(spools['test'])} test rows were read and "
            "passed the filters; nothing was replaced"
        )
    if settings.shuffle:
        rng = random.Random(settings.seed)  # one generator for both files, train first
        train, val = _shuffled(train, rng), _shuffled(val, rng)
    if settings.max_rows is not None:
        train, val = (one.pick(np.arange(min(settings.max_rows, len(one.rows)))) for one in (train, val))
    return train, val


def _all_rows(split: Split, spool: Spool, settings: Settings) -> Arrangement:
    hashes = spool.prompt_hashes
    rows = np.arange(len(spool), dtype=np.int64)
    if settings.dedup == "prompt":
        _, first = np.unique(hashes, return_index=True)
        rows = np.sort(first).astype(np.int64)
    return Arrangement(split, rows, np.arange(len(rows), dtype=np.int64), hashes[rows])


def _split_train(train: Arrangement, settings: Settings) -> tuple[Arrangement, Arrangement]:
    total = len(train.rows)
    cut = int(total * settings.train_ratio)
    in_val = np.arange(total) >= cut
    if settings.group_split and cut < total:
        _, first, group = np.unique(train.hashes, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)  # groups in the order of their first row
        sizes = np.bincount(group)[by_appearance]
        rows_from_here_on = np.cumsum(sizes[::-1])[::-1]
        is_val = np.zeros(len(first), dtype=bool)
        is_val[by_appearance[rows_from_here_on <= max(total - cut, sizes[-1])]] = True
        in_val = is_val[group]
    return train.pick(np.flatnonzero(~in_val)), train.pick(np.flatnonzero(in_val))


def _shuffled(rows: Arrangement, rng: random.Random) -> Arrangement:
    order = array("q", range(len(rows.rows)))
    rng.shuffle(order)  # the same permutation as shuffling the list of rows
    return rows.pick(np.frombuffer(order, dtype=np.int64) if order else np.empty(0, dtype=np.int64))


def _write(path: Path, spools: dict[Split, Spool], rows: Arrangement, label: str, progress: bool) -> str:
    """Writes one parquet file in row groups of bounded size and returns its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = verl_schema(with_prompt_source=any(spool.names_kinds for spool in spools.values()))
    with (
        path.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="snappy") as writer,
        progress_bar(label, len(rows.rows), unit="rows", enabled=progress) as advance,
    ):
        group: list[pa.Table] = []
        for batch in _batches(spools[rows.split], rows):
            group.append(pa.Table.from_pylist(batch, schema=schema))
            advance(len(batch))
            if len(group) == ROW_GROUP_BATCHES or sum(table.nbytes for table in group) >= ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))
    return file_sha256(path)


def _batches(spool: Spool, rows: Arrangement) -> Iterator[list[dict[str, Any]]]:
    """The rows as verl has them, in batches small enough to be Python objects: few when the prompts are huge."""
    batch: list[dict[str, Any]] = []
    chars = 0
    for number, index in zip(rows.rows, rows.index, strict=True):
        kept = spool[int(number)]
        batch.append(_verl_row(kept, rows.split, int(index)))
        chars += len(kept.prompt)
        if len(batch) == BATCH_ROWS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _verl_row(kept: Kept, split: Split, index: int) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": kept.prompt}],
        "ability": ABILITY,
        "reward_model": {"style": "model", "ground_truth": None},
        "extra_info": {
            "split": split,
            "index": index,
            "is_response_0_safe": kept.is_response_0_safe,
            "is_response_1_safe": kept.is_response_1_safe,
            "safer_response_id": kept.safer_response_id,
            "better_response_id": kept.better_response_id,
            "prompt_source": kept.prompt_source,
        },
    }
