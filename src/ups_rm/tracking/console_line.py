"""One readable line per step: the dozen numbers that tell whether the training is going well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ups_rm.console import console


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
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


class ConsoleLine:
    """Prints a step's metrics as one line through the shared console."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        console.print(render_line(metrics, step, self.total_steps), soft_wrap=True, markup=False)

    def finish(self) -> None:
        """Nothing to close."""


def render_line(metrics: Mapping[str, float], step: int, total_steps: int | None = None) -> str:
    """`step 12/60  score 0.412  reward 0.409  kl 0.0123 ...`, then every validation metric under its own name.

    A batch with none of the known metrics shows what it has, so that nothing is logged in silence.
    """
    parts = [f"step {step}" if total_steps is None else f"step {step}/{total_steps}"]
    parts += [f"{word} {_or_dash(metrics[name], write)}" for name, word, write in FIELDS if name in metrics]
    rest = [name for name in metrics if name.startswith("val") or len(parts) == 1]
    parts += [f"{name} {_or_dash(metrics[name], lambda value: f'{value:.4g}')}" for name in rest]
    return "  ".join(parts)


def _or_dash(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else "-"
