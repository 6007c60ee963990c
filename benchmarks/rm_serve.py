"""`ups-rm rm serve` under 64 clients against the same scorer called in one process.

The server runs in a process of its own, the clients are threads of another; each sends one conversation per request and
the next one when it has its answer. The peer scores the same conversations in one call, sorted as it likes. Both run on
the same cores, one after the other and in turns, because the machine's speed drifts; so what is measured is what HTTP,
the queue and smaller batches cost. Two RMs: a tiny one, where HTTP is most of the work, and SmolLM2-135M with a random
head, the smallest that anyone would train with. What the server answered is counted by its own metrics. At the end the
server is killed in the middle of a run and another one started at its address: what clients then lack is counted.
"""

from __future__ import annotations

import math
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.result import Result, versions
from ups_rm.reward.client import HttpScorer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.types import Conversation

CLIENTS = 64
TEXT = "the a one of in to bread water garden piano because never always please explain slowly safe lock"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Load:
    """What the clients saw: seconds from first request to last answer, and seconds of each request."""

    seconds: float
    latencies: list[float]
    logits: list[float]


def conversations(n: int, longest: int, seed: int = 0) -> list[Conversation]:
    """Prompts of up to 30 words, replies from empty to `longest` words."""
    draw = random.Random(seed)

    def words(k: int) -> str:
        return " ".join(draw.choices(WORDS, k=k))

    return [
        [
            {"role": "user", "content": words(draw.randint(1, 30))},
            {"role": "assistant", "content": words(draw.randint(0, longest))},
        ]
        for _ in range(n)
    ]


@contextmanager
def serving(folder: Path, *options: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of `ups-rm rm serve FOLDER`; asked to end at the end."""
    command = [sys.executable, "-m", "ups_rm", "rm", "serve", str(folder), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = next((line for line in server.stdout if "answers at " in line), None)
            if line is None:
                raise RuntimeError(f"the server ended with exit code {server.wait()}")
            yield line.partition("answers at ")[2].split()[0], server
        finally:
            server.send_signal(signal.SIGTERM)


def load(
    url: str, work: Sequence[Conversation], clients: int = CLIENTS, *, half: threading.Event | None = None
) -> Load:
    """Send every conversation once, `clients` at a time; `half` is set when half of them are answered. One that is
    never answered has the logit NaN."""
    logits, latencies = [math.nan] * len(work), [0.0] * len(work)
    todo, lock = iter(range(len(work))), threading.Lock()

    def client() -> None:
        with HttpScorer(url) as scorer:
            while True:
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                begun = perf_counter()
                logits[i] = scorer.score([work[i]])[0].logit
                latencies[i] = perf_counter() - begun
                if half is not None and 2 * sum(map(bool, latencies)) >= len(work):
                    half.set()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(perf_counter() - begun, latencies, logits)


def measure(name: str, folder: Path, work: list[Conversation], required: float | None, pairs: int) -> list[Result]:
    """Throughput against the in-process scorer, and the latencies of the last round."""
    scorer = RewardScorer.load(folder)
    expected = scorer.score(work)
    tokens = sum(score.tokens for score in expected)
    ours, peer = [], []
    with serving(folder) as (url, _):
        load(url, work[:CLIENTS])  # warm
        for _ in range(pairs):
            begun = perf_counter()
            scorer.score(work)
            peer.append(tokens / (perf_counter() - begun))
            found = load(url, work)
            ours.append(tokens / found.seconds)
        answers = statuses(url)
    bad = sum(count for status, count in answers.items() if status not in (200, 429))
    worst = max(abs(a - b.logit) for a, b in zip(found.logits, expected, strict=True))
    used = versions("torch", "transformers", "fastapi", "uvicorn", "httpx")
    ordered = sorted(found.latencies)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    what = f"{name} in {str(scorer.dtype).removeprefix('torch.')}, {CLIENTS} clients"
    return [
        Result(
            f"rm serve throughput, {what}",
            statistics.median(ours),
            statistics.median(peer),
            "tokens/s",
            "RewardScorer in process",
            versions=used,
            required=required,
        ),
        Result(f"rm serve latency p50, {what}", p50, None, "s", versions=used),
        Result(f"rm serve latency p99, {what}", p99, None, "s", versions=used),
        Result(
            f"rm serve answers 429, {what}", answers.get(429, 0), None, f"of {sum(answers.values())}", versions=used
        ),
        Result(f"rm serve answers other than 200 and 429, {what}", bad, None, "answers", versions=used),
        Result(f"rm serve largest difference of a logit, {what}", worst, None, "logit", versions=used),
    ]


def statuses(url: str) -> dict[int, int]:
    """How often the server gave each HTTP status to /score, by its own count."""
    import httpx

    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found: dict[int, int] = {}
    for line in re.findall(r"^ups_rm_requests_total\{.*", text, re.MULTILINE):
        if "/score" in line:
            status = int(re.search(r'status="(\d+)"', line)[1])  # type: ignore[index]
            found[status] = found.get(status, 0) + int(float(line.rsplit(" ", 1)[1]))
    return found


def measure_kill(name: str, folder: Path, work: list[Conversation]) -> list[Result]:
    """SIGKILL when half is answered, another server at the same address; answers that never came or are wrong."""
    expected = [score.logit for score in RewardScorer.load(folder).score(work)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    half, found = threading.Event(), list[Load]()
    with serving(folder, port=port) as (url, first):
        clients = threading.Thread(target=lambda: found.append(load(url, work, half=half)))
        clients.start()
        half.wait()
        first.kill()
        first.wait()
    with serving(folder, port=port):
        clients.join()
    (one,) = found
    lost = sum(math.isnan(logit) for logit in one.logits)
    wrong = sum(abs(a - b) > 0.1 for a, b in zip(one.logits, expected, strict=True))
    what, used = f"{name}, {CLIENTS} clients, killed at half of {len(work)}", versions("fastapi", "uvicorn", "httpx")
    return [
        Result(f"rm serve samples lost, {what}", lost, None, "samples", versions=used),
        Result(f"rm serve logits that are wrong by more than 0.1, {what}", wrong, None, "samples", versions=used),
        Result(f"rm serve longest wait over the restart, {what}", max(one.latencies), None, "s", versions=used),
    ]


def run(pairs: int = 3) -> list[Result]:
    """The tiny RM and the one of SmolLM2-135M."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import tiny_head, tiny_rm
    from ups_rm.models import fetch
    from ups_rm.reward.merge import merge

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        merge(fetch(), tiny_head(home / "head", hidden_size=576, hidden_dims=(64, 16)), home / "SmolLM2-135M")
        results = measure("SmolLM2-135M", home / "SmolLM2-135M", conversations(96, 80), 0.9, pairs)
        results += measure("tiny RM of 2 layers", tiny_rm(home / "tiny"), conversations(512, 80), None, pairs)
        return results + measure_kill("tiny RM of 2 layers", home / "tiny", conversations(512, 80))
