"""Runs one parser on many bad inputs, in a process of its own: a crash of an extension or a hang ends only that.

    python -m fuzz.runner PARSER FIRST LAST [SEED]     from tests/; prints one line of JSON

Case n of a seed is always the same input: `python -m fuzz.runner rows 123 124` shows what case 123 was. A case may
take CASE_SECONDS and the whole EXTRA_MEMORY; both are enforced. An error that is none of ours is a defect; where it
came from says whether it is a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

CASE_SECONDS = 60
EXTRA_MEMORY = 2 * 2**30
"""Address space beyond what the process has when it starts."""
PER_PROCESS = 25_000
"""Cases that are worth a second process."""
TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Tally:
    """What became of the cases: outcomes by name, defects by place with the first case of each."""

    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[str, str] = field(default_factory=dict)
    peak_mb: float = 0.0
    """Of memory, above what the process had before its first case."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.cases + other.cases,
            max(self.seconds, other.seconds),
            self.outcomes + other.outcomes,
            self.defects | other.defects,
            max(self.peak_mb, other.peak_mb),
        )


def fuzz(parser: str, cases: int, seed: int = 0) -> Tally:
    """`cases` inputs of one parser, in one process or, if there are many, in one per core."""
    workers = max(1, min(len(os.sched_getaffinity(0)), cases // PER_PROCESS))
    edges = [cases * i // workers for i in range(workers + 1)]
    command = [sys.executable, "-m", "fuzz.runner", parser]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    with contextlib.ExitStack() as stack:
        started = []
        for first, last in pairwise(edges):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            line = [*command, str(first), str(last), str(seed)]
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True, cwd=TESTS, env=environment)
            started.append((process, log, line))
        total = Tally()
        for process, log, line in started:
            said, _ = process.communicate()
            if process.returncode:
                log.seek(0)
                end = log.read()[-4000:]
                total.defects[f"process {process.returncode}"] = f"{' '.join(line[1:])} ended with it:\n{end}"
                continue
            told = json.loads(said.splitlines()[-1])
            total += Tally(**{**told, "outcomes": Counter(told["outcomes"])})
    return total


def run(parser: str, first: int, last: int, seed: int, *, limited: bool = False) -> Tally:
    """Cases first to last - 1 in this process; `limited` also takes memory from it, for good."""
    from fuzz.parsers import PARSERS

    tally = Tally()
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would take longer than the parsers
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory) as folder:
        target = PARSERS[parser](Path(folder))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if limited:
            _limit_memory()
        start = perf_counter()
        for number in range(first, last):
            if number % 100 == 0:
                print(f"\rcase {number}", end="", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    outcome = target.case(random.Random(f"{seed} {number}"))
            except Exception as error:
                outcome = "defect"
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
                text = "".join(traceback.format_exception(error))[-3000:]
                tally.defects.setdefault(place, f"case {number} of seed {seed}: {text}")
            tally.outcomes[outcome] += 1
            if last - first == 1:
                print(f"{outcome}: {target.shown()}", file=sys.stderr)
        faulthandler.cancel_dump_traceback_later()
        tally.cases, tally.seconds = last - first, perf_counter() - start
        tally.peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 1024
        target.close()
    return tally


def _limit_memory() -> None:
    """A case that asks for very much more gets a MemoryError (Linux; elsewhere there is no limit)."""
    status = Path("/proc/self/status")
    if status.is_file():
        now = int(status.read_text().split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_MEMORY, resource.RLIM_INFINITY))


def main(arguments: list[str]) -> Any:
    parser, first, last, *seed = arguments
    warnings.simplefilter("ignore")
    tally = run(parser, int(first), int(last), int(seed[0]) if seed else 0, limited=True)
    print(json.dumps(vars(tally)))


if __name__ == "__main__":
    main(sys.argv[1:])
