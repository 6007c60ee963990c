"""From messages to the reward model's token ids.

One way in for features, scorer, card and checks: `render(tokenizer, conversations, policy)`. The RM's own tokenizer and
chat template write the text; the policy (a part of the RM's card) decides BOS, the end token and truncation. Text in,
ids out: token ids of the model that wrote the reply are never seen here.

Not done here: padding and batches (batching.py), tensors (scorer.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from ups_rm.control_tokens import ControlTokens, special_tokens, surrogate_at
from ups_rm.errors import RMError
from ups_rm.types import Conversation, Message

# Templates of the Llama 3.1+ family write today's date unless told one; a score must not depend on the day.
TEMPLATE_DATE = "26 Jul 2024"
DEFAULT_MAX_LENGTH = 4096
_PROBE: Conversation = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Sure."},
]


@dataclass(frozen=True)
class RenderPolicy:
    """What decides the token ids besides tokenizer and chat template.

    bos: "one" - the ids begin with exactly one BOS, whoever wrote it; "none" - they do not begin with BOS.
    end_token: the special token that closes a reply, such as <|eot_id|>; added where the template writes none. Blanks
        that the template writes after it (ChatML: a newline) stay, a generation prompt that it writes without being
        asked to (Llama 3's first template) goes. None: the ending is left as the template writes it.
    truncation_side: "left" - the oldest tokens go, a leading BOS stays; "right" - the newest tokens of the reply go,
        the end token and what follows it stay.
    max_length: limit in RM tokens, BOS and end token included.
    """

    bos: Literal["one", "none"] = "one"
    end_token: str | None = None
    truncation_side: Literal["left", "right"] = "left"
    max_length: int = DEFAULT_MAX_LENGTH

    def __post_init__(self) -> None:
        if self.bos not in ("one", "none"):
            raise RMError(f"bos is {self.bos!r}, expected 'one' or 'none'")
        if self.end_token is not None and (
            not isinstance(self.end_token, str) or surrogate_at(self.end_token) is not None
        ):
            raise RMError(f"end_token is {self.end_token!r}, expected the text of a special token, or null")
        if self.truncation_side not in ("left", "right"):
            raise RMError(f"truncation_side is {self.truncation_side!r}, expected 'left' or 'right'")
        if not isinstance(self.max_length, int) or self.max_length < 8:
            raise RMError(f"max_length is {self.max_length!r}, expected an integer of at least 8 tokens")

    @classmethod
    def infer(
        cls,
        tokenizer: Any,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        truncation_side: Literal["left", "right"] = "left",
    ) -> RenderPolicy:
        """The policy that fits the chat template: its BOS or none, the special token that it closes a reply with.

        Raises:
            RMError: the tokenizer has no chat template.
        """
        ids = _encode(tokenizer, _texts(tokenizer, [_PROBE]))[0]
        has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        closing = (_ending(tokenizer) or Ending("", "")).closing.rstrip()
        found = [token for token in special_tokens(tokenizer).values() if token and closing.endswith(token)]
        end_token = max(found, key=len, default=None)
        return cls("one" if has_bos else "none", end_token, truncation_side, max_length)


@dataclass(frozen=True)
class Rendered:
    """One conversation as RM token ids, and whether it was cut to the policy's limit."""

    input_ids: list[int]
    truncated: bool


def render(tokenizer: Any, conversations: Sequence[Conversation], policy: RenderPolicy) -> list[Rendered]:
    """Token ids of each conversation, in input order.

    Text in a message that spells a control token is broken up (control_tokens.py), so that a reply can't end its own
    turn or begin another: it would be a way to cheat the RM.

    Args:
        tokenizer: the RM's own.
        conversations: messages that end with the assistant's reply, which may be empty.
        policy: as the RM's card says.

    Raises:
        RMError: a conversation that is empty, malformed or does not end with a reply; no chat template; a template that
            refuses the conversation.
    """
    return render_text(tokenizer, _texts(tokenizer, conversations), policy) if conversations else []


def render_text(tokenizer: Any, texts: Sequence[str], policy: RenderPolicy) -> list[Rendered]:
    """Token ids of conversations that the RM's own chat template has written already, in input order.

    For clients that render themselves, such as verl's. BOS, end token and truncation are the policy's, as in `render`;
    what stands in a message can no longer be told from what the template wrote, so special tokens in a reply count.

    Raises:
        RMError: the policy's end token is not in the tokenizer; more special tokens than the text spells.
    """
    if not texts:
        return []
    end_id = None
    if policy.end_token is not None:
        end_id = tokenizer.convert_tokens_to_ids(policy.end_token)
        if end_id is None or (end_id == tokenizer.unk_token_id and policy.end_token != tokenizer.unk_token):
            raise RMError(f"end_token {policy.end_token!r} is not in the RM's tokenizer")
        ending = _ending(tokenizer)
        texts = [_closed(text, ending, policy.end_token) for text in texts]
    encoded, tokens = _encode(tokenizer, texts), ControlTokens.of(tokenizer)
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if tokens.forged(text, ids):
            raise RMError(
                f"conversation {i}: the RM's tokenizer reads special tokens where the text spells none: a message "
                "could forge a turn\n  fix: special tokens that are not normalized (AddedToken(normalized=False))"
            )
    return [_apply(ids, policy, tokenizer.bos_token_id, end_id) for ids in encoded]


@dataclass(frozen=True)
class Ending:
    """What a template writes after the last reply: `closing`, and a generation prompt nobody asked for."""

    closing: str
    generation_prompt: str


def _ending(tokenizer: Any) -> Ending | None:
    """How the template ends a conversation; None if the probe's turns can't be found in what it writes.

    The generation prompt is the header of an assistant's turn. It is what stands between question and reply, less what
    closes the question's turn: the part that the way from reply to next question has in common, up to the next header.
    """
    (text,) = _texts(tokenizer, [_PROBE])
    gaps, rest = [], text
    for message in _PROBE:
        gap, found, rest = rest.partition(message["content"])
        if not found:
            return None
        gaps.append(gap)
    _, to_reply, to_question, _ = gaps
    special = "|".join(re.escape(token) for token in special_tokens(tokenizer).values())
    a, b = (re.split(f"({special})", gap) if special else [gap] for gap in (to_reply, to_question))
    common = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]
    openers = [k for k, piece in enumerate(common) if k % 2]  # places of special tokens
    closing = common[: openers[-1]] if len(openers) > 1 else common
    header = to_reply[len("".join(closing)) :].rstrip()  # jinja drops a newline at a template's end
    cut = len(rest.rstrip()) - len(header)
    if header.strip() and rest.rstrip().endswith(header):
        return Ending(rest[:cut], rest[cut:])
    return Ending(rest, "")


