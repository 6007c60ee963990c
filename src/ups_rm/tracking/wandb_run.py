"""wandb in the run folder: one run of one id whatever was killed, with every step once.

The id stands in `wandb/run_id.txt` and in every checkpoint. Offline each life of a training writes a folder of its own
under that id. Steps that earlier ones hold are not written again: the resumed run is the same run. Steps that they lost
(wandb's process keeps up to 32 KB in memory and drops them when ours is killed) are taken from metrics.jsonl. Online,
wandb's server says how far it is.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ups_rm.console import warn

HEADER = 7
"""Bytes before the first record of a .wandb file, and before the data of each piece of a record."""
BLOCK = 32768
"""LevelDB's log format, which a .wandb file is: pieces do not cross blocks."""


@dataclass
class WandbRun:
    """wandb's tracker; steps up to `written` are there already."""

    tracker: Any
    written: int

    @property
    def run_id(self) -> str:
        return str(self.tracker.tracker.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > self.written:
            self.tracker.log(values, step=step, commit=True)  # in its file at once, not with the next step

    def catch_up(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the rows of metrics.jsonl that wandb has not."""
        for row in rows:
            self.log({name: value for name, value in row.items() if name not in ("step", "time")}, int(row["step"]))

    def finish(self) -> None:
        self.tracker.finish()


def start_wandb(
    start: Callable[..., Any], folder: Path, experiment_name: str, *, resumes: bool, known_id: str | None
) -> WandbRun:
    """Start wandb in the run folder; no key or no network means offline.

    WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY and the rest of wandb's environment variables work as always.

    Args:
        start: makes accelerate's tracker with these arguments of `wandb.init` and starts it.
        resumes: go on with the run that this folder, or else the checkpoint (`known_id`), names.
    """
    id_file = folder / "wandb" / "run_id.txt"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"name": experiment_name, "dir": str(folder)}
    run_id = known_id
    if id_file.exists():
        run_id = id_file.read_text(encoding="utf-8").strip()
    if resumes and run_id:
        arguments |= {"id": run_id, "resume": "allow"}
    written = last_step(folder / "wandb", run_id) if resumes and run_id else -1
    try:
        tracker = start(**arguments)
    except Exception as error:
        if os.environ.get("WANDB_MODE") == "offline":
            raise
        reason = str(error).splitlines()[0]
        warn(f"wandb can't go online ({reason}); it writes offline now, upload later with:")
        warn(f"  wandb sync {folder}/wandb/offline-run-*")
        tracker = start(**arguments, mode="offline")
    started = WandbRun(tracker, max(written, tracker.tracker.starting_step - 1))
    temporary = id_file.with_name(".run_id.tmp")  # never half an id
    temporary.write_text(f"{started.run_id}\n", encoding="utf-8")
    temporary.replace(id_file)
    return started


def last_step(folder: Path, run_id: str) -> int:
    """The last step that the offline folders of a run hold; -1 for none.

    A file that ends in the middle of a record, as after a power cut, is read up to there, as `wandb sync` does.
    """
    files = folder.glob(f"offline-run-*-{run_id}*/*.wandb")
    return max((step for file in files for step in _steps(file)), default=-1)


def _steps(file: Path) -> Iterator[int]:
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(file.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(data)
        except Exception:  # protobuf's own class moves from release to release; what follows can't be read either
            return
        for item in record.history.item:
            if (item.key or "/".join(item.nested_key)) == "_step":
                yield int(json.loads(item.value_json))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, put together from their pieces: crc (4), length (2), kind (1), then the data."""
    at, pieces = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is too short for a piece
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        piece = data[at + HEADER : at + HEADER + length]
        if len(piece) < length or kind not in (1, 2, 3, 4):  # whole, first, middle, last
            return
        pieces += piece
        at += HEADER + length
        if kind in (1, 4):
            yield pieces
            pieces = b""
