"""HttpScorer: scores in order or an error that says why; a busy, slow or dying server costs time and no sample."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from time import monotonic

import httpx
import pytest
from talks import talks

from ups_rm.errors import RMError, RMServerError
from ups_rm.reward import client as client_module
from ups_rm.reward.client import CircuitBreaker, HttpScorer
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Score

URL = "http://rm.example:8500"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE", 0.01)
    monkeypatch.delenv(client_module.TOKEN_VARIABLE, raising=False)


def expected(conversation) -> Score:
    logit = (sum(len(message["content"]) for message in conversation) % 17 - 8) / 3
    return Score(logit, safe_score(logit), len(conversation), len(conversation) > 2)


def answer(request: httpx.Request) -> httpx.Response:
    """What the real server answers, for a made-up RM."""
    conversations = json.loads(request.content)["conversations"]
    return httpx.Response(200, json={"model": "rm", "scores": [vars(expected(one)) for one in conversations]})


def scorer(handler: Callable[[httpx.Request], httpx.Response], **options) -> HttpScorer:
    made = HttpScorer(URL, client=httpx.Client(transport=httpx.MockTransport(handler)), **options)
    made.breaker = CircuitBreaker(cooldown=0.01, longest=0.02)
    return made


def flaky(*troubles: int | type[Exception]) -> Callable[[httpx.Request], httpx.Response]:
    """Each request meets the next of `troubles`; then all is well."""
    left, lock = list(troubles), threading.Lock()

    def handler(request: httpx.Request) -> httpx.Response:
        with lock:
            trouble = left.pop(0) if left else None
        if trouble is None:
            return answer(request)
        if isinstance(trouble, int):
            return httpx.Response(trouble, headers={"retry-after": "0"}, json={"error": "not now"})
        raise trouble("gone", request=request)

    return handler


@pytest.mark.parametrize("block", [1, 7, 256])
def test_scores_come_back_in_input_order_whatever_the_blocks(block):
    conversations = talks(50, seed=block)
    found = scorer(answer, block=block).score(conversations)
    assert found == [expected(one) for one in conversations]


def test_nothing_to_score_asks_nobody():
    assert scorer(flaky(*[500] * 9)).score([]) == []


def test_what_passes_is_waited_out_and_no_sample_is_lost():
    conversations = talks(40)
    troubles = [httpx.ConnectError, 503, httpx.ReadTimeout, 429, httpx.RemoteProtocolError, 502, 408, httpx.ReadError]
    found = scorer(flaky(*troubles * 4), block=5).score(conversations)
    assert found == [expected(one) for one in conversations]


def test_a_busy_server_is_no_failure_however_often_it_says_so():
    conversations = talks(3)
    assert scorer(flaky(*[429] * 40), retries=2).score(conversations) == [expected(one) for one in conversations]


def test_patience_ends_after_so_many_failures_and_names_the_last():
    with pytest.raises(RMServerError, match=r"3 conversations: ConnectError: gone \(4 failed attempts"):
        scorer(flaky(*[httpx.ConnectError] * 99), retries=3).score(talks(3))


def test_patience_ends_after_so_many_seconds():
    started = monotonic()
    with pytest.raises(RMServerError, match="HTTP 429: not now"):
        scorer(flaky(*[429] * 10_000), max_wait=0.3).score(talks(3))
    assert monotonic() - started < 10


def test_the_server_says_how_long_to_wait():
    times: list[float] = []

    def handler(request: httpx.Request) -> httpx.Response:
        times.append(monotonic())
        return answer(request) if len(times) > 1 else httpx.Response(429, headers={"retry-after": "1"})

    scorer(handler).score(talks(2))
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, RMError, "refuses"),
        (422, RMError, "ends with role"),
        (500, RMError, "refuses"),
        (401, RMServerError, "UPS_RM_TOKEN"),
        (413, RMServerError, "block"),
        (404, RMServerError, "HTTP 404"),
    ],
)
def test_what_does_not_pass_is_told_at_once(status, error, words):
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, json={"error": "conversation 0 ends with role 'user'"})

    with pytest.raises(error, match=words):
        scorer(handler).score(talks(2))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        b"[]",
        b'{"scores": [{"logit": 1.0}]}',
        b'{"scores": []}',
        b'{"scores": [{"logit": 1.0, "safe_score": 0.7310585786300049, "tokens": 3, "truncated": false}]}',
        b'{"scores": [{"logit": NaN, "safe_score": 0.5, "tokens": 3, "truncated": false}]}',
    ],
    ids=["html", "list", "field missing", "too few", "other sign", "not finite"],
)
def test_an_answer_that_is_no_score_is_an_error(content):
    with pytest.raises(RMError, match="answers"):
        scorer(lambda request: httpx.Response(200, content=content)).score(talks(1))


def test_one_failing_request_ends_the_whole_call():
    def handler(request: httpx.Request) -> httpx.Response:
        first = json.loads(request.content)["conversations"][0] == conversations[0]
        return httpx.Response(422, json={"error": "bad"}) if first else httpx.Response(503)

    conversations = talks(40)
    started = monotonic()
    with pytest.raises(RMError, match="bad"):
        scorer(handler, block=4, retries=10_000, max_wait=60).score(conversations)
    assert monotonic() - started < 20


def test_the_token_goes_into_the_header_and_nowhere_else(monkeypatch):
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer(request)

    scorer(handler, token="a-token-of-the-call").score(talks(1))
    monkeypatch.setenv(client_module.TOKEN_VARIABLE, "a-token-of-the-environment")
    scorer(handler).score(talks(1))
    assert [request.headers["authorization"] for request in seen] == [
        "Bearer a-token-of-the-call",
        "Bearer a-token-of-the-environment",
    ]
    assert not [request for request in seen if b"a-token" in request.content or "a-token" in str(request.url)]


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(RMServerError, match="http://HOST:PORT"):
        HttpScorer("127.0.0.1:8500")


def test_the_breaker_opens_lets_one_probe_and_closes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(client_module, "monotonic", lambda: now[0])
    breaker = CircuitBreaker(failures=3, cooldown=1.0, longest=4.0)
    for _ in range(2):
        assert breaker.delay() == 0.0
        breaker.failed()
    breaker.answered()  # only failures in a row count
    for _ in range(3):
        assert breaker.delay() == 0.0
        breaker.failed()
    assert breaker.delay() == pytest.approx(1.0)
    now[0] = 1.0
    assert breaker.delay() == 0.0  # the probe
    assert breaker.delay() > 0.0  # everybody else
    breaker.failed()
    waits = []
    for _ in range(4):  # each probe that fails doubles the pause
        waits.append(breaker.delay())
        now[0] += waits[-1]
        assert breaker.delay() == 0.0
        breaker.failed()
    assert waits == pytest.approx([2.0, 4.0, 4.0, 4.0])
    now[0] += 10
    assert breaker.delay() == 0.0
    breaker.answered()
    assert [breaker.delay() for _ in range(5)] == [0.0] * 5


def test_while_the_server_is_dead_few_ask():
    """Eight threads against a dead server: the breaker keeps all but probes away."""
    asked = []
    dead = scorer(lambda request: asked.append(request) or httpx.Response(503), block=1, concurrency=8, max_wait=1.0)
    dead.breaker = CircuitBreaker(failures=5, cooldown=0.2, longest=0.2)
    with pytest.raises(RMServerError):
        dead.score(talks(8))
    assert len(asked) <= 8 + 5 + 10
