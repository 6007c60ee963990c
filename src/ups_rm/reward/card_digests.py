"""A digest for every single field of a card, so that a field that was changed by hand is found by its name.

What a folder can disprove (widths, template, golden answers) is compared with the folder itself (card.py). The rest
(labels, figures, a golden logit's last digit) can only be compared with what was written: that is what this is for. It
guards against slips of the hand, not against somebody who computes new digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ups_rm.errors import RMError

WAY_OUT = (
    "\n  fix: cards are not edited by hand; `ups-rm rm card FOLDER --force` with --labels, --bos, --end-token, "
    "--truncation-side or --max-length writes a new one"
)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no object and no list of objects: `golden[0].messages[1].content`."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def digests_of(values: dict[str, Any]) -> dict[str, str]:
    """Eight hex digits of sha256 for each leaf, as JSON would give it back."""
    return {path: _digest(path, value) for path, value in leaves(_as_json(values))}


def verify_digests(values: dict[str, Any], digests: dict[str, str], where: str) -> None:
    """A card's values against the digests that stand in it.

    Raises:
        RMError: the first field that differs, is new, or is gone.
    """
    found = digests_of(values)
    for path in [*found, *digests]:
        if path not in digests:
            raise RMError(f"{where}: {path} was added after the card was written (there is no digests.{path}){WAY_OUT}")
        if path not in found:
            raise RMError(f"{where}: {path} is gone since the card was written (digests.{path} has no field){WAY_OUT}")
        if found[path] != digests[path]:
            value = str(dict(leaves(_as_json(values)))[path])
            raise RMError(
                f"{where}: {path} is {value[:60]!r}, but the card was written with another value (digests.{path} is "
                f"{digests[path]!r}, of what stands there it is {found[path]!r}){WAY_OUT}"
            )


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As a file would give them back: tuples are lists."""
    return dict(json.loads(json.dumps(values)))


def _digest(path: str, value: Any) -> str:
    text = json.dumps([path, value], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:8]
