"""What a check says, and all checks of one folder. No model, no torch: cards, servers and pages can read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Result:
    """Verdict, finding in words, the number that shows it, the limit it is held against, and the way out.

    `details` are further figures and examples, plain values for JSON.
    """

    verdict: Verdict
    finding: str
    number: float | None = None
    limit: float | None = None
    way_out: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check(Result):
    """A result with the name of its question and the section that it stands in."""

    name: str = ""
    section: str = ""


@dataclass(frozen=True)
class CheckReport:
    """All checks of one model, by section; `logits` are its answers to BATTERY, in that order.

    folder: of a model asked from outside, its address or function, and dtype is empty.
    """

    folder: Path | str
    dtype: str
    checks: tuple[Check, ...]
    logits: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """No check failed (warnings may be there)."""
        return not self.of("fail")

    def of(self, *verdicts: Verdict) -> list[Check]:
        """The checks with one of these verdicts."""
        return [check for check in self.checks if check.verdict in verdicts]

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become null."""
        return {
            "folder": str(self.folder),
            "dtype": self.dtype,
            "ok": self.ok,
            "checks": [_plain({"name": c.name, "section": c.section} | asdict(c)) for c in self.checks],
            "logits": _plain(list(self.logits)),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else None  # NaN compares false
    return value
