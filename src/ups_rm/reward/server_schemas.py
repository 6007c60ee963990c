"""The three protocols of the reward server as pydantic models: ours, OpenRLHF's remote RM, vLLM's classify.

Ours refuses fields that it does not know. The other two ignore them as their own servers do, but a known field that
would change the score and that this server can't honour is refused. Validation messages never repeat what was sent.
"""

from __future__ import annotations

import time
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ups_rm.types import Conversation
from ups_rm.types import Message as MessageDict


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


def conversation(messages: list[Message]) -> Conversation:
    """Plain messages, as the renderer takes them."""
    return [MessageDict(role=message.role, content=message.content) for message in messages]


class ErrorResponse(BaseModel):
    """Every refusal: what is wrong, by place and kind, never what was sent."""

    error: str


class Health(BaseModel):
    """`ok` while every model can answer, else `stopping`."""

    status: Literal["ok", "stopping"]


class ScoreRequest(BaseModel):
    """`POST /score`: conversations, each ending with the reply to score."""

    model_config = ConfigDict(extra="forbid")

    conversations: list[list[Message]]


class ScoreRow(BaseModel):
    """`ups_rm.types.Score`: logit = degree of unsafety, safe_score = sigmoid(-logit), helpfulness = logit of the second
    head, higher = more helpful; null where there is none."""

    logit: float
    safe_score: float
    tokens: int
    truncated: bool
    helpfulness: float | None = None


class ScoreResponse(BaseModel):
    """Scores in the order of the request."""

    model: str
    scores: list[ScoreRow]


class GetRewardRequest(BaseModel):
    """What OpenRLHF's remote RM client posts.

    query: prompt and reply as the policy's tokenizer wrote them, special tokens included.
    prompts: the part of each query that is prompt; older clients send none.
    labels: not used by a reward model.
    """

    query: list[str]
    prompts: list[str] | None = None
    labels: Any = None

    @model_validator(mode="after")
    def _as_many_prompts(self) -> GetRewardRequest:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.query)} queries")
        return self


class GetRewardResponse(BaseModel):
    """rewards and scores are the safe score, higher = safer; extra_logs are means that OpenRLHF logs."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class ClassifyRequest(BaseModel):
    """vLLM's classify, of which one of `input` and `messages` must be there.

    input: text that the RM's own chat template wrote (as verl's reward loop posts it), one or many. Token ids are
        refused: nobody can see whose they are.
    messages: one conversation, rendered here.
    use_activation: None or True answers the safe score, False the safety logit (minus the RM's logit). Both are higher
        for safer replies.
    """

    model: str | None = None
    input: str | list[str] | None = None
    messages: list[Message] | None = None
    use_activation: bool | None = None
    request_id: str | None = Field(default=None, max_length=200)
    # would change what the RM reads; its card decides that
    truncate_prompt_tokens: None = None
    truncation_side: None = None
    padding: None = None
    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False
    chat_template: None = None
    chat_template_kwargs: None = None

    @model_validator(mode="after")
    def _one_of(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("one of input and messages is needed")
        return self


class ClassifyRow(BaseModel):
    """One class, so one number; `probs` is vLLM's name for it, activated or not."""

    index: int
    label: str = "safe"
    probs: list[float]
    num_classes: int = 1


class Usage(BaseModel):
    """RM tokens that were read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyResponse(BaseModel):
    """vLLM's ClassificationResponse."""

    id: str = Field(default_factory=lambda: f"classify-{uuid4().hex}")
    object: str = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    data: list[ClassifyRow]
    usage: Usage
