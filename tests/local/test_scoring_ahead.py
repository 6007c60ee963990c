"""A reward model that computes elsewhere is asked about a group when its last reply has ended."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ups_rm.errors import RMServerError
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.local.scoring_ahead import ScoringAhead, computes_elsewhere
from ups_rm.recipe import RewardModel, RewardModelModel, load_recipe
from ups_rm.types import Conversation, Score

ELSEWHERE = RewardModel(model=RewardModelModel(url="http://rm:8500"))
CHATS = [[{"role": "user", "content": text}] for text in ("bread", "moon", "sun", "piano", "water", "flour")]


class Asked:
    """Scores by length, and remembers what it was asked and where."""

    def __init__(self, failures: int = 0) -> None:
        self.calls: list[tuple[list[Conversation], str]] = []
        self.failures = failures

    def score(self, conversations: list[Conversation]) -> list[Score]:
        self.calls.append((conversations, threading.current_thread().name))
        if len(self.calls) <= self.failures:
            raise RMServerError("no answer")
        return [Score(float(len(talk[-1]["content"])), 0.5, 1, False) for talk in conversations]


@pytest.fixture(scope="module")
def engine(policy_folder: Path) -> RolloutEngine:
    recipe = load_recipe("quickstart", [f"actor_rollout_ref.model.path={policy_folder}", "trainer.device=cpu"])
    return RolloutEngine(Policy.load(recipe, trainable=False))


def test_only_where_every_model_has_a_url() -> None:
    assert computes_elsewhere(ELSEWHERE)
    here = RewardModelModel(path="rm")
    assert not computes_elsewhere(RewardModel(model=here))
    assert not computes_elsewhere(RewardModel())
    assert not computes_elsewhere(RewardModel(model=RewardModelModel(url="http://rm:8500"), helpfulness=here))
    assert ScoringAhead(Asked(), RewardModel(model=here)).on_group is None


@pytest.mark.parametrize("at_once", [256, 7], ids=["one chunk", "three chunks"])
def test_a_group_is_asked_for_once_and_before_the_last_one_has_ended(
    engine: RolloutEngine, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eighth token ends a reply, so that they end at random; the scores are those of asking at the end."""
    engine.max_num_seqs = at_once
    ends = list(range(0, engine.policy.model.config.vocab_size, 8))
    monkeypatch.setattr(Policy, "eos_ids", property(lambda _: ends))
    sampling, told = Sampling(3.0, seed=5), []
    plain = engine.generate(CHATS, n=3, max_new_tokens=40, sampling=sampling)
    scorer = Asked()
    with ScoringAhead(scorer, ELSEWHERE) as ahead:

        def on_group(conversations: list[Conversation]) -> None:
            told.append(conversations)
            ahead.ask(conversations)

        rollout = engine.generate(CHATS, n=3, max_new_tokens=40, sampling=sampling, on_group=on_group)
        scores = ahead.score(rollout.conversations)
    assert torch.equal(rollout.sequences.responses, plain.sequences.responses)
    groups = [rollout.conversations[i : i + 3] for i in range(0, len(rollout.conversations), 3)]
    assert 0 < len(told) < len(groups), "some groups end early, the longest reply's of the last chunk does not"
    if at_once == 7:  # two prompts at a time: when the last two are decoded, the first four are known
        assert all(group in told for group in groups[:4])
    assert all(group in groups for group in told)
    assert scores == Asked().score(rollout.conversations)
    early = [talks for talks, thread in scorer.calls if thread.startswith("scoring-ahead")]
    assert sorted(map(repr, early)) == sorted(map(repr, told))
    assert sum(len(talks) for talks, _ in scorer.calls) == len(rollout.conversations), "nothing is asked twice"


def test_a_request_that_failed_is_made_again_and_then_raises(engine: RolloutEngine) -> None:
    group = [[*CHATS[0], {"role": "assistant", "content": text}] for text in ("a", "bb")]
    for failures, calls in ((1, 2), (2, 2)):
        scorer = Asked(failures)
        with ScoringAhead(scorer, ELSEWHERE) as ahead:
            ahead.ask(group)
            if failures == 1:
                assert [score.logit for score in ahead.score(group)] == [1.0, 2.0]
            else:
                with pytest.raises(RMServerError, match="no answer"):
                    ahead.score(group)
        assert len(scorer.calls) == calls


def test_whoever_asks_again_asks_the_model(engine: RolloutEngine) -> None:
    """`score_replies` asks again for scores that are no numbers."""
    group = [[*CHATS[0], {"role": "assistant", "content": "a"}]]
    scorer = Asked()
    with ScoringAhead(scorer, ELSEWHERE) as ahead:
        ahead.ask(group)
        ahead.score(group)
        ahead.score(group)
    assert len(scorer.calls) == 2
