"""SafeRLHF rows -> train.parquet and val.parquet in verl's schema, with rejected.jsonl and report.json beside them.

Rows stream through a spool on disk, so memory hardly grows with them (about 12 bytes a row). With default
settings the values are those of the preprocessing script users know: rows in file order, `extra_info.index` counting
from 0 in each split, null labels kept; without test rows the last 1 - train_ratio of the train rows become validation,
and keep the split "train" and the index they had. Nothing is replaced before everything is written and the bad rows
are few enough.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ups_rm.console import progress_bar
from ups_rm.data.block_workers import Wanted
from ups_rm.data.digest import UNKNOWN, Digest
from ups_rm.data.files import publish, staging
from ups_rm.data.hash_bag import Hashes, distinct
from ups_rm.data.reading import bad_rows_message, read_counted, too_many_bad
from ups_rm.data.rows import source_parts
from ups_rm.data.schema import ABILITY, DATA_SOURCE, SPLITS, Split, verl_schema
from ups_rm.data.sources import Part
from ups_rm.data.spool import Batch, Numbers, Spool
from ups_rm.data.stats import SourceStats
from ups_rm.durable import note_file, remove_file
from ups_rm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN, VAL, REJECTED, REPORT = "train.parquet", "val.parquet", "rejected.jsonl", "report.json"
REJECTED_BY_FAILED_RUN = "rejected.failed.jsonl"

BATCH_ROWS = 2000
BATCH_BYTES = 4_000_000
ROW_GROUP_BATCHES = 10
ROW_GROUP_BYTES = 8_000_000


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
    keep_categories: bool = False

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
    keep_categories: bool = False,
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
        keep_categories: `extra_info.categories` names the harms that are flagged in either response of the row, for
            figures by harm category; a field that the original data's parquet has not.

    Raises:
        DataError: the source can't be read, too many rows are bad, a category never occurs, or no row is left.
        RunError: the folder can't be written, is being written by another process, or the disk is full.
    """
    settings = Settings(
        train_ratio, shuffle, seed, dedup, group_split, tuple(categories), max_rows, max_bad, keep_categories
    )
    settings.check()
    parts = source_parts(source, subsets=subsets)
    out = Path(out)
    with staging(out) as stage:
        spools = {split: Spool(stage / f"{split}.spool") for split in SPLITS}
        try:
            stats = _read(parts, settings, spools, stage, out, progress)
            train, val = _arrange(spools, settings)
            train_prompts, val_prompts, shared = _count_prompts(train, val)
            train, val = (replace(one, hashes=np.empty(0, dtype=np.uint64)) for one in (train, val))
            written = {
                TRAIN: _write(stage / TRAIN, spools, train, settings, "writing train", progress),
                VAL: _write(stage / VAL, spools, val, settings, "writing validation", progress),
            }
            report = PrepareReport(
                out=out,
                stats=stats,
                train_rows=len(train.rows),
                val_rows=len(val.rows),
                train_prompts=train_prompts,
                val_prompts=val_prompts,
                shared_prompts=shared,
                split_from_train=val.split == "train",
                rejected=stats.rejected,
                settings={"source": str(source), "subsets": list(subsets) if subsets else None, **asdict(settings)},
                sha256=written,
            )
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
            (stage / REPORT).write_text(text + "\n", encoding="utf-8")
            publish(stage, out, [TRAIN, VAL, REJECTED, REPORT])
            remove_file(out / REJECTED_BY_FAILED_RUN)
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
    wanted = frozenset(settings.categories)
    with (stage / REJECTED).open("w", encoding="utf-8") as rejected:

        def on_digest(digest: Digest) -> None:
            assert digest.kept is not None
            spools[digest.split].append(digest.kept)
            rejected.writelines(json.dumps(asdict(reject)) + "\n" for reject in digest.rejects)

        kept = Wanted(wanted, keep=True, keep_categories=settings.keep_categories)
        stats, first = read_counted(parts, wanted=kept, on_digest=on_digest, progress=progress)
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
    rows: Numbers
    index: Numbers
    hashes: Hashes

    def pick(self, positions: npt.NDArray[np.int64] | slice) -> Arrangement:
        """The rows at some positions; a slice copies nothing."""
        return Arrangement(self.split, self.rows[positions], self.index[positions], self.hashes[positions])


