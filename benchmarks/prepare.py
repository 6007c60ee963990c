"""`ups-rm data prepare` against the plain way and `datasets.map`: time and memory. Over the rows: prepare_curve.py.

Rows of about 3 KB in PKU-SafeRLHF's full schema, made up on the spot. The plain way: json, a list of dicts, pandas
`to_parquet`. `datasets`: its json loader, `map`, `to_parquet`, with an empty cache. Both peers write the same columns
and check nothing; ours also checks every field, recomputes two sha256 a row and counts the statistics. Each side runs
in a process of its own; seconds are from the first byte read to the last byte written, imports left out (of our
helpers, which are started within, they are not); CPU seconds and memory are those of the process and of its children.
The floor: every line parsed by orjson and nothing else, its CPU seconds shared out over the cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from benchmarks.result import Result, versions
from ups_rm.data.schema import ABILITY, DATA_SOURCE, HARM_CATEGORIES

ROWS = 100_000
FIELDS = (("seconds", "s", "wall time"), ("cpu_seconds", "CPU s", "CPU time"), ("megabytes", "MB", "highest memory"))
REQUIRED = {"plain": 3.0, "datasets": 6.0}
PEER_NAMES = {"plain": "json, list of dicts, pandas to_parquet", "datasets": "datasets.map"}
WORDS = ("garden", "water", "piano", "bread", "never", "explain", "slowly", "coffee", "letters", "lock", "a", "of")


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds of the work, CPU seconds of it with its children's, highest resident memory in MB."""

    seconds: float
    cpu_seconds: float
    megabytes: float


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """`count` rows of about 3 KB, one prompt in three repeated, labels at random, one text in ten with curly quotes."""
    draw = random.Random(seed)
    text = " ".join(draw.choices(WORDS, k=20_000))

    def words(characters: int) -> str:
        start = draw.randrange(len(text) - characters)
        found = text[start : start + characters]
        return found if draw.random() < 0.9 else f"“{found[2:]}”"

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 3 != 2:
                prompt = f"{number} {words(200)}"
            row: dict[str, Any] = {"prompt": prompt, "response_0": words(550), "response_1": words(550)}
            row |= {"prompt_source": "made up", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B"}
            safe = [draw.random() < 0.5 for _ in range(2)]
            row |= {f"is_response_{i}_safe": safe[i] for i in (0, 1)}
            for i in (0, 1):
                row[f"response_{i}_harm_category"] = {
                    name: not safe[i] and draw.random() < 0.1 for name in HARM_CATEGORIES
                }
            row |= {f"response_{i}_severity_level": 0 if safe[i] else draw.randint(1, 3) for i in (0, 1)}
            row |= {"better_response_id": draw.randint(0, 1), "safer_response_id": draw.randint(0, 1)}
            for i in (0, 1):
                row[f"response_{i}_sha256"] = hashlib.sha256((prompt + row[f"response_{i}"]).encode()).hexdigest()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def verl_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """A row as both peers write it: the columns of the preprocessing script that verl's users know."""
    labels = ("is_response_0_safe", "is_response_1_safe", "safer_response_id", "better_response_id")
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "ability": ABILITY,
        "reward_model": {"style": "model", "ground_truth": None},
        "extra_info": {"split": "train", "index": index, **{name: row[name] for name in labels}},
    }


def clocks() -> tuple[float, float]:
    """Wall time, and CPU time of this process and of the children that ended, in seconds."""
    used = os.times()
    return perf_counter(), used.user + used.system + used.children_user + used.children_system


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds and CPU seconds from `start` to now."""
    seconds, cpu_seconds = clocks()
    return seconds - start[0], cpu_seconds - start[1]


def ours(source: Path, out: Path) -> tuple[float, float]:
    import pyarrow.parquet  # noqa: F401

    from ups_rm.data.prepare import prepare

    start = clocks()
    prepare(source, out)
    return since(start)


def plain(source: Path, out: Path) -> tuple[float, float]:
    import pandas as pd
    import pyarrow.parquet  # noqa: F401

    start = clocks()
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    records = [verl_row(row, index) for index, row in enumerate(rows)]
    cut = int(len(records) * 0.9)
    pd.DataFrame(records[:cut]).to_parquet(out / "train.parquet")
    pd.DataFrame(records[cut:]).to_parquet(out / "val.parquet")
    return since(start)


def datasets_map(source: Path, out: Path) -> tuple[float, float]:
    import datasets

    datasets.disable_progress_bars()
    start = clocks()
    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(out / "cache"))
    rows = rows.map(verl_row, with_indices=True, remove_columns=rows.column_names)
    cut = int(len(rows) * 0.9)
    rows.select(range(cut)).to_parquet(out / "train.parquet")
    rows.select(range(cut, len(rows))).to_parquet(out / "val.parquet")
    return since(start)


def parse(source: Path, _: Path) -> tuple[float, float]:
    import orjson

    start = clocks()
    with source.open("rb") as file:
        for line in file:
            orjson.loads(line)
    return since(start)


WAYS = {"ours": ours, "plain": plain, "datasets": datasets_map}
FLOOR = {"parse": parse}


def measure(way: str, source: Path) -> Cost:
    """One way in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.prepare", way, str(source), out]
        peaks: dict[str, float] = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while process.poll() is None:
                peaks |= peak_memory(process.pid)
                sleep(0.1)
            answer = process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    seconds, cpu_seconds = map(float, answer.split()[-2:])
    return Cost(seconds, cpu_seconds, sum(peaks.values()))


def peak_memory(pid: int) -> dict[str, float]:
    """Highest resident memory so far, in MB, of a process and its children (Linux)."""
    folder = Path("/proc") / str(pid)
    found = {}
    try:
        for one in (str(pid), *(folder / "task" / str(pid) / "children").read_text().split()):
            status = (folder.parent / one / "status").read_text()
            found[one] = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass  # it ended meanwhile: what was seen before stands
    return found


def run(pairs: int, rows: int = ROWS) -> list[Result]:
    """All in turn `pairs` times after one warm-up each."""
    ways = WAYS | FLOOR
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows)
        for _ in range(pairs + 1):
            for way in ways:
                costs[way].append(measure(way, file))

    def middle(way: str, field: str) -> float:
        return statistics.median(getattr(cost, field) for cost in costs[way][1:])

    parsing = middle("parse", "cpu_seconds")
    floors = {"cpu_seconds": parsing, "seconds": parsing / len(os.sched_getaffinity(0))}
    used = versions("pyarrow", "orjson", "pandas", "datasets")
    return [
        Result(f"prepare, {rows:,} rows of 3 KB, {title}", middle("ours", field), middle(peer, field), unit,
               PEER_NAMES[peer], floors.get(field), used, required=REQUIRED[peer] if field == "seconds" else None)
        for field, unit, title in FIELDS
        for peer in PEER_NAMES
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """What `measure` starts: one way, its seconds and CPU seconds on the last line."""
    way, source, out = arguments
    print(*(WAYS | FLOOR)[way](Path(source), Path(out)))


if __name__ == "__main__":
    main(sys.argv[1:])