def writes_generation_prompt(tokenizer: Any) -> bool:
    """Whether the template opens a further turn after the reply although it was not asked to."""
    ending = _ending(tokenizer)
    return ending is not None and bool(ending.generation_prompt)


def _closed(text: str, ending: Ending | None, end_token: str) -> str:
    """`text` without a generation prompt, ending with `end_token` and at most blanks after it."""
    if ending is not None and text.endswith(ending.closing + ending.generation_prompt):
        text = text.removesuffix(ending.generation_prompt)
        has_end = ending.closing.rstrip().endswith(end_token)
    else:
        has_end = text.rstrip().endswith(end_token)
    return text if has_end else text + end_token


def chat_template_of(tokenizer: Any) -> str:
    """The template that `render` uses.

    Raises:
        RMError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise RMError(
            f"the tokenizer of {tokenizer.name_or_path or 'the RM'} has no chat template: it can't be known how the RM "
            "saw conversations\n  fix: give the template that the head was trained with: --chat-template FILE (jinja), "
            "or put it into the folder as chat_template.jinja"
        )
    return str(tokenizer.get_chat_template())


def read_chat_template(file: Path | None) -> str | None:
    """The text of a template's file; None for None.

    Raises:
        RMError: it can't be read.
    """
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RMError(f"chat template {file} can't be read: {error}") from error


def template_sha256(tokenizer: Any) -> str:
    """sha256 of the chat template's text, as the card keeps it."""
    return hashlib.sha256(chat_template_of(tokenizer).encode("utf-8")).hexdigest()


def _texts(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    template = chat_template_of(tokenizer)
    tokens = ControlTokens.of(tokenizer)
    checked = [checked_messages(conversation, i, tokens) for i, conversation in enumerate(conversations)]
    extra = {"date_string": TEMPLATE_DATE} if "date_string" in template else {}
    try:
        texts = tokenizer.apply_chat_template(checked, tokenize=False, add_generation_prompt=False, **extra)
    except Exception as error:  # jinja2's own errors, and raise_exception() in templates
        raise RMError(f"the RM's chat template refuses a conversation: {type(error).__name__}: {error}") from error
    if not all(isinstance(text, str) for text in texts):
        raise RMError("the RM's chat template writes no text: look at chat_template in the tokenizer's files")
    return list(texts)


def checked_messages(conversation: Conversation, index: int, tokens: ControlTokens | None) -> Conversation:
    """The messages with control tokens in their texts broken up.

    Raises:
        RMError: no messages, malformed ones, a role that spells a control token, or a last message that is no reply;
            conversation `index` is named.
    """
    if not conversation:
        raise RMError(f"conversation {index} has no messages")
    messages: Conversation = []
    for message in conversation:
        if not isinstance(message, Mapping):
            raise RMError(f"conversation {index}: a message is a {type(message).__name__}, expected role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise RMError(
                f"conversation {index}: a message needs text under 'role' and 'content', got "
                f"{type(role).__name__} and {type(content).__name__}"
            )
        if (at := surrogate_at(role + content)) is not None:
            raise RMError(
                f"conversation {index}: half a surrogate pair at character {at} of a message: not Unicode text"
            )
        if tokens is not None:
            if tokens.broken(role) != role:
                raise RMError(f"conversation {index}: role {role[:80]!r} spells a control token of the RM's tokenizer")
            content = tokens.broken(content)
        messages.append(Message(role=role, content=content))
    if messages[-1]["role"] != "assistant":
        raise RMError(
            f"conversation {index} ends with role {messages[-1]['role'][:80]!r}, expected 'assistant': the RM scores a "
            "reply (an empty one is {'role': 'assistant', 'content': ''})"
        )
    return messages


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # half surrogate pairs that a template writes, a vocabulary with holes
        raise RMError(f"the RM's tokenizer does not take a conversation: {type(error).__name__}: {error}") from error
    return [list(ids) for ids in encoded["input_ids"]]


def _apply(ids: list[int], policy: RenderPolicy, bos_id: int | None, end_id: int | None) -> Rendered:
    """BOS and truncation: the policy applied to the ids of a text that ends as it should."""
    if bos_id is not None:
        start = next((i for i, token in enumerate(ids) if token != bos_id), len(ids))
        ids = ([bos_id] if policy.bos == "one" else []) + ids[start:]
    head = [bos_id] if bos_id is not None and policy.bos == "one" else []
    tail = ids[len(ids) - 1 - ids[::-1].index(end_id) :] if end_id in ids else []
    excess = len(ids) - policy.max_length
    if excess <= 0:
        return Rendered(ids, False)
    if policy.truncation_side == "left":
        return Rendered(head + ids[len(head) + excess :], True)
    return Rendered(ids[: policy.max_length - len(tail)] + tail, True)
