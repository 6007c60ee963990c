"""What the console says of a training: a line per step in a log, a live one on a terminal, a summary per validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ups_rm.console import console


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


Fields = tuple[tuple[str, str, Callable[[float], str]], ...]
FIELDS: Fields = (
    ("critic/score/mean", "score", _plain(3)),
    ("reward/mean", "reward", _plain(3)),
    ("kl/mean", "kl", _plain(4)),
    ("response_length/mean", "length", _plain(0)),
    ("response_length/clip_ratio", "cut", _percent),
    ("text/refusal_rate", "refusals", _percent),
    ("text/distinct_2", "distinct-2", _plain(2)),
    ("group/zero_std_share", "flat groups", _percent),
    ("actor/loss", "loss", _plain(4)),
    ("actor/grad_norm", "grad", _plain(2)),
    ("actor/lr", "lr", lambda value: f"{value:.1e}"),
    ("perf/time_per_step", "time", lambda value: f"{value:.1f} s"),
)
"""Metric, word on the line, how it is written. A metric that is not logged is left out."""

LIVE: Fields = (
    ("critic/score/mean", "score", _plain(3)),
    ("kl/mean", "kl", _plain(4)),
    ("perf/throughput", "tokens/s", _plain(0)),
)
"""What stands beside step, elapsed time and time left on the live line."""

HELD_OUT: Fields = (
    ("unsafe/reward/mean", "unsafe", _plain(3)),
    ("benign/reward/mean", "benign", _plain(3)),
    ("judge_score", "second judge", _plain(3)),
    ("unsafe/refusal_rate", "refusals unsafe", _percent),
    ("benign/refusal_rate", "refusals benign", _percent),
    ("response_length/mean", "length", _plain(0)),
    ("distinct_2", "distinct-2", _plain(2)),
    ("repetition", "repetition", _percent),
    ("kl", "kl", _plain(4)),
    ("entropy", "entropy", _plain(2)),
)
"""The same for the held-out replies; without `val-aux/` and `@{n}`."""


class ConsoleLine:
    """Prints a run's metrics through the shared console: every step as a line in a log (a terminal has the live line),
    every validation as a summary with the change since the first one that this process saw."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        self.first: tuple[int, float] | None = None  # step and mean score of the first validation

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        of_step = {name: value for name, value in metrics.items() if not name.startswith(("val-", "alarm/"))}
        if not console.is_terminal and of_step.keys() - {"timing_s/testing"}:
            console.print(render_line(of_step, step, self.total_steps), soft_wrap=True, markup=False)
        score = next((value for name, value in metrics.items() if name.startswith("val-core/")), None)
        if score is not None:
            self.first = self.first or (step, score)
            console.print(render_validation(metrics, step, score, self.first), soft_wrap=True, markup=False)

    def finish(self) -> None:
        """Nothing to close."""


def render_line(metrics: Mapping[str, float], step: int, total_steps: int | None = None) -> str:
    """`step 12/60  score 0.412  reward 0.409  kl 0.0123 ...`.

    A batch with none of the known metrics shows what it has, so that nothing is logged in silence.
    """
    shown = _known(FIELDS, metrics) or [f"{name} {_or_dash(value, _four)}" for name, value in metrics.items()]
    return "  ".join([f"step {step}" if total_steps is None else f"step {step}/{total_steps}", *shown])


def render_validation(metrics: Mapping[str, float], step: int, score: float, first: tuple[int, float]) -> str:
    """`held-out, step 20: safe score 0.512 (+0.100 since step 0)  unsafe 0.401  benign 0.623  refusals ...`."""
    since = "" if first[0] == step else f" ({score - first[1]:+.3f} since step {first[0]})"
    named = {name.removeprefix("val-aux/").partition("@")[0]: value for name, value in metrics.items()}
    return "  ".join([f"held-out, step {step}: score {_or_dash(score, _plain(3))}{since}", *_known(HELD_OUT, named)])


def live_note(metrics: Mapping[str, float]) -> str:
    """`score 0.412  kl 0.0123  tokens/s 270`, for the live line."""
    return "  ".join(_known(LIVE, metrics))


def _known(fields: Fields, metrics: Mapping[str, float]) -> list[str]:
    return [f"{word} {_or_dash(metrics[name], write)}" for name, word, write in fields if name in metrics]


def _four(value: float) -> str:
    return f"{value:.4g}"


def _or_dash(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else "-"
