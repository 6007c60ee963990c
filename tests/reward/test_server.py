"""The reward server on loopback: the scorer's own logits by every protocol, back-pressure, limits, an orderly end."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from talks import talks

from tiny import llama3_tokenizer, qwen_tokenizer
from ups_rm.errors import RMServerError
from ups_rm.reward.client import HttpScorer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import Limits, RewardServer, listen

ROUNDING = 2e-5  # of float32 between batches of other composition, as in test_rm_scorer.py


@pytest.fixture(scope="module")
def scorer(rm_folder) -> RewardScorer:
    return RewardScorer.load(rm_folder, dtype="float32")


@pytest.fixture(scope="module")
def server(scorer) -> Iterator[RewardServer]:
    with RewardServer([scorer], name="tiny-rm") as running:
        yield running


@pytest.fixture
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


class Gated:
    """A scorer whose model waits until `gate` is set; everything else is the wrapped one's."""

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer = scorer
        self.gate, self.started = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.scorer, name)

    def row_answers(self, rows, ids):
        self.started.set()
        assert self.gate.wait(60)
        return self.scorer.row_answers(rows, ids)


def test_http_gives_the_scores_of_the_process_to_the_last_bit(scorer, server):
    conversations = talks(60, seed=1)
    with HttpScorer(server.url) as client:
        assert client.score(conversations) == scorer.score(conversations)


def test_replies_to_one_prompt_are_scored_as_in_the_process_and_the_prompt_is_read_once(scorer):
    prompt = [{"role": "user", "content": "Tell me about bread, " * 12}]
    replies = [[*prompt, {"role": "assistant", "content": f"reply {i} " * (i + 1)}] for i in range(6)]
    with RewardServer([scorer], name="rm") as running, HttpScorer(running.url) as client:
        found = client.score(replies)
        text = httpx.get(f"{running.url}/metrics", trust_env=False).text
    assert found == scorer.score(replies)
    read = float(re.search(r"^ups_rm_tokens_total\{.*\} (\S+)$", text, re.M).group(1))
    assert read < 0.6 * sum(score.tokens for score in found)


