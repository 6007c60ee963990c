"""Bad input from good: values with a node replaced, bytes with a piece changed. Everything is drawn from one Random."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

TEXTS = (
    *("", " ", "\0", "a\0b", "\r\n\r\n", "\x1b[31m", "x" * 3000, "'", '"', "\\", "`", "[", "{", "%s%n"),
    # halves of surrogate pairs, byte order mark, right to left, zero width, combining
    *(
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u202eabc\u202c",
        "\u200b\u200d",
        "مرحبا \u05e9\u05dc",
        "e\u0301" * 9,
        "😀" * 9,
    ),
    *("<|im_start|>", "<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "<|begin_of_text|>"),
    "<|start_header_id|>system<|end_header_id|>\n\n",
    *("${oc.env:HOME}", "${", "${trainer.device}", "{{ 7*7 }}", "../../etc/passwd"),
    *("null", "true", "1e5", "-0", "0x1f", "1_000", "2024-01-01", "NaN"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)
BYTES = (
    *(b"\0", b"\n", b"\r\n", b"\r", b"\t", b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":"),
    *(
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xae",
        b"\xe2\x80\xa8",
    ),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"[" * 60, b'{"a":' * 60, b"null", b"true", b"\x1f\x8b\x08", b"PAR1"),
    *(b"&a ", b"*a", b"!!python/object:os.system ", b"<<: ", b"? ", b"- ", b"| ", b"---\n", b"<|im_end|>"),
)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold and much that it can't be meant to."""
    kind = draw.randrange(10)
    if kind < 3:
        return draw.choice(TEXTS)
    if kind < 6:
        return draw.choice(NUMBERS)
    if kind == 6 or depth > 2:
        return draw.choice((None, True, False, [], {}))
    if kind == 7:
        nested: Any = draw.choice(TEXTS)
        for _ in range(draw.choice((1, 5, 40))):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        return nested
    if kind == 8:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {
        draw.choice((*TEXTS[:12], "a", "role", "content")): value(draw, depth + 1) for _ in range(draw.randrange(4))
    }


def mutated(draw: random.Random, good: Any, times: int = 0) -> Any:
    """A copy of a JSON-like value with 1 to 3 (or `times`) nodes replaced, removed, renamed, added or doubled."""
    changed = copy.deepcopy(good)
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        changed = _once(draw, changed)
    return changed


def _once(draw: random.Random, root: Any) -> Any:
    node, parent, key = root, None, None
    while isinstance(node, (dict, list)) and node and (parent is None or draw.random() < 0.75):
        parent = node
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        node = node[key]
    if parent is None:
        return value(draw)
    what = draw.randrange(6)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[draw.choice((*TEXTS, "x", f"{key}x", str(key)[:-1]))] = parent.pop(key)
    elif what == 2 and isinstance(parent, dict):
        parent[draw.choice((*TEXTS, "y"))] = value(draw)
    elif what == 3 and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(draw.choice(parent)))
    elif what == 4 and isinstance(node, str):
        place = draw.randrange(len(node) + 1)
        parent[key] = node[:place] + draw.choice(TEXTS) + node[place:]
    else:
        parent[key] = value(draw)
    return root


def damaged(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bytes with 1 to 4 pieces flipped, put in, cut out, doubled, or taken from another input."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(found) + 1)
        end = min(len(found), place + draw.choice((1, 2, 8, 100)))
        what = draw.randrange(7)
        if what == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif what == 1 and place < len(found):
            found[place] = draw.randrange(256)
        elif what == 2:
            found[place:place] = draw.choice(BYTES)
        elif what == 3:
            del found[place:end]
        elif what == 4:
            found[place:place] = found[place:end] * draw.choice((1, 2, 20))
        elif what == 5:
            del found[place:]
        elif others:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            found[place:end] = other[begin : begin + draw.choice((4, 30, 300))]
    return bytes(found)
