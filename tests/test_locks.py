"""Two processes that would work in one folder: the second is refused and told who is there; a dead one bars nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ups_rm.cli import app
from ups_rm.errors import RunError
from ups_rm.locks import beside, only_one

HOLD = """
import sys, time
from pathlib import Path
from ups_rm.locks import only_one
with only_one(Path(sys.argv[1]), what="it", fix="nothing"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds a lock file."""
    started: list[subprocess.Popen[str]] = []

    def start(lock_file: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock_file)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lock_names_its_holder_and_ends_with_it(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], end: signal.Signals
) -> None:
    lock_file = tmp_path / "made" / ".lock"
    process = hold(lock_file)
    with pytest.raises(RunError) as refused, only_one(lock_file, what="the folder", fix="use another one"):
        pytest.fail("two hold one lock")
    message = str(refused.value)
    assert f"process {process.pid} on {socket.gethostname()} since 20" in message
    assert message.startswith("the folder: in use by ")
    assert message.endswith("fix: wait until it ends, or use another one")
    process.send_signal(end)
    process.wait()
    with only_one(lock_file, what="the folder", fix=""):
        assert str(os.getpid()) in lock_file.read_text(encoding="utf-8")


def test_a_lock_is_free_again_after_an_error_within(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_one(tmp_path / "lock", what="", fix=""):
            _ = 1 // 0


def test_a_holder_that_is_still_writing_who_it_is(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]]
) -> None:
    hold(tmp_path / "lock")
    (tmp_path / "lock").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="another process"), only_one(tmp_path / "lock", what="", fix=""):
        pytest.fail("two hold one lock")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="can't write there"), only_one(tmp_path / "file" / "lock", what="", fix=""):
        pytest.fail("a lock without a file")


def test_run_and_train_refuse_a_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Path], subprocess.Popen[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    here = hold(tmp_path / "merge" / ".ups_rm.lock")
    process = hold(beside(tmp_path / "runs" / "one"))
    held = sorted(tmp_path.rglob("*"))
    for command, holder in (
        (["run", "--out", "runs/two"], here),
        (["train", "--out", "runs/one", "--rm", "no/rm"], process),
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, RunError)
        assert f"process {holder.pid} on" in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == held, "a refused command made files"
