"""schemathesis against the reward server's own OpenAPI, over a real socket: requests that nobody picked.

Bodies, headers and methods are drawn from the document (good ones) and against it (bad ones). No answer is a 5xx, each
is one that the document names, with its content type and schema; nothing that breaks the schema is taken; nothing is
answered without the token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import Limits, RewardServer

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: it is in the extra dev")
TOKEN = "correct-horse-battery-staple"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CASES = int(os.environ.get("UPS_RM_OPENAPI_CASES", "30"))
"""Requests for each endpoint and kind."""
ENDPOINTS = {"/score": "POST", "/get_reward": "POST", "/classify": "POST", "/health": "GET", "/metrics": "GET"}


@pytest.fixture(scope="module")
def server(rm_folder) -> Iterator[RewardServer]:
    scorer = RewardScorer.load(rm_folder, dtype="float32")
    limits = Limits(max_waiting=64, max_body_bytes=200_000)
    with RewardServer([scorer], name="rm", token=TOKEN, limits=limits) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


def test_the_document_is_whole(schema):
    """Every $ref leads somewhere, and it names the endpoints that there are."""
    schema.validate()
    found = {result.ok().path: result.ok().method.upper() for result in schema.get_all_operations()}
    assert found == ENDPOINTS


KINDS = [
    (path, mode) for path, method in ENDPOINTS.items() for mode in ("positive", "negative")[: 1 + (method == "POST")]
]
"""An endpoint that takes nothing can't be given anything wrong."""


@pytest.mark.parametrize(("path", "mode"), KINDS)
def test_no_request_breaks_the_server_or_its_word(schema, server, path, mode):
    operation = schema[path][ENDPOINTS[path]]
    mode = schemathesis.GenerationMode(mode)
    statuses: dict[int, int] = {}
    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=CASES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            # a schema can't say that the last message is the reply: such a refusal (422) is right
            unchecked = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
            response = case.call_and_validate(session=session, headers=HEADERS, timeout=60, excluded_checks=unchecked)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

        ask()
    assert sum(statuses.values()) >= (CASES // 2 if ENDPOINTS[path] == "POST" else 1), statuses
    wanted = {200} if mode is schemathesis.GenerationMode.POSITIVE else {422}
    assert wanted <= statuses.keys(), statuses
    assert server.queue.waiting == 0


@pytest.mark.parametrize("path", ENDPOINTS)
def test_other_methods_are_told_which_there_are(server, path):
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"):
        if method != ENDPOINTS[path]:
            answer = requests.request(method, f"{server.url}{path}", headers=HEADERS, timeout=60)
            assert (answer.status_code, answer.headers["allow"]) == (405, ENDPOINTS[path])
            assert answer.json() == {"error": "Method Not Allowed"}
