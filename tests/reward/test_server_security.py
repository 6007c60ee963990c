"""Hostile and broken clients over real sockets on loopback: each gets an error or nothing, the server serves on."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Iterator
from time import monotonic, sleep

import httpx
import pytest
from talks import talks

from ups_rm.errors import RMServerError
from ups_rm.reward.client import HttpScorer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import Limits, RewardServer, listen
from ups_rm.reward.server_guard import is_loopback, read_token

TOKEN = "correct-horse-battery-staple"
LIMITS = Limits(max_body_bytes=20_000, head_seconds=1.0, body_seconds=0.5, max_connections=12)


@pytest.fixture(scope="module")
def server(rm_folder) -> Iterator[RewardServer]:
    scorer = RewardScorer.load(rm_folder, dtype="float32")
    with RewardServer([scorer], name="rm", token=TOKEN, limits=LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serves(server) -> Iterator[None]:
    """Whatever a test did, an honest client gets its score afterwards, and nothing waits in the queue."""
    yield
    with HttpScorer(server.url, token=TOKEN) as client:
        assert len(client.score(talks(2))) == 2
    assert server.queue.waiting == 0


def connect(server: RewardServer) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(path: str = "/score", *lines: str, token: str | None = TOKEN) -> bytes:
    own = [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: rm", *own, *lines, "", ""]).encode("latin-1")


def read(connection: socket.socket) -> tuple[int, bytes]:
    """(status, head and body) of one answer; 0 for a connection that was closed without one."""
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
        return answer.status, str(answer.headers).encode() + answer.read()
    except (ConnectionError, http.client.BadStatusLine):
        return 0, b""


def send(server: RewardServer, data: bytes) -> tuple[int, bytes]:
    with connect(server) as connection:
        connection.sendall(data)
        return read(connection)


def post(server: RewardServer, body: bytes, path: str = "/score", token: str | None = TOKEN) -> tuple[int, bytes]:
    return send(server, head(path, f"Content-Length: {len(body)}", token=token) + body)


GOOD = json.dumps({"conversations": talks(1)}).encode()


@pytest.mark.parametrize(
    "token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\xff\xfe"], ids=lambda token: repr(token)
)
def test_without_the_token_nothing_but_health_answers(server, token):
    for path in ("/score", "/get_reward", "/classify", "/metrics", "/openapi.json", "/nothing"):
        status, came = post(server, GOOD, path, token)
        assert status == 401
        assert b"www-authenticate: bearer" in came.lower()
        assert TOKEN.encode() not in came


def test_health_needs_no_token_and_says_nothing_else(server):
    assert httpx.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "line",
    [
        f"Authorization: Bearer {TOKEN}",
        f"authorization: bearer {TOKEN}",
        f"X-Api-Key: {TOKEN}",
        "Authorization: Basic " + base64.b64encode(f":{TOKEN}".encode()).decode(),
        "Authorization: Basic " + base64.b64encode(f"openrlhf:{TOKEN}".encode()).decode(),
    ],
)
def test_the_token_may_come_in_the_ways_that_clients_have(server, line):
    assert send(server, head("/score", line, f"Content-Length: {len(GOOD)}", token=None) + GOOD)[0] == 200


@pytest.mark.parametrize("value", ["Basic", "Basic !!!", "Basic " + "A" * 100, "Bearer", TOKEN, f"Digest {TOKEN}"])
def test_a_malformed_header_is_no_token(server, value):
    lines = (f"Authorization: {value}", f"Content-Length: {len(GOOD)}")
    assert send(server, head("/score", *lines, token=None) + GOOD)[0] == 401


def test_a_client_library_may_carry_the_token_in_the_address(server):
    """So OpenRLHF's client, which sends no header of its own, can be given one."""
    url = server.url.replace("http://", f"http://:{TOKEN}@")
    assert httpx.post(f"{url}/score", content=GOOD, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b'{"conversations": [[{"role": "user", "content": "\\ud800"}]]}', 400),
        (b"[" * 15_000, 400),
        (b'{"a":' * 3_000, 400),
        (b'{"conversations": ' + b"[" * 15_000 + b"]" * 1_000, 400),
        (b"[]", 422),
        (b"1e400", 422),
        (b"{}", 422),
        (b'{"conversations": [[]]}', 422),
        (b'{"conversations": [[{"role": "user", "content": "Hi"}]]}', 422),
        (b'{"conversations": [[{"role": "assistant", "content": 5}]]}', 422),
        (b'{"conversations": [[{"role": "assistant", "content": "x", "name": "y"}]]}', 422),
        (b'{"conversations": [], "temperature": 1}', 422),
        (b'{"conversations": [], "conversations ": []}', 422),
        (b'{"conversations": []}', 200),
    ],
)
def test_what_is_no_request_is_refused_in_few_words(server, body, status):
    found, came = post(server, body)
    assert found == status
    assert len(came) < 1500
    if status != 200:
        assert came.partition(b"\n\n")[2].startswith(b'{"error": "')