def test_many_clients_get_the_same_logits_within_rounding(scorer, server):
    """Neighbours in a batch move a float32 logit by its rounding and no more."""
    parts = [talks(5, seed=seed) for seed in range(16)]
    found: dict[int, list] = {}
    with HttpScorer(server.url) as client:
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: client.score(parts[i])})) for i in range(len(parts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, part in enumerate(parts):
        expected = scorer.score(part)
        assert [s.logit for s in found[i]] == pytest.approx([s.logit for s in expected], abs=ROUNDING)
        assert [(s.tokens, s.truncated) for s in found[i]] == [(s.tokens, s.truncated) for s in expected]


def test_by_request_the_neighbours_move_nothing(scorer):
    parts = [talks(6, seed=seed) for seed in range(8)]
    found: dict[int, list] = {}
    with RewardServer([scorer], name="rm", by_request=True) as running, HttpScorer(running.url) as client:
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: client.score(parts[i])})) for i in range(len(parts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: scorer.score(part) for i, part in enumerate(parts)}


def test_several_models_share_the_work(scorer):
    gated = [Gated(scorer), Gated(scorer)]
    conversations = talks(40, seed=4, longest=120)
    with RewardServer(gated, name="rm") as running, HttpScorer(running.url) as client:
        found: list = []
        asking = threading.Thread(target=lambda: found.extend(client.score(conversations)))
        asking.start()
        assert all(one.started.wait(30) for one in gated), "one model had nothing to do"
        for one in gated:
            one.gate.set()
        asking.join(60)
    assert [s.logit for s in found] == pytest.approx([s.logit for s in scorer.score(conversations)], abs=ROUNDING)


def openrlhf_rewards(url: str, queries: list[str], prompts: list[str] | None) -> list[float]:
    """What OpenRLHF's request_api_wrapper and update_samples_with_rewards do with an answer."""
    data = {"query": queries} if prompts is None else {"query": queries, "prompts": prompts, "labels": [None] * 9}
    response = httpx.post(url, json=data, headers={"Content-Type": "application/json"}, trust_env=False)
    response.raise_for_status()
    info = response.json()
    assert len(info["scores"]) == len(queries)
    assert all(len(values) == len(queries) for values in info["extra_logs"].values())
    return info["rewards"]


@pytest.mark.parametrize("with_prompts", [True, False])
def test_get_reward_reads_the_policys_text_through_the_rms_own_template(scorer, with_prompts):
    """The policy speaks ChatML, the RM Llama 3: what counts is the conversation."""
    policy = qwen_tokenizer()
    conversations = [talk for talk in talks(12, seed=9) if talk[-1]["content"]]
    prompts = [policy.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in conversations]
    queries = [p + c[-1]["content"] + "<|im_end|>" for p, c in zip(prompts, conversations, strict=True)]
    with RewardServer([scorer], name="rm", policy_tokenizer=policy) as running:
        rewards = openrlhf_rewards(f"{running.url}/get_reward", queries, prompts if with_prompts else None)
    assert rewards == pytest.approx([s.safe_score for s in scorer.score(conversations)], abs=ROUNDING)


def test_get_reward_refuses_text_that_it_can_not_read(http):
    answer = http.post("/get_reward", json={"query": ["<|im_start|>user\nHi<|im_end|>"]})
    assert (answer.status_code, "--policy-tokenizer" in answer.json()["error"]) == (422, True)
    answer = http.post("/get_reward", json={"query": ["a", "b"], "prompts": ["a"]})
    assert (answer.status_code, "1 prompts for 2 queries" in answer.json()["error"]) == (422, True)


def test_classify_answers_in_vllms_form_higher_for_safer(scorer, http):
    conversations = talks(5, seed=2)
    texts = [scorer.tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    expected = scorer.score(conversations)
    bare = http.post("/classify", json={"model": "any", "input": texts, "use_activation": False}).json()
    assert [row["probs"] for row in bare["data"]] == [[pytest.approx(-s.logit, abs=ROUNDING)] for s in expected]
    active = http.post("/classify", json={"input": texts}).json()
    assert [row["probs"][0] for row in active["data"]] == pytest.approx([s.safe_score for s in expected], abs=ROUNDING)
    assert [(row["index"], row["num_classes"], row["label"]) for row in bare["data"]] == [
        (i, 1, "safe") for i in range(5)
    ]
    tokens = sum(s.tokens for s in expected)
    assert bare["usage"]["prompt_tokens"] == bare["usage"]["total_tokens"] == tokens
    assert (bare["object"], bare["id"].startswith("classify-"), bare["model"]) == ("list", True, "tiny-rm")
    one = http.post("/classify", json={"messages": conversations[0], "use_activation": False}).json()
    assert one["data"][0]["probs"][0] == pytest.approx(-expected[0].logit, abs=ROUNDING)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"input": "x", "messages": [{"role": "user", "content": "x"}]},
        {"input": [1, 2, 3]},
        {"input": "x", "truncate_prompt_tokens": 5},
        {"input": "x", "chat_template": "{{ messages }}"},
        {"input": "x", "add_generation_prompt": True},
    ],
    ids=["nothing", "both", "ids", "truncation", "template", "generation"],
)
def test_classify_refuses_what_it_can_not_honour(http, asked):
    assert http.post("/classify", json=asked).status_code == 422


