"""A whole exchange has a time limit: servers on a real socket that trickle their answer, or read nothing, hold none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep

import httpx
import pytest
from talks import talks

from ups_rm.errors import RMServerError
from ups_rm.reward import client as client_module
from ups_rm.reward.client import HttpScorer
from ups_rm.reward.deadline import deadline_client, until

LIMIT, BETWEEN = 0.5, 0.05
ENOUGH = 20 * LIMIT
"""A trickle lasts this long: who waits for its end is told by the clock."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@contextmanager
def server(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[tuple[str, list[float]]]:
    """The address of a server that meets each connection with `answer`, and when connections came."""
    over, times = threading.Event(), list[float]()

    def meet(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client has gone
            answer(connection, over)

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            times.append(monotonic())
            threading.Thread(target=meet, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", times
        finally:
            over.set()


def trickle(start: bytes, byte: bytes) -> Callable[[socket.socket, threading.Event], None]:
    """Reads the request, sends `start` and then one byte after the other, each well within any limit of one read."""

    def answer(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(1 << 20)
        connection.sendall(start)
        ends = monotonic() + ENOUGH
        while monotonic() < ends and not over.is_set():
            connection.sendall(byte)
            sleep(BETWEEN)

    return answer


def read_nothing(connection: socket.socket, over: threading.Event) -> None:
    over.wait(ENOUGH)


TRICKLES = {
    "body": trickle(HEAD + b"content-length: 100000\r\n\r\n", b" "),
    "chunks": trickle(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers": trickle(b"HTTP/1.1 200 OK\r\nx-long: ", b"a"),
    "nothing": read_nothing,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE", 0.01)


@pytest.mark.parametrize("kind", TRICKLES)
def test_a_server_that_trickles_is_left_after_the_time_of_an_attempt_and_asked_again(kind):
    with server(TRICKLES[kind]) as (url, times), HttpScorer(url, timeout=LIMIT, retries=1) as scorer:
        begun = monotonic()
        with pytest.raises(RMServerError, match=r"ReadTimeout.*\(2 failed attempts"):
            scorer.score(talks(2))
        assert 2 * LIMIT <= monotonic() - begun < ENOUGH / 2
        assert len(times) == 2


def test_max_wait_cuts_an_attempt_short():
    with server(TRICKLES["body"]) as (url, _), HttpScorer(url, timeout=60, max_wait=LIMIT) as scorer:
        begun = monotonic()
        with pytest.raises(RMServerError, match="ReadTimeout"):
            scorer.score(talks(2))
        assert monotonic() - begun < ENOUGH / 2


def test_a_server_that_takes_no_request_is_left_too():
    with server(read_nothing) as (url, _), deadline_client(4) as client:
        begun = monotonic()
        with pytest.raises(httpx.WriteTimeout), until(begun + LIMIT):
            client.post(url, content=b"x" * 50_000_000)
        assert LIMIT <= monotonic() - begun < ENOUGH / 2


def test_the_limit_is_the_threads_own():
    """One thread's trickle ends by its limit; the other's, over the same client, comes to its end."""

    def short(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(1 << 20)
        connection.sendall(HEAD + b"content-length: 20\r\n\r\n")
        for _ in range(20):
            connection.sendall(b" ")
            sleep(BETWEEN)

    problems: list[BaseException] = []
    with server(short) as (url, _), deadline_client(4) as client:

        def hasty() -> None:
            try:
                with until(monotonic() + 5 * BETWEEN):
                    client.get(url)
            except httpx.ReadTimeout as error:
                problems.append(error)

        thread = threading.Thread(target=hasty)
        thread.start()
        assert client.get(url).content == b" " * 20
        thread.join()
    assert len(problems) == 1