def test_errors_name_the_field_and_never_repeat_the_text(server):
    body = b'{"conversations": [[{"role": "user", "content": "private words", "extra": "more private words"}]]}'
    found, came = post(server, body)
    assert found == 422
    assert b"conversations.0.0.extra" in came
    assert b"private" not in came


@pytest.mark.parametrize("path", ["/get_reward", "/classify"])
@pytest.mark.parametrize("body", [b"{", b"[" * 15_000, b"[]", b'{"query": 5, "input": 5}'])
def test_the_other_protocols_refuse_alike(server, path, body):
    assert post(server, body, path)[0] in (400, 422)


def test_fields_that_other_servers_ignore_are_ignored_there(server):
    body = json.dumps({"query": [], "prompts": [], "labels": [], "datasources": []}).encode()
    assert post(server, body, "/get_reward")[0] == 200
    body = json.dumps({"messages": talks(1)[0], "user": "me", "priority": 0, "new_in_next_release": 1}).encode()
    assert post(server, body, "/classify")[0] == 200


def test_a_body_that_is_announced_too_large_is_not_read(server):
    started = monotonic()
    assert send(server, head("/score", "Content-Length: 99999999999"))[0] == 413
    assert monotonic() - started < 5


def test_a_body_that_turns_out_too_large_is_cut_off(server):
    part = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    status, _ = send(server, head("/score", "Transfer-Encoding: chunked") + part * 4)
    assert status == 413


@pytest.mark.parametrize(
    "lines", [("Content-Length: -5",), ("Content-Length: 5", "Content-Length: 6"), ("Bad header",)]
)
def test_nonsense_in_the_head_is_refused(server, lines):
    assert send(server, head("/score", *lines) + b"hello")[0] == 400


def test_a_head_without_end_is_refused(server):
    assert send(server, head("/score", *[f"X-{i}: {'y' * 1000}" for i in range(100)])[:-2])[0] in (0, 400)


def test_a_client_that_says_nothing_is_dropped(server):
    started = monotonic()
    with connect(server) as connection:
        assert read(connection)[0] == 0
    assert 0.5 < monotonic() - started < 15


def test_a_head_that_drips_is_dropped(server):
    """Slowloris: each byte comes in time, the head never ends."""
    started = monotonic()
    with connect(server) as connection:
        for byte in head("/score", *["X-Slow: yes"] * 2000):
            if closed(connection) or monotonic() - started > 15:
                break
            connection.send(bytes([byte]))
            sleep(0.02)
    assert monotonic() - started < 15


def test_a_second_head_that_drips_is_dropped_too(server):
    with connect(server) as connection:
        connection.sendall(head("/score", f"Content-Length: {len(GOOD)}") + GOOD)
        assert read(connection)[0] == 200
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: rm\r\nX-Slow:")
        started = monotonic()
        assert read(connection)[0] == 0
        assert monotonic() - started < 15


def test_a_body_that_drips_is_answered_408(server):
    started = monotonic()
    with connect(server) as connection:
        connection.sendall(head("/score", "Content-Length: 1000") + b'{"conv')
        status, came = read(connection)
    assert status == 408
    assert b"7 bytes" in came or b"6 bytes" in came
    assert monotonic() - started < 15


def test_slow_clients_do_not_keep_honest_ones_out(server):
    """Ten half-open requests at once; an honest client is served meanwhile."""
    slow = [connect(server) for _ in range(10)]
    try:
        for i, connection in enumerate(slow):
            connection.sendall(head("/score", "Content-Length: 1000")[: 20 + 9 * i])
        with HttpScorer(server.url, token=TOKEN, timeout=20) as client:
            assert len(client.score(talks(3))) == 3
    finally:
        for connection in slow:
            connection.close()


def test_too_many_connections_are_told_so_and_pass(server):
    many = [connect(server) for _ in range(LIMITS.max_connections)]
    try:
        assert post(server, GOOD)[0] == 503
    finally:
        for connection in many:
            connection.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(server):
    for _ in range(5):
        with connect(server) as connection:
            connection.sendall(head("/score", "Content-Length: 1000") + b'{"conv')


def test_off_loopback_there_is_no_serving_without_a_token():
    with pytest.raises(RMServerError, match="UPS_RM_TOKEN"):
        listen("0.0.0.0", 0, None)
    listen("0.0.0.0", 0, TOKEN).close()
    listen("127.0.0.1", 0, None).close()
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1")] == [False] * 3


def test_a_token_is_long_and_its_file_private(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(RMServerError, match="chmod 600"):
        read_token(file, None)
    file.chmod(0o600)
    assert read_token(file, "of-the-environment") == TOKEN
    assert read_token(None, TOKEN) == TOKEN
    assert read_token(None, None) is read_token(None, "") is None
    for bad in ("short", "with blanks in the middle", "pässwörter-sind-lang"):
        with pytest.raises(RMServerError, match="at least 16"):
            read_token(None, bad)
    with pytest.raises(RMServerError, match="can't be read"):
        read_token(tmp_path / "none", None)


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed this connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(20)
