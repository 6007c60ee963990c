"""The real server process under 64 clients: killed and started again in the middle, and asked to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from talks import talks

from ups_rm.reward.client import HttpScorer
from ups_rm.reward.scorer import RewardScorer

ROUNDING = 2e-5  # of float32 between batches of other composition
CLIENTS, EACH = 64, 6


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def serving(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`ups-rm rm serve`, from when it answers; killed at the end if it still runs."""
    command = [sys.executable, "-m", "ups_rm", "rm", "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if "answers at " in line), None)
            assert line is not None, f"the server ended with exit code {server.wait()}"
            yield server
        finally:
            server.kill()


@pytest.mark.slow
def test_a_killed_and_restarted_server_loses_no_sample(rm_folder):
    """64 clients, replies of mixed length, a queue that is too short for all: 429 and SIGKILL cost only time."""
    work = talks(CLIENTS * EACH, seed=8, longest=90)
    found: dict[int, list] = {}
    problems: list[BaseException] = []
    port = free_port()
    some_are_done, lock = threading.Event(), threading.Lock()

    def client(k: int) -> None:
        try:
            with HttpScorer(f"http://127.0.0.1:{port}", timeout=60, retries=60, max_wait=240) as scorer:
                for i in range(k * EACH, (k + 1) * EACH):
                    scores = scorer.score([work[i]])
                    with lock:
                        found[i] = scores
                    if len(found) > CLIENTS:
                        some_are_done.set()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(CLIENTS)]
    with serving(rm_folder, port, "--max-waiting", "24") as first:
        for thread in threads:
            thread.start()
        assert some_are_done.wait(120)
        first.send_signal(signal.SIGKILL)
        first.wait()
        done_before = len(found)
    with serving(rm_folder, port, "--max-waiting", "24") as second:
        for thread in threads:
            thread.join(240)
        assert not problems
        second.send_signal(signal.SIGTERM)
        said = second.stdout.read() if second.stdout else ""
        assert (second.wait(60), "all accepted requests are answered" in said) == (0, True)
    assert CLIENTS < done_before < len(work), "the server was not killed in the middle"
    assert sorted(found) == list(range(len(work)))
    expected = RewardScorer.load(rm_folder, dtype="float32").score(work)
    assert [found[i][0].logit for i in range(len(work))] == pytest.approx([s.logit for s in expected], abs=ROUNDING)
