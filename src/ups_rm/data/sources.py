"""Where rows come from: finds the files of a source and streams their raw records.

A source is a folder in PKU layout, one file, or a data set on the Hugging Face Hub; `list_parts` turns it into parts
(one subset and split each), `iter_blocks` yields what stands in a part in blocks of neighbouring lines, `iter_records`
the same as parsed but unchecked records, one at a time. What a record must contain is the business of rows.py. Memory
stays bounded by MAX_ROW_BYTES whatever the file holds.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ups_rm.data.schema import SPLITS, SUBSETS, Split
from ups_rm.durable import check_file
from ups_rm.errors import DataError

MAX_ROW_BYTES = 8 * 2**20  # the longest published row has under 20 kB
MAX_COLUMNS = 10_000  # the published rows have 54, with those of the harm categories
MAX_EXPANSION = 100  # of gzip, beyond FREE_EXPANSION; the published rows come to 4
FREE_EXPANSION = 32 * 2**20
BLOCK_BYTES = 2**19
BLOCK_RECORDS = 256
EXCERPT_CHARS = 120
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """One subset and split of a source: a local file (`path`), or a Hub data set (`hub_id` with `config`)."""

    subset: str
    split: Split
    path: Path | None = None
    hub_id: str = ""
    config: str | None = None

    @property
    def name(self) -> str:
        if self.path is not None:
            return str(self.path)
        return "/".join(word for word in (f"hub:{self.hub_id}", self.config, self.split) if word)


@dataclass(frozen=True)
class Record:
    """What stands on one line (or parquet row), counted from 1: a value, or the `problem` that kept it from being
    one.
    """

    line: int
    value: Any = None
    problem: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class Block:
    """Neighbouring lines of a part: lines of JSONL (`size` bytes of the file `path` from `start` on, or `data`), or
    records, whose line numbers are those of the part.
    """

    path: Path | None = None
    start: int = 0
    size: int = 0
    data: bytes = b""
    records: tuple[Record, ...] = ()

    def lines(self) -> list[bytes]:
        """The lines of JSONL with their ends, blank ones too; of a line that is too long, at least so much.

        Raises:
            DataError: the file can't be read.
        """
        if self.path is None:
            lines = BytesIO(self.data).readlines()
        else:
            try:
                with self.path.open("rb", buffering=2**17) as file:
                    file.seek(self.start)
                    if self.size > MAX_ROW_BYTES:  # may end within a line
                        lines = BytesIO(file.read(self.size)).readlines()
                    else:
                        lines = file.readlines(self.size - 1)
            except OSError as error:
                raise DataError(f"{self.path}: can't be read: {error.strerror or error}") from error
        if self.start == 0 and lines:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        return lines


def list_parts(source: Path | str, *, split: Split | None = None, subsets: Sequence[str] | None = None) -> list[Part]:
    """The parts of `source` in reading order: subset by subset as asked for, train before test.

    `subsets=None` takes the three published subsets where they exist, else every subset folder there is, by name.
    A single file is one train part.

    Raises:
        DataError: the path does not exist, a named subset is missing, or there is nothing to read.
    """
    path = Path(source)
    if not str(source).startswith("hub:"):
        if path.is_file():
            return _file_part(path, split, subsets)
        if path.is_dir():
            return _folder_parts(path, split, subsets)
    if (hub_id := _hub_id(str(source))) is not None:
        from ups_rm.data.hub import hub_parts

        return hub_parts(hub_id, split=split, subsets=subsets)
    raise DataError(
        f"{source}: no such file or folder\n"
        "  fix: give a folder with data/<subset>/{train,test}.jsonl, a .jsonl, .jsonl.gz or .parquet file, a Hub id as "
        "hub:OWNER/NAME, or the word `sample` for the rows that come with UPS-RM"
    )


def _hub_id(source: str) -> str | None:
    """OWNER/NAME of a Hub source. Without the `hub:` in front, it must not look like a path of a folder that exists."""
    if source.startswith("hub:"):
        return source.removeprefix("hub:")
    looks_like_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not source.endswith(SUFFIXES)
    owner = Path(source).parts[0] if source else ""
    return source if looks_like_id and owner != "Data" and not Path(owner).exists() else None


def _file_part(path: Path, split: Split | None, subsets: Sequence[str] | None) -> list[Part]:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: don't know this kind of file; expected one of {', '.join(SUFFIXES)}")
    if subsets:
        raise DataError(f"{path}: is one file and has no subsets ({', '.join(subsets)} asked for); leave --subsets out")
    return [Part(subset="", split="train", path=path)] if split in (None, "train") else []


def _folder_parts(root: Path, split: Split | None, subsets: Sequence[str] | None) -> list[Part]:
    base = root / "data" if (root / "data").is_dir() else root
    there = {folder.name: folder for folder in sorted(base.iterdir()) if folder.is_dir() and _any_split(folder)}
    if subsets:
        missing = [name for name in subsets if name not in there]
        if missing:
            raise DataError(
                f"{base}: subset {', '.join(missing)} has no train or test file there; "
                f"found {', '.join(there) or 'no subset at all'}"
            )
        chosen = list(dict.fromkeys(subsets))
    else:
        chosen = [name for name in SUBSETS if name in there] or list(there)
    folders = [(name, there[name]) for name in chosen]
    if not folders and _any_split(base):
        folders = [("", base)]
    if not folders:
        raise DataError(
            f"{root}: found no data/<subset>/train.jsonl or test.jsonl (also .jsonl.gz or .parquet) in this folder"
        )
    wanted = [split] if split else SPLITS
    return [
        Part(subset=name, split=one, path=path)
        for one in wanted
        for name, folder in folders
        for path in _split_files(folder, one)
    ]


def _any_split(folder: Path) -> bool:
    return any(_split_files(folder, split) for split in SPLITS)


def _split_files(folder: Path, split: Split) -> list[Path]:
    """The split's file, in the first of the known formats that is there, or its parquet shards by name."""
    for suffix in SUFFIXES:
        if (path := folder / f"{split}{suffix}").is_file():
            return [path]
    return sorted(folder.glob(f"{split}-*-of-*.parquet"))


