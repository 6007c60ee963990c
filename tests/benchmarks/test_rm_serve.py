"""The reward server's benchmark in small: its load gives the scorer's logits, its figures have their form."""

from __future__ import annotations

import pytest
from benchmarks.result import Result
from benchmarks.rm_serve import CLIENTS, conversations, load

from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import Limits, RewardServer


def test_sixty_four_clients_get_the_scorers_logits_through_a_queue_too_short_for_them(rm_folder):
    scorer = RewardScorer.load(rm_folder, dtype="float32")
    work = conversations(160, 60)
    with RewardServer([scorer], name="rm", limits=Limits(max_waiting=16)) as server:
        found = load(server.url, work)
        answers = server.metrics.text().decode()
    assert found.logits == pytest.approx([score.logit for score in scorer.score(work)], abs=2e-5)
    assert min(found.latencies) > 0
    assert max(found.latencies) <= found.seconds
    statuses = {line.split('status="')[1][:3] for line in answers.splitlines() if line.startswith("ups_rm_requests_t")}
    assert {"200"} <= statuses <= {"200", "429"}, "errors other than 429"
    assert CLIENTS == 64


def test_a_ratio_above_one_is_in_our_favour():
    assert Result("x", 9.0, 10.0, "tokens/s", floor=18.0).ratio == pytest.approx(0.9)
    assert Result("x", 9.0, 10.0, "tokens/s", floor=18.0).floor_share == pytest.approx(0.5)
    assert Result("x", 5.0, 20.0, "s", floor=4.0).ratio == pytest.approx(4.0)
    assert Result("x", 5.0, 20.0, "s", floor=4.0).floor_share == pytest.approx(0.8)
    assert Result("x", 9.0, None, "s").ratio is None
