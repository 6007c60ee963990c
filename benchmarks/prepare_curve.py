"""`ups-rm data prepare` over the number of rows, 10^4 to 10^7, with a picture: time is linear, memory bounded.

The rows are those of prepare.py; above ROWS of them the source holds as many links to one file as are needed, each a
subset of its own, so prompts repeat. Of disk, the largest needs about 5 GB beside the rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks.prepare import ROWS, Cost, measure, write_rows
from benchmarks.result import Result, versions

COUNTS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
MEMORY_LIMIT = 400.0
PICTURE = Path("docs/images/prepare.png")


def point(count: int, folder: Path, rows: Path) -> Cost:
    """Ours on `count` rows: a share of the file, or as many links to it as are needed."""
    data = folder / f"curve{count}" / "data"
    for number in range(count // ROWS):
        (data / f"part{number:03d}").mkdir(parents=True)
        (data / f"part{number:03d}" / "train.jsonl").symlink_to(rows)
    if count < ROWS:
        (data / "part").mkdir(parents=True)
        with rows.open("rb") as file, (data / "part" / "train.jsonl").open("wb") as some:
            some.writelines(islice(file, count))
    return measure("ours", data.parent)


def draw(points: Sequence[tuple[int, Cost]], path: Path) -> None:
    """CPU seconds and memory over rows, both axes of seconds logarithmic: a line of slope 1 is linear time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, memory = figure.subplots(1, 2)
    rows = [count for count, _ in points]
    seconds.loglog(rows, [cost.cpu_seconds for _, cost in points], "o-", label="measured")
    largest, cost = points[-1]
    seconds.loglog(rows, [cost.cpu_seconds * count / largest for count in rows], ":", label="linear")
    memory.semilogx(rows, [cost.megabytes for _, cost in points], "o-")
    memory.axhline(MEMORY_LIMIT, linestyle=":")
    memory.set_ylim(bottom=0)
    for axes, what in ((seconds, "CPU seconds"), (memory, "highest resident memory, MB")):
        axes.set_xlabel("rows of 3 KB")
        axes.set_title(what)
    seconds.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(pairs: int, counts: Sequence[int] = COUNTS, picture: Path = PICTURE) -> list[Result]:
    """One run for each number of rows, whatever `pairs` says, after one of warm-up."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "rows.jsonl"
        write_rows(file, ROWS)
        measure("ours", file)
        points = [(count, point(count, folder, file)) for count in counts]
    draw(points, picture)
    used = versions("pyarrow", "orjson")
    return [
        Result(f"prepare, {count:,} rows, {title}", value, None, unit, versions=used)
        for count, cost in points
        for title, value, unit in (
            ("wall time", cost.seconds, "s"),
            ("CPU time", cost.cpu_seconds, "CPU s"),
            ("highest memory", cost.megabytes, "MB"),
        )
    ]