def _count_prompts(train: Arrangement, val: Arrangement) -> tuple[int, int, int]:
    """Distinct prompts in train, in val, and in both. Sorts the hashes in place: nobody needs them again."""
    of_train, of_val = train.hashes, val.hashes
    for hashes in (of_train, of_val):
        hashes.sort()
    repeats = int(np.count_nonzero(of_train[1:] == of_train[:-1]))
    of_val = distinct(of_val)
    places = np.minimum(np.searchsorted(of_train, of_val), len(of_train) - 1)
    return len(of_train) - repeats, len(of_val), int(np.count_nonzero(of_train[places] == of_val))


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
        train, val = (one.pick(slice(settings.max_rows)) for one in (train, val))
    return train, val


def _all_rows(split: Split, spool: Spool, settings: Settings) -> Arrangement:
    hashes = spool.prompt_hashes()
    rows = np.arange(len(spool), dtype=np.uint32)
    if settings.dedup != "prompt":
        return Arrangement(split, rows, rows, hashes)
    _, first = np.unique(hashes, return_index=True)
    first.sort()
    return Arrangement(split, first.astype(np.uint32), rows[: len(first)], hashes[first])


def _split_train(train: Arrangement, settings: Settings) -> tuple[Arrangement, Arrangement]:
    total = len(train.rows)
    cut = int(total * settings.train_ratio)
    if not settings.group_split or cut == total:
        return train.pick(slice(cut)), train.pick(slice(cut, None))
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


def _write(
    path: Path, spools: dict[Split, Spool], rows: Arrangement, settings: Settings, label: str, progress: bool
) -> str:
    """Writes one parquet file in row groups of bounded size, and its manifest; returns its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = verl_schema(
        with_prompt_source=any(spool.sources for spool in spools.values()), with_categories=settings.keep_categories
    )
    with (
        path.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="snappy") as writer,
        progress_bar(label, len(rows.rows), unit="rows", enabled=progress) as advance,
    ):
        group: list[pa.Table] = []
        done = 0
        spool = spools[rows.split]
        for batch in spool.batches(rows.rows, rows=BATCH_ROWS, size=BATCH_BYTES):
            group.append(_verl_table(batch, rows.split, rows.index[done : done + len(batch)], spool, schema))
            done += len(batch)
            advance(len(batch))
            if len(group) == ROW_GROUP_BATCHES or sum(table.nbytes for table in group) >= ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))
    return note_file(path)


def _verl_table(batch: Batch, split: Split, index: Numbers, spool: Spool, schema: pa.Schema) -> pa.Table:
    """Rows in verl's columns, made of the buffers that hold them: `pa.array` and `pa.scalar` would import pandas."""
    import pyarrow as pa

    count = len(batch)

    def array(kind: pa.DataType, values: npt.NDArray[Any], known: npt.NDArray[np.bool_] | None = None) -> pa.Array:
        valid = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little"))
        data = np.packbits(values, bitorder="little") if kind == pa.bool_() else values
        return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(np.ascontiguousarray(data))])

    def struct(kind: pa.StructType, *values: pa.Array) -> pa.Array:
        return pa.StructArray.from_arrays(values, fields=list(kind))

    def texts(offsets: npt.NDArray[np.int32], data: bytes) -> pa.Array:
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))

    def same(value: str) -> pa.Array:
        return texts(np.arange(count + 1, dtype=np.int32) * len(value), value.encode() * count)

    turn = schema.field("prompt").type.value_type
    one_each = array(pa.int32(), np.arange(count + 1, dtype=np.int32))
    known = batch.labels != UNKNOWN  # (n, 4)
    flags = [array(pa.bool_(), batch.labels[:, i] == 1, known[:, i]) for i in (0, 1)]
    ids = [array(pa.int64(), batch.labels[:, i].astype(np.int64), known[:, i]) for i in (2, 3)]
    place = array(pa.int64(), index.astype(np.int64))
    info, more = schema.field("extra_info").type, list[pa.Array]()
    if info.get_field_index("prompt_source") >= 0:
        names = [*spool.sources, None]  # -1 is the last of them
        more.append(pa.array([names[kind] for kind in batch.kinds.tolist()], pa.string()))
    if info.get_field_index("categories") >= 0:
        harms = [*spool.harm_sets, ()]
        more.append(pa.array([harms[place] for place in batch.harms.tolist()], pa.list_(pa.string())))
    return pa.table(
        [
            same(DATA_SOURCE),
            pa.ListArray.from_arrays(one_each, struct(turn, same("user"), texts(batch.offsets, batch.texts))),
            same(ABILITY),
            struct(schema.field("reward_model").type, same("model"), pa.nulls(count)),
            struct(info, same(split), place, *flags, *ids, *more),
        ],
        schema=schema,
    )
