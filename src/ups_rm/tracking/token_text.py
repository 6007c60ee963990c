"""Where each token of a reply ends in its text, so that a number per token can be shown on the text itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a decoder writes for a token that is only part of a character."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most."""
SLACK = 4
"""Characters that may stand before a token's own text: blanks that decoding one token alone leaves out."""


def token_ends(tokenizer: Any, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> list[list[int]]:
    """End of each token in its reply's text, in characters, never falling.

    Every distinct token is decoded once, by itself, and found again in the text; parts of a character are put together
    first. A token that is not found ends where the one before it does: an end token, or the first bytes of a character.

    Args:
        ids: token ids of each reply, without padding.
        texts: each reply as it was decoded as a whole.
    """
    pieces: dict[int, str] = {}
    for token in {token for row in ids for token in row}:
        pieces[token] = tokenizer.decode([token], skip_special_tokens=True)
    return [_ends(tokenizer, row, pieces, text) for row, text in zip(ids, texts, strict=True)]


def _ends(tokenizer: Any, ids: Sequence[int], pieces: Mapping[int, str], text: str) -> list[int]:
    ends: list[int] = []
    position = 0
    parts: list[int] = []  # tokens since `position` that are parts of characters
    lost = 0  # how many of them stand for nothing that was found
    for token in ids:
        piece = pieces[token]
        if BROKEN in piece:
            parts = [*parts, token][-LONGEST_CHARACTER:]
            lost += 1
            piece = tokenizer.decode(parts, skip_special_tokens=True)
        if piece and BROKEN not in piece:
            found = text.find(piece, position, position + len(piece) + SLACK * (1 + lost))
            if found >= 0:
                if lost and BROKEN not in pieces[token]:
                    ends[-1] = found  # what lies between belongs to the parts before
                position, parts, lost = found + len(piece), [], 0
        ends.append(position)
    if lost:
        ends[-1] = len(text)
    return ends
