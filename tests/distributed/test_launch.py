"""Whatever ends a run, nothing of it is left: stand-ins for verl that spawn, hang, fail and print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from ups_rm.distributed.launch import VerlProcess, marked_processes
from ups_rm.errors import RMError, RunError

psutil = pytest.importorskip("psutil")

DETACHED = """
import subprocess, sys
# a child in a session of its own, as Ray's workers are, that ignores all but SIGKILL
stubborn = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True, stdout=subprocess.DEVNULL)
"""


def run(folder: Path, code: str, **limits: float) -> tuple[VerlProcess, list[tuple[int, dict[str, float]]]]:
    seen: list[tuple[int, dict[str, float]]] = []
    process = VerlProcess(
        command=[sys.executable, "-u", "-c", code],
        env=os.environ | {"METRICS": str(folder / "metrics.jsonl")},
        log=folder / "console.log",
        metrics_file=folder / "metrics.jsonl",
        on_metrics=lambda metrics, step: seen.append((step, metrics)),
        grace=1.0,
        **limits,
    )
    return process, seen


def test_metrics_are_handed_on_line_by_line_and_output_is_kept(tmp_path: Path) -> None:
    rows = [{"step": step, "data": {"critic/score/mean": step / 2, "note": "text"}} for step in (1, 2)]
    code = f"""
import os, time
with open(os.environ["METRICS"], "w") as file:
    for line in {[json.dumps(row) for row in rows]!r}:
        file.write(line[:10]); file.flush(); time.sleep(0.5)  # a line that is not whole yet
        file.write(line[10:] + chr(10)); file.flush()
print("hello from verl")
"""
    process, seen = run(tmp_path, code)
    assert process.run()
    assert seen == [(1, {"critic/score/mean": 0.5}), (2, {"critic/score/mean": 1.0})]
    assert (tmp_path / "console.log").read_text() == "hello from verl\n"


@pytest.mark.parametrize("ending", ["success", "error", "time limit", "silence", "Ctrl-C"])
def test_nothing_is_left_behind(tmp_path: Path, ending: str) -> None:
    waits = "print('ready'); import time; time.sleep(600)"
    last = {"success": "", "error": "raise ValueError('broken')"}.get(ending, waits)
    limits = {"time limit": {"time_limit": 3.0}, "silence": {"silence_limit": 2.0}}.get(ending, {})
    process, _ = run(tmp_path, DETACHED + last, **limits)
    children_seen = False

    def stop() -> bool:
        nonlocal children_seen
        children_seen = children_seen or len(marked_processes(process.mark)) >= 2
        return ending == "Ctrl-C" and children_seen

    started = monotonic()
    if ending == "success":
        assert process.run(stop)
    elif ending == "Ctrl-C":
        assert not process.run(stop)
        assert children_seen
    else:
        expected = {"error": "ValueError: broken", "time limit": "verl.time_limit=3 s", "silence": "seems to hang"}
        with pytest.raises(RunError, match=expected[ending]):
            process.run(stop)
    assert monotonic() - started < 60
    assert marked_processes(process.mark) == []


def test_processes_of_others_are_not_touched(tmp_path: Path) -> None:
    other, _ = run(tmp_path / "other", "import time; time.sleep(600)")
    mine, _ = run(tmp_path / "mine", "print(1)")
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=lambda: other.run(stop.is_set))
    thread.start()
    try:
        while not marked_processes(other.mark):
            sleep(0.1)
        mine.run()
        assert len(marked_processes(other.mark)) == 1
    finally:
        stop.set()
        thread.join(timeout=60)
    assert marked_processes(other.mark) == []


def test_the_failure_named_is_verls_last_error(tmp_path: Path) -> None:
    code = r"""
print("KeyError: 'first'")
print("\x1b[36m(TaskRunner pid=12)\x1b[0m ValueError: the batch size is odd")
print("goodbye")
raise SystemExit(3)
"""
    process, _ = run(tmp_path, code)
    with pytest.raises(RunError) as error:
        process.run()
    assert "verl ended with exit code 3: ValueError: the batch size is odd" in str(error.value)
    assert f"see {tmp_path / 'console.log'}" in str(error.value)


def test_an_error_of_ours_keeps_its_class_and_way_out(tmp_path: Path) -> None:
    code = r"""
print("(SafetyRewardManager pid=7, ip=10.0.0.1) ups_rm.errors.RMError: the RM's logit is nan for conversation 3")
print("(SafetyRewardManager pid=7, ip=10.0.0.1)   fix: dtype float32")
print("RuntimeError: no materializable trajectories")
raise SystemExit(1)
"""
    process, _ = run(tmp_path, code)
    with pytest.raises(RMError) as error:
        process.run()
    assert str(error.value).startswith("the RM's logit is nan for conversation 3\n  fix: dtype float32")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_verl_ends_with_a_command_that_is_killed_outright(tmp_path: Path) -> None:
    """Nothing of ours can clean up then: the kernel ends verl's driver, and Ray's processes end with theirs."""
    verl = "import ups_rm.distributed.process, time; print('ready', flush=True); time.sleep(600)"
    launcher = f"""
import os, sys
from pathlib import Path
from ups_rm.distributed.launch import VerlProcess
folder = Path({str(tmp_path)!r})
command = [sys.executable, "-c", {verl!r}]
VerlProcess(command, dict(os.environ), folder / "log", folder / "metrics", print, mark="m").run()
"""
    command = subprocess.Popen([sys.executable, "-c", launcher])
    try:
        deadline = monotonic() + 60
        while not ((tmp_path / "log").is_file() and "ready" in (tmp_path / "log").read_text()):
            assert command.poll() is None
            assert monotonic() < deadline
            sleep(0.1)
        left = [process for process in marked_processes("m") if process.pid != command.pid]
        assert len(left) == 1
    finally:
        command.kill()
        command.wait()
    psutil.wait_procs(left, timeout=20)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left)
