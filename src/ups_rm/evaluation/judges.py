"""Judges besides the reward model that was trained against, so that gaming it is visible.

A judge takes conversations that end with a reply and gives one `Verdict` each, in order: another reward model here, a
chat model behind an endpoint in endpoint.py. The refusal labels of refusal.py need no judge, every reply has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ups_rm.errors import RecipeError
from ups_rm.evaluation.figures import Verdict
from ups_rm.recipe import RewardModel, RewardModelModel
from ups_rm.types import Conversation, Scorer

if TYPE_CHECKING:
    from ups_rm.evaluation.endpoint import EndpointJudge


class Judge(Protocol):
    """Whatever judges replies; must say the same of the same text."""

    @property
    def name(self) -> str: ...

    def judge(self, conversations: list[Conversation]) -> list[Verdict]: ...


class ScorerJudge:
    """A reward model as judge: its safe score."""

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self.scorer = name, scorer

    def judge(self, conversations: list[Conversation]) -> list[Verdict]:
        return [Verdict(score.safe_score) for score in self.scorer.score(conversations)]


def open_judges(
    texts: Sequence[str], device: str, endpoint: EndpointJudge | None = None
) -> list[ScorerJudge | EndpointJudge]:
    """Reward models named as in `--judge`, loaded, and the endpoint; no two of the same name.

    Args:
        texts: PLACE[,KEY=VALUE...], the place an RM folder or the address of a reward server, the keys those of
            `reward_model.model` that are texts (`output=reward` for a model whose higher is better).

    Raises:
        RecipeError: an unknown key. RMError: a model that can't be opened.
    """
    from ups_rm.reward.open import entry_names, open_scorer

    entries = [_entry(text) for text in texts]
    judges: list[ScorerJudge | EndpointJudge] = [
        ScorerJudge(name, open_scorer(RewardModel(model=entry), device))
        for name, entry in zip(entry_names(entries), entries, strict=True)
    ]
    if endpoint is not None:
        while endpoint.name in {judge.name for judge in judges}:
            endpoint.name += "-endpoint"
        judges.append(endpoint)
    return judges


def _entry(text: str) -> RewardModelModel:
    place, *settings = text.split(",")
    remote = place.startswith(("http://", "https://"))
    entry = RewardModelModel(url=place) if remote else RewardModelModel(path=place)
    known = [field.name for field in dataclasses.fields(entry) if isinstance(getattr(entry, field.name), str)]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            raise RecipeError(f"--judge {text}: {setting!r} is not KEY=VALUE with a key of {', '.join(known)}")
        setattr(entry, key, value)
    return entry
