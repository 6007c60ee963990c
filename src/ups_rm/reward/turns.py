"""From text that a policy's chat template wrote back to messages.

OpenRLHF's remote RM client posts what the policy saw and wrote, special tokens included. A reward model of another
family must see the conversation through its own template, so the turns are found again: the template is probed once for
what it writes before, between and after turns, and texts are cut there.

Not done here: tools, images, roles other than system, user and assistant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ups_rm.control_tokens import special_tokens
from ups_rm.errors import RMError
from ups_rm.types import Conversation, Message

_WORDS = ("Hmmsystem", "Hmmfirst", "Hmmanswer", "Hmmsecond", "Hmmreply")  # in no template
_WAY_OUT = (
    "\n  fix: give the tokenizer of the policy: ups-rm rm serve --policy-tokenizer FOLDER, and send `prompts` "
    "with the queries"
)


@dataclass(frozen=True)
class TurnFormat:
    """What a chat template writes around turns.

    start: before the first user turn, with a system prompt of its own if it has one. system_start, system_end: around a
    given system message ("" and "": it takes none). to_assistant: from the end of a user turn to the reply. to_user:
    from the end of a reply to the next user turn. bos: never part of the others. special: special tokens, of which
    those at a reply's end are dropped.
    """

    start: str
    system_start: str
    system_end: str
    to_assistant: str
    to_user: str
    bos: str
    special: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> TurnFormat:
        """The format of the tokenizer's chat template.

        Raises:
            RMError: no chat template, or one that changes what stands in a turn.
        """
        system, first, answer, second, reply = _WORDS
        turns = [
            Message(role=role, content=content)
            for role, content in zip(("user", "assistant") * 2, (first, answer, second, reply), strict=True)
        ]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            start, to_assistant, to_user, _ = _gaps(text, (first, answer, second, reply))
        except Exception as error:  # jinja2's own errors, raise_exception() in templates, a missing template
            raise RMError(f"the turns of the policy's chat template can't be found: {error}") from error
        try:
            text = tokenizer.apply_chat_template([Message(role="system", content=system), *turns], tokenize=False)
            system_start, system_end = _gaps(text, (system, first))
        except Exception:  # this template takes no system message: then none is looked for
            system_start = system_end = ""
        if system_start == start:  # written into the user's turn, where nobody can tell it from the user's words
            system_start = system_end = ""
        bos, special = tokenizer.bos_token or "", tuple(special_tokens(tokenizer).values())
        found = cls("", "", system_end, to_assistant, to_user, bos, special)
        return replace(found, start=found._without_bos(start), system_start=found._without_bos(system_start))

    def conversation(self, query: str, prompt: str | None = None) -> Conversation:
        """The messages of `query`: prompt and reply as the policy's tokenizer decoded them.

        A reply can't begin a turn of its own: it starts where `prompt` ends or, without one, after the last place where
        the template opens a reply. Generation stops at the token that such a place begins with.

        Raises:
            RMError: the text is not this template's, and no prompt without special tokens says where the reply starts.
        """
        query, prompt = self._without_bos(query), self._without_bos(prompt or "")
        if prompt and query.startswith(prompt):
            messages = self._prompt_messages(prompt)
            if messages is None and not any(token in prompt for token in self.special):
                messages = [Message(role="user", content=prompt), Message(role="assistant", content="")]
            reply = query[len(prompt) :]
        else:
            before, opened, reply = query.rpartition(self.to_assistant)
            messages = self._prompt_messages(before + opened) if opened else None
        if messages is None:
            raise RMError(f"a query was not written by the chat template that this server knows{_WAY_OUT}")
        messages[-1]["content"] += self._without_end_tokens(reply)
        return messages

    def _prompt_messages(self, prompt: str) -> Conversation | None:
        """Turns of a prompt that ends with an opened reply, which is the last message; None: another format."""
        messages: Conversation = []
        if prompt.startswith(self.start):
            rest = prompt[len(self.start) :]
        elif self.system_start and prompt.startswith(self.system_start) and self.system_end in prompt:
            system, _, rest = prompt[len(self.system_start) :].partition(self.system_end)
            messages.append(Message(role="system", content=system))
        else:
            return None
        while True:
            user, opened, rest = rest.partition(self.to_assistant)
            if not opened:
                return None
            messages.append(Message(role="user", content=user))
            answer, more, after = rest.partition(self.to_user)
            messages.append(Message(role="assistant", content=answer))
            if not more:
                return messages
            rest = after

    def _without_bos(self, text: str) -> str:
        """Text without BOS: tokenizers and templates each may have written one, and decoding keeps them all."""
        while self.bos and text.startswith(self.bos):
            text = text[len(self.bos) :]
        return text

    def _without_end_tokens(self, reply: str) -> str:
        """The reply less the special tokens at its end and the blanks around them."""
        while True:
            bare = reply.rstrip()
            ending = next((token for token in self.special if bare.endswith(token)), None)
            if ending is None:
                return reply
            reply = bare.removesuffix(ending)


def _gaps(text: str, words: tuple[str, ...]) -> list[str]:
    """What stands before each of `words`, which follow one another in `text`.

    Raises:
        ValueError: a word is not there.
    """
    gaps = []
    for word in words:
        gap, found, text = text.partition(word)
        if not found:
            raise ValueError("the template changes or leaves out what stands in a turn")
        gaps.append(gap)
    return gaps