@pytest.mark.oracle
def test_verls_own_client_gets_minus_the_logit(scorer, server):
    """verl's RewardLoopWorker.compute_score_disrm, as it stands, with this server as its router."""
    torch = pytest.importorskip("torch")
    loop = pytest.importorskip("verl.experimental.reward_loop.reward_loop")
    from verl import DataProto

    policy = qwen_tokenizer()
    conversation = next(talk for talk in talks(9, seed=6) if talk[-1]["content"])
    ids = policy(conversation[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    data = DataProto.from_dict(
        tensors={
            "responses": torch.tensor([ids + [0] * 3]),
            "attention_mask": torch.tensor([[1] * (4 + len(ids)) + [0] * 3]),
        },
        non_tensors={"raw_prompt": np.array([None], dtype=object)},
    )
    data.non_tensor_batch["raw_prompt"][0] = conversation[:-1]
    worker = object.__new__(loop.RewardLoopWorker)
    worker.reward_router_address = server.url.removeprefix("http://")
    worker.input_tokenizer, worker.reward_model_tokenizer = policy, llama3_tokenizer()
    rollout = SimpleNamespace(name="vllm")
    worker.config = SimpleNamespace(
        reward=SimpleNamespace(reward_model=SimpleNamespace(rollout=rollout, model_path="rm", enable=True))
    )
    found = asyncio.run(worker.compute_score_disrm(data))
    assert found["reward_score"] == pytest.approx(-scorer.score([conversation])[0].logit, abs=1e-5)


def test_a_full_queue_says_429_and_when_to_come_again(scorer):
    gated = Gated(scorer)
    with (
        RewardServer([gated], name="rm", limits=Limits(max_waiting=4)) as running,
        httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http,
    ):
        body = {"conversations": talks(4)}
        first: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: first.append(http.post("/score", json=body)))
        asking.start()
        assert gated.started.wait(30)
        refused = http.post("/score", json={"conversations": talks(1)})
        too_many = http.post("/score", json={"conversations": talks(5)})
        gated.gate.set()
        asking.join(60)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert too_many.status_code == 413  # would never fit
        assert first[0].status_code == 200
        assert http.post("/score", json=body).status_code == 200  # room came back


def test_an_answer_that_takes_too_long_is_given_up_and_room_comes_back(scorer):
    gated = Gated(scorer)
    limits = Limits(max_waiting=2, answer_seconds=0.3)
    with (
        RewardServer([gated], name="rm", limits=limits) as running,
        httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http,
    ):
        slow = http.post("/score", json={"conversations": talks(2)})
        assert (slow.status_code, "0.3 s" in slow.json()["error"]) == (503, True)
        assert "retry-after" in slow.headers
        assert running.queue.waiting == 0
        gated.gate.set()


def test_a_client_that_leaves_frees_its_room(scorer):
    gated = Gated(scorer)
    with RewardServer([gated], name="rm", limits=Limits(max_waiting=2)) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/score", json={"conversations": talks(2)}, timeout=0.3, trust_env=False)
        for _ in range(200):
            if running.queue.waiting == 0:
                break
            threading.Event().wait(0.05)
        assert running.queue.waiting == 0
        gated.gate.set()


def test_what_is_accepted_is_answered_while_the_server_ends(scorer):
    gated = Gated(scorer)
    parts = [talks(3, seed=seed) for seed in range(6)]
    found: dict[int, httpx.Response] = {}
    with RewardServer([gated], name="rm") as running:
        threads = [
            threading.Thread(
                target=lambda i=i: found.update(
                    {i: httpx.post(f"{running.url}/score", json={"conversations": parts[i]}, timeout=60)}
                )
            )
            for i in range(len(parts))
        ]
        for thread in threads:
            thread.start()
        for _ in range(400):
            if running.queue.waiting == 18:
                break
            threading.Event().wait(0.05)
        assert running.queue.waiting == 18
        running.stop()
        for _ in range(200):  # no new connection is taken by then
            try:
                httpx.get(f"{running.url}/health", timeout=5, trust_env=False)
            except httpx.TransportError:
                break
            threading.Event().wait(0.05)
        else:
            pytest.fail("the ending server still takes connections")
        gated.gate.set()
        for thread in threads:
            thread.join(60)
    assert [found[i].status_code for i in range(6)] == [200] * 6
    for i, part in enumerate(parts):
        logits = [row["logit"] for row in found[i].json()["scores"]]
        assert logits == pytest.approx([s.logit for s in scorer.score(part)], abs=ROUNDING)


def test_a_failing_model_is_a_500_without_its_insides(scorer):
    broken = Gated(scorer)
    broken.row_answers = lambda rows, ids: (_ for _ in ()).throw(MemoryError("secret of the model"))
    with RewardServer([broken], name="rm") as running:
        answer = httpx.post(f"{running.url}/score", json={"conversations": talks(1)}, trust_env=False)
        assert (answer.status_code, answer.json()) == (500, {"error": "the model failed: MemoryError"})
        assert httpx.get(f"{running.url}/health", trust_env=False).json() == {"status": "ok"}


def test_metrics_count_what_was_done(scorer):
    conversations = talks(10, seed=3)
    with (
        RewardServer([scorer], name="rm") as running,
        httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http,
    ):
        assert http.post("/score", json={"conversations": conversations}).status_code == 200
        http.post("/score", json={"conversations": 1})
        http.get("/wp-admin")
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert found["ups_rm_conversations_total",] == 10
    assert found["ups_rm_tokens_total", "cpu"] == sum(s.tokens for s in scorer.score(conversations))
    assert found["ups_rm_requests_total", "/score", "200"] == 1
    assert found["ups_rm_requests_total", "/score", "422"] == 1
    assert found["ups_rm_requests_total", "404", "other"] == 1
    assert (found["ups_rm_waiting_conversations",], found["ups_rm_waiting_limit",]) == (0, Limits().max_waiting)


def test_an_address_in_use_is_told_before_a_model_is_loaded(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(RMServerError, match="can't be listened on"):
        listen("127.0.0.1", port, None)