def iter_records(part: Part, on_bytes: OnBytes | None = None) -> Iterator[Record]:
    """Streams the records of one part, one at a time; as `iter_blocks`."""
    before = 0
    for block in iter_blocks(part, on_bytes):
        lines = block.lines()
        yield from block.records
        yield from strict_records(lines, before)
        before += len(lines)


def strict_records(lines: Sequence[bytes], before: int = 0) -> Iterator[Record]:
    """The records of the lines that are not blank, numbered from `before` + 1; what is no JSON has a problem."""
    for number, line in enumerate(lines, before + 1):
        if line.strip():
            yield parse_line(number, line)


def iter_blocks(part: Part, on_bytes: OnBytes | None = None) -> Iterator[Block]:
    """Streams one part; `on_bytes` hears how many bytes of the file were read so far.

    Raises:
        DataError: the file as a whole can't be read (not parquet, truncated gzip, unreachable Hub data set).
    """
    if part.path is not None and not part.path.name.endswith(".parquet"):
        yield from _iter_jsonl(part.path, on_bytes)
        return
    if part.path is None:
        from ups_rm.data.hub import iter_hub

        records = iter_hub(part)
    else:
        records = _iter_parquet(part.path, on_bytes)
    while some := tuple(islice(records, BLOCK_RECORDS)):
        yield Block(records=some)


