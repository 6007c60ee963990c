"""One line of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Installed versions of packages, those that are not there left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Result:
    """What was measured: ours, and the peer's where there is one; ratio = ours / peer, floor is what it must reach."""

    name: str
    ours: float
    peer: float | None
    unit: str
    peer_name: str | None = None
    floor: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.ours / self.peer if self.peer else None)
