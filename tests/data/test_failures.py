"""Old files stay whole when the disk fills up, the process is killed, or two want to write; memory stays flat."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from ups_rm.data import prepare as module
from ups_rm.data.digest import KeptRows
from ups_rm.data.files import publish, staging
from ups_rm.data.prepare import prepare
from ups_rm.data.spool import Spool
from ups_rm.errors import RunError

from .conftest import make_row, write_jsonl

FILES = ("train.parquet", "val.parquet", "rejected.jsonl", "report.json")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """As `files_in`, and nothing else may be there."""
    assert all(path.is_file() for path in folder.iterdir())
    return files_in(folder)


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """Runs code in a new process; PEAK_KIB in it becomes its peak RSS (getrusage's would be the parent's)."""
    peak = "next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))"
    command = [sys.executable, "-c", textwrap.dedent(code).replace("PEAK_KIB", peak), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder with the results of an earlier run."""
    prepare("sample", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kib", [2, 20, 60])  # full while spooling, while writing train, ...
def test_a_disk_that_fills_up_leaves_the_old_files(tmp_path: Path, prepared: Path, kib: int) -> None:
    rows = [make_row(n, prompt=f"{n} " + os.urandom(60).hex()) for n in range(1200)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    before = contents(prepared)
    code = """
        import resource, signal, sys
        from ups_rm.data.prepare import prepare
        from ups_rm.errors import RunError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]) * 1024,) * 2)
        try:
            prepare(sys.argv[1], sys.argv[2])
        except RunError as error:
            print(error)
            sys.exit(7)
    """
    process = python(code, source, prepared, kib)
    printed, problems = process.communicate(timeout=60)
    assert process.returncode == 7, problems
    assert "file size limit hit" in printed
    assert "nothing was replaced" in printed
    assert contents(prepared) == before


@pytest.mark.parametrize("place", ["_write", "publish"])
def test_no_space_at_any_stage_leaves_the_old_files(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(prepared)
    monkeypatch.setattr(module, place, full)
    with pytest.raises(RunError, match=r"no space left on the disk \(\d+ MiB free\); nothing was replaced"):
        prepare("sample", prepared, shuffle=True)
    assert contents(prepared) == before


def test_other_write_errors_are_not_called_a_full_disk(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "_write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        prepare("sample", prepared)


@pytest.mark.parametrize("stage", ["_read", "_write"])
def test_a_killed_process_leaves_the_old_files_and_the_next_run_sweeps_up(
    tmp_path: Path, prepared: Path, stage: str
) -> None:
    before = contents(prepared)
    code = """
        import sys, time
        from ups_rm.data import prepare as module
        stage, seen = getattr(module, sys.argv[2]), []
        def stopping(*args):
            result = stage(*args)
            print("there", flush=True)
            time.sleep(60)
            return result
        setattr(module, sys.argv[2], stopping)
        module.prepare("sample", sys.argv[1], shuffle=True)
    """
    process = python(code, prepared, stage)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    left = [path for path in prepared.iterdir() if path.name.startswith(".prepare-")]
    assert len(left) == 1
    assert files_in(prepared) == before
    prepare("sample", prepared)
    assert {path.name for path in prepared.iterdir()} == {*FILES, *(f".{name}.manifest.json" for name in FILES)}
    assert contents(prepared) == before


def test_an_interrupted_run_sweeps_up_after_itself(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    before = contents(prepared)
    monkeypatch.setattr(module, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("sample", prepared)
    assert contents(prepared) == before


def test_two_processes_do_not_write_to_one_folder(prepared: Path) -> None:
    before = contents(prepared)
    with staging(prepared), pytest.raises(RunError, match="another process is writing to this folder"):
        prepare("sample", prepared, shuffle=True)
    assert contents(prepared) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"file/out: can't write there"):
        prepare("sample", tmp_path / "file" / "out")


def test_publish_replaces_in_order(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    for name in ("a", "b"):
        (tmp_path / "stage" / name).write_text(f"new {name}")
        (tmp_path / name).write_text("old")
    publish(tmp_path / "stage", tmp_path, ["a", "b"])
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["new a", "new b"]
    assert not list((tmp_path / "stage").iterdir())


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """40,000 further rows of 4 kB (160 MB of text) may cost at most 25 MB: some 100 bytes a row and some slack."""
    filler = "x" * 2000
    peaks = []
    for count in (5_000, 45_000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            for n in range(count):
                file.write(f'{{"prompt": "prompt {n % (count // 2)} {filler[:100]}", "response_0": "{n} {filler}", ')
                file.write(f'"response_1": "other {n} {filler}", "is_response_0_safe": true}}\n')
        code = """
            import sys
            from ups_rm.data.prepare import prepare
            report = prepare(sys.argv[1], sys.argv[2], shuffle=True, dedup="prompt", group_split=True)
            assert report.stats.distinct_prompts["train"] == report.train_rows + report.val_rows
            print(PEAK_KIB)
        """
        process = python(code, source, tmp_path / f"out{count}")
        printed, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
        peaks.append(int(printed) / 1024)
    assert peaks[1] - peaks[0] < 25
    assert peaks[1] < 400


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says which pages of a file are held")
@pytest.mark.parametrize("shuffle", [False, True])
def test_pages_of_the_spool_are_given_back_while_it_is_read(tmp_path: Path, shuffle: bool) -> None:
    """Of a million rows, 20 MB of places, labels, kinds and harms, a batch's are held at a time."""
    count, step = 1_000_000, 100_000
    spool = Spool(tmp_path / "train.spool")
    for first in range(0, count, step):
        labels = np.arange(first, first + step, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
        texts = b"".join(b"%06d" % n for n in range(first, first + step))
        none = np.full(step, -1, dtype=np.int32)
        sizes, hashes = np.full(step, 6, dtype=np.int64), np.zeros(step, dtype=np.uint64)
        spool.append(KeptRows(texts, sizes, labels, none, hashes, (), none))
    numbers = np.arange(count, dtype=np.uint32)
    if shuffle:  # near each other in a batch, as more pages than a batch's rows can be held in any case
        numbers = np.random.default_rng(0).permutation(numbers.reshape(-1, 1000)).reshape(-1)
    seen, held = 0, 0
    for batch in spool.batches(numbers, rows=2000, size=1_000_000):
        wanted = numbers[seen : seen + len(batch)]
        assert np.array_equal(batch.labels.copy().view(np.uint32).ravel(), wanted)
        assert batch.texts == b"".join(b"%06d" % n for n in wanted)
        seen += len(batch)
        held = max(held, held_of(tmp_path) if seen % 50_000 == 0 else 0)
    assert seen == count
    assert 0 < held < 8_000  # faults bring in neighbours
    spool.close()


def held_of(folder: Path) -> int:
    """kB of files in the folder that are mapped and in memory."""
    counts, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            within = str(folder) in line
        elif within and line.startswith("Rss:"):
            counts += int(line.split()[1])
    return counts


def test_a_big_file_of_bad_rows_stays_flat_too(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"{" * 40_000_000 + b"\n" + b"not json\n" * 50_000)
    code = """
        import sys
        from ups_rm.data.prepare import prepare
        from ups_rm.errors import DataError
        try:
            prepare(sys.argv[1], sys.argv[2])
        except DataError as error:
            print(PEAK_KIB, error)
    """
    start = time.perf_counter()
    printed, problems = python(code, source, tmp_path / "out").communicate(timeout=120)
    assert "50001 of 50001 rows rejected" in printed, problems
    assert int(printed.split()[0]) / 1024 < 200
    assert time.perf_counter() - start < 60
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 50_001
