"""One line of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

SMALLER_IS_BETTER = ("s", "CPU s", "MB", "logit")


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
    """What was measured: ours, and the peer's where there is one.

    Attributes:
        ratio: how many times better than the peer we are, above 1 in our favour: peer / ours where less is better
            (seconds, memory), ours / peer elsewhere (tokens/s).
        floor: what the machine could do at best, in `unit`.
        required: the ratio that it must reach.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    peer_name: str | None = None
    floor: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    required: float | None = None
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        better, worse = (self.peer, self.ours) if self.unit in SMALLER_IS_BETTER else (self.ours, self.peer)
        object.__setattr__(self, "ratio", better / worse if better is not None and worse else None)

    @property
    def floor_share(self) -> float | None:
        """Ours against the floor, 1 at the machine's limit."""
        if self.floor is None:
            return None
        return self.floor / self.ours if self.unit in SMALLER_IS_BETTER else self.ours / self.floor