def _iter_jsonl(path: Path, on_bytes: OnBytes | None) -> Iterator[Block]:
    """Blocks of BLOCK_BYTES and the rest of their last line; of a row that is too long, so much that it shows."""
    place = number = 0
    try:
        with path.open("rb") as raw:
            if path.name.endswith(".gz"):
                stream = gzip.GzipFile(fileobj=raw)
                while data := stream.read(BLOCK_BYTES):
                    rest = stream.readline(MAX_ROW_BYTES + 1)
                    _check_expansion(path, stream)
                    yield Block(data=data + rest, start=place)
                    _skip_rest(stream, rest, lambda: _check_expansion(path, stream))
                    place += len(data) + len(rest)
                    number += data.count(b"\n") + 1
                    if on_bytes is not None:
                        on_bytes(raw.tell())
                return
            end = path.stat().st_size
            while place < end:
                stop = raw.seek(min(place + BLOCK_BYTES, end))
                rest = raw.readline(MAX_ROW_BYTES + 1)
                yield Block(path, place, stop - place + len(rest))
                _skip_rest(raw, rest)
                place = raw.tell()
                if on_bytes is not None:
                    on_bytes(place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the compressed data is damaged or ends early, after line {number} ({error})\n"
            "  fix: download or compress the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _check_expansion(path: Path, stream: gzip.GzipFile) -> None:
    """Raises DataError for a file that becomes so much more than it is that no rows can be in it."""
    size, read = path.stat().st_size, stream.tell()
    if read > FREE_EXPANSION + MAX_EXPANSION * size:
        raise DataError(
            f"{path}: expands to more than {MAX_EXPANSION} times its {size} bytes: that is no file of rows\n"
            "  fix: if it is one, give it uncompressed"
        )


def _skip_rest(stream: IO[bytes] | gzip.GzipFile, piece: bytes, check: Callable[[], None] = lambda: None) -> None:
    while piece and not piece.endswith(b"\n"):
        check()
        piece = stream.readline(2**20)


def parse_line(number: int, line: bytes) -> Record:
    """One line of JSONL as a record; a line that is too long, isn't UTF-8 or isn't JSON becomes one with a problem."""
    if len(line) > MAX_ROW_BYTES:
        return _problem(number, f"row is longer than {MAX_ROW_BYTES} bytes", line[: 4 * EXCERPT_CHARS])
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return _problem(number, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}", line)
    try:
        return Record(number, value=json.loads(text), excerpt=text[:EXCERPT_CHARS])
    except json.JSONDecodeError as error:
        return _problem(number, f"not JSON: {error.msg} at column {error.colno}", line)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or lists nested as deep
        return _problem(number, f"not JSON that can be read: {error}", line)


def _problem(number: int, problem: str, line: bytes) -> Record:
    excerpt = line[: 4 * EXCERPT_CHARS].decode("utf-8", errors="replace").rstrip("\r\n")[:EXCERPT_CHARS]
    return Record(number, problem=problem, excerpt=excerpt)


def _iter_parquet(path: Path, on_bytes: OnBytes | None) -> Iterator[Record]:
    size = path.stat().st_size
    with open_parquet(path) as file:
        total = max(file.metadata.num_rows, 1)
        for number, value in enumerate(parquet_rows(file, path, batch_size=256), start=1):
            yield Record(number, value=value)
            if on_bytes is not None and (number % 256 == 0 or number == total):
                on_bytes(size * number // total)


def parquet_rows(
    file: Any, path: Path, *, columns: Sequence[str] | None = None, batch_size: int = 1024
) -> Iterator[dict[str, Any]]:
    """The rows of a file that `open_parquet` opened, in order.

    Args:
        columns: only these; all if None.

    Raises:
        DataError: what stands in the file can't be read, or there are fewer rows than it names.
    """
    number, batches = 0, file.iter_batches(batch_size=batch_size, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # arrow's own errors, MemoryError among them, and those of values Python can't hold
            raise DataError(f"{path}: is damaged after row {number}: {parquet_problem(error)}") from error
        if batch is None:
            break
        yield from rows
        number += len(rows)
    if number != file.metadata.num_rows and columns != []:
        told = f"{number} rows can be read of {file.metadata.num_rows} that it names"
        raise DataError(f"{path}: is damaged: {told}")


def open_parquet(path: Path) -> Any:
    """`pyarrow.parquet.ParquetFile` that says in our words what is wrong. Reads in pieces, not ahead.

    Raises:
        DataError: no such file, other bytes than `prepare` wrote, no parquet, or more than MAX_COLUMNS columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file\n  fix: ups-rm data prepare SOURCE --out {path.parent}")
    check_file(path, DataError, f"ups-rm data prepare SOURCE --out {path.parent}")
    try:
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise DataError(f"{path}: is not a parquet file: {parquet_problem(error)}") from error
    if file.metadata.num_columns > MAX_COLUMNS:
        file.close()
        raise DataError(f"{path}: has {file.metadata.num_columns} columns, at most {MAX_COLUMNS}: these are no rows")
    return file


def parquet_problem(error: Exception) -> str:
    """What arrow says, shortened: it may quote what it could not read."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
