"""Text that spells a control token stays text: `<|im_start|>` or `<|eot_id|>` in a message can't begin or end a turn.

A tokenizer reads its special tokens wherever they stand, also in what a user or a model wrote. So before a chat
template writes a message, what spells one is broken by a space after its first character (`< |im_start|>`), and
afterwards the token ids are counted against what the template itself wrote. One way for the policy (data/prompts.py)
and for reward models (reward/render.py).

Not done here: templates whose turns begin with plain words (`USER:`). There, text and turn can't be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ups_rm.types import Conversation, Message

_PROBE: Conversation = [
    {"role": "system", "content": "Hmmsystem"},
    {"role": "user", "content": "Hmmfirst"},
    {"role": "assistant", "content": "Hmmanswer"},
    {"role": "user", "content": "Hmmsecond"},
]
_BRACKETED = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,40}\]")


@dataclass(frozen=True)
class ControlTokens:
    """What a tokenizer and its chat template take for control, by text.

    ids: of the special tokens, less the one for unknown characters, which any text may give.
    special: finds special tokens. control: finds these and what the template writes in brackets around turns, such as
    `[INST]` or an added `<start_of_turn>` that is not flagged special. None where there are none.
    normalize: the tokenizer's own normalization, which it may apply before it looks for special tokens.
    """

    ids: frozenset[int]
    special: re.Pattern[str] | None
    control: re.Pattern[str] | None
    normalize: Callable[[str], str] = field(default=str, compare=False)

    @classmethod
    def of(cls, tokenizer: Any) -> ControlTokens:
        """Those of a tokenizer; it is asked for its chat template's turns once."""
        special = special_tokens(tokenizer)
        words = {*special.values(), *_turn_words(tokenizer)}
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        return cls(
            frozenset(special) - {tokenizer.unk_token_id},
            _pattern(special.values()),
            _pattern(words),
            normalizer.normalize_str if normalizer is not None else str,
        )

    def broken(self, text: str) -> str:
        """`text` with every control token broken up; unchanged where it spells none."""
        if self.control is None:
            return text
        text = self._without(self.control, text)
        if self.special is not None and self.special.search(normal := self.normalize(text)):
            text = self._without(self.special, normal)  # such as <|eot_id|> in full-width characters
        return text

    @staticmethod
    def _without(pattern: re.Pattern[str], text: str) -> str:
        for _ in range(2):  # breaking one up may spell another
            text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        while pattern.search(text):  # one character long, or made of others
            text = pattern.sub("", text)
        return text

    def forged(self, text: str, ids: Sequence[int]) -> bool:
        """Whether there are more special tokens in `ids` than are spelled in `text`, which they were made of."""
        found = sum(token in self.ids for token in ids)
        return found > (sum(1 for _ in self.special.finditer(text)) if self.special is not None else 0)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of all special tokens, named ones (bos, eos, ...) and added ones."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | dict(named)


def surrogate_at(text: str) -> int | None:
    """Where half a surrogate pair stands in a text, which no tokenizer takes; None if nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _turn_words(tokenizer: Any) -> set[str]:
    """What the chat template writes in brackets around the turns of a short talk; nothing where it refuses that."""
    for probe in (_PROBE, _PROBE[1:], _PROBE[1:2]):
        try:
            text = str(tokenizer.apply_chat_template(list[Message](probe), tokenize=False))
        except Exception:  # jinja2's own errors, raise_exception() in templates, a missing template
            continue
        places = [(text.find(turn["content"]), len(turn["content"])) for turn in probe]
        if min(places)[0] < 0:
            continue
        ends = [(0, 0), *places, (len(text), 0)]
        gaps = (text[at + length : after] for (at, length), (after, _) in pairwise(ends))
        return {word for gap in gaps for word in _BRACKETED.findall(gap)}
    return set()


def _pattern(words: Any) -> re.Pattern[str] | None:
    longest_first = sorted({word for word in words if word}, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
