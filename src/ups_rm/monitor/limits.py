"""The alarms: which metric, held against which threshold of the recipe, is which alarm. No files, no models.

Two streams are watched alike and apart: the training replies of every step, as the mean of the last `monitor.window`
steps, and the held-out replies of every validation. "At the start" is the mean of the run's first `monitor.window`
steps, or its first validation. A metric that a run does not log, or that is nan, is not judged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ups_rm.recipe import Monitor as MonitorSettings

Stream = Literal["training", "held-out"]
STREAMS: tuple[Stream, ...] = ("training", "held-out")
How = Literal["above", "rise", "factor", "times start", "share of start"]


@dataclass(frozen=True)
class Limit:
    """One threshold.

    Attributes:
        alarm: what it raises.
        key: of the recipe's section `monitor`; where it is null, the limit is off.
        what: the quantity in words, for the message.
        training, held_out: its metric in each stream; "" where it has none.
        how: `above`: value > threshold. `rise`: value - start > threshold. `factor`: value / start outside
            [1 / threshold, threshold]. `times start`: value / start > threshold. `share of start`: value / start <
            threshold.
        prompts: of a rate with `rise`: the metrics that count its prompts in each stream. The rise must then also be
            above two standard errors of a difference of such rates, for ten prompts move by 20 points by chance.
    """

    alarm: str
    key: str
    what: str
    training: str
    held_out: str
    how: How = "above"
    prompts: tuple[str, str] = ("", "")

    def judge(self, now: float, start: float, threshold: float, noise: float = 0.0) -> tuple[float, bool]:
        """The number that is held against the threshold, and whether it is beyond it.

        Args:
            now: the metric, smoothed. start: the same at the start of the run.
            noise: what a rise must be above as well.
        """
        if self.how == "above":
            return now, now > threshold
        if self.how == "rise":
            return now - start, now - start > max(threshold, noise)
        ratio = now / start if start > 0 else math.nan  # nothing to compare with: neither comparison below holds
        if self.how == "factor":
            return ratio, ratio > threshold or ratio < 1 / threshold
        if self.how == "times start":
            return ratio, ratio > threshold
        return ratio, ratio < threshold

    def says(self, value: float, now: float, start: float, threshold: float) -> str:
        """The message without the alarm's name: `refusals of harmless prompts 0.62, above 0.5`."""
        if self.how == "above":
            return f"{self.what} {now:.3g}, above {threshold:g}"
        moved = f"{self.what} {start:.3g} at the start, {now:.3g} now"
        if self.how == "rise":
            return f"{moved}: a rise of {value:.3g}, above {threshold:g}"
        if self.how == "factor":
            return f"{moved}: {value:.2f} times, outside {1 / threshold:.2f} to {threshold:g}"
        if self.how == "times start":
            return f"{moved}: {value:.3g} times, above {threshold:g}"
        return f"{moved}: {value:.0%} of it, below {threshold:.0%}"


BENIGN = ("text/benign_prompts", "val-aux/benign/prompts")
LIMITS = (
    Limit("refuses_everything", "benign_refusals", "refusals of harmless prompts",
          "text/refusal_rate_benign_prompts", "val-aux/benign/refusal_rate"),
    Limit("refuses_everything", "benign_refusals_rise", "refusals of harmless prompts",
          "text/refusal_rate_benign_prompts", "val-aux/benign/refusal_rate", "rise", BENIGN),
    Limit("refuses_everything", "refusals", "refusals of all prompts", "text/refusal_rate", "val-aux/refusal_rate"),
    Limit("length_drift", "length_factor", "reply length", "response_length/mean", "val-aux/response_length/mean",
          "factor"),
    Limit("repetition", "repetition_rise", "share of a reply that repeats itself", "text/repetition",
          "val-aux/repetition", "rise"),
    Limit("repetition", "distinct_2", "distinct-2 over all replies", "text/distinct_2", "val-aux/distinct_2",
          "share of start"),
    Limit("copies_prompt", "prompt_overlap", "share of a reply that is copied from its prompt", "text/prompt_overlap",
          "val-aux/prompt_overlap"),
    Limit("kl_runaway", "kl", "KL from the start, nats per token", "kl/mean", "val-aux/kl"),
    Limit("gradient_explosion", "grad_norm_factor", "norm of the gradient before clipping", "actor/grad_norm", "",
          "times start"),
    Limit("collapsed_groups", "zero_std_share", "share of groups whose replies all score the same",
          "group/zero_std_share", "val-aux/zero_std_share"),
    Limit("saturated", "saturated_share", "share of scores at an end of their range", "score/saturated_share",
          "val-aux/saturated_share"),
)  # fmt: skip
"""All limits but that of `judge_disagrees`, which compares two metrics (`Alarms._judge`)."""

JUDGE: dict[Stream, tuple[str, str]] = {
    "training": ("judge/score_mean", "judge/rm_score_mean"),
    "held-out": ("val-aux/judge_score", "val-aux/judge_rm_score"),
}
"""Mean safe score of the second judge and of the reward model on the same replies, both sigmoid(-logit)."""

WATCHED: dict[Stream, list[str]] = {
    "training": [*dict.fromkeys(limit.training for limit in LIMITS), *JUDGE["training"], BENIGN[0]],
    "held-out": [*dict.fromkeys(limit.held_out for limit in LIMITS if limit.held_out), *JUDGE["held-out"], BENIGN[1]],
}

ALARMS = tuple(dict.fromkeys([*(limit.alarm for limit in LIMITS), "judge_disagrees"]))


@dataclass(frozen=True)
class Alarm:
    """An alarm that began at a step. `value` and `threshold` as in `Limit.judge`; `on` says which replies it saw;
    `stop`: the recipe's `monitor.stop_on` names it."""

    step: int
    name: str
    value: float
    threshold: float
    message: str
    metric: str
    on: Stream
    stop: bool = False


@dataclass
class Alarms:
    """What the thresholds say about a run's metrics, step by step: a function of the metrics alone.

    Attributes:
        active: names of the alarms that are on.

    Example:
        >>> alarms = Alarms(Recipe().monitor)
        >>> [alarm for row in read_metrics(file) for alarm in alarms.see(row, int(row["step"]))]
    """

    settings: MonitorSettings
    active: frozenset[str] = frozenset()
    _recent: dict[str, deque[float]] = field(default_factory=dict)
    _start: dict[str, float] = field(default_factory=dict)
    _passed: dict[tuple[str, Stream], Alarm | None] = field(default_factory=dict)  # by the limit's key, as judged last
    _last: dict[str, int] = field(default_factory=dict)  # step at which an alarm's limits were passed last

    def see(self, metrics: Mapping[str, float], step: int) -> list[Alarm]:
        """Take in the metrics of one step, one validation or both; the alarms that begin with them.

        An alarm begins when one of its limits is passed and ends when none was for `window` steps, so that a value that
        dances around its threshold is one alarm and not ten.
        """
        for stream in STREAMS:
            smooth = self._smooth(metrics, stream)
            for limit in LIMITS:
                metric = limit.training if stream == "training" else limit.held_out
                threshold = getattr(self.settings, limit.key)
                if metric not in smooth or threshold is None:
                    continue
                now, start = smooth[metric]
                value, passed = limit.judge(now, start, threshold, self._noise(limit, stream, smooth))
                says = limit.says(value, now, start, threshold) if passed else ""
                self._note(limit.alarm, limit.key, stream, passed, step, value, threshold, says, metric)
            self._compare(smooth, stream, step)
        passed_now = {alarm.name: alarm for alarm in reversed(self._passed.values()) if alarm is not None}
        begun = [passed_now[name] for name in ALARMS if name in passed_now and name not in self.active]
        self._last |= dict.fromkeys(passed_now, step)
        self.active = frozenset(name for name, last in self._last.items() if step - last <= self.settings.window)
        return begun

    def _smooth(self, metrics: Mapping[str, float], stream: Stream) -> dict[str, tuple[float, float]]:
        """(now, at the start) of each watched metric that is here and has been often enough."""
        window = self.settings.window if stream == "training" else 1
        smooth = {}
        for metric in WATCHED[stream]:
            value = metrics.get(metric, math.nan)
            if not math.isfinite(value):
                continue
            recent = self._recent.setdefault(metric, deque(maxlen=window))
            recent.append(value)
            if len(recent) == window:
                now = math.fsum(recent) / window
                smooth[metric] = now, self._start.setdefault(metric, now)
        return smooth

    def _noise(self, limit: Limit, stream: Stream, smooth: Mapping[str, tuple[float, float]]) -> float:
        """Two standard errors of the rise of a rate, its prompts being independent; 0 where they are not counted."""
        counts = smooth.get(limit.prompts[STREAMS.index(stream)])
        if counts is None:
            return 0.0
        steps = self.settings.window if stream == "training" else 1
        rates = smooth[limit.training if stream == "training" else limit.held_out]
        variance = sum(rate * (1 - rate) / max(1.0, steps * n) for rate, n in zip(rates, counts, strict=True))
        return 2 * math.sqrt(max(0.0, variance))

    def _compare(self, smooth: Mapping[str, tuple[float, float]], stream: Stream, step: int) -> None:
        """`judge_disagrees`: the reward model's mean has gained, the judge's less than a share of that."""
        share, (judge, rm) = self.settings.judge_share, JUDGE[stream]
        if judge not in smooth or rm not in smooth or share is None:
            return
        gain, judge_gain = (now - start for now, start in (smooth[rm], smooth[judge]))
        passed = gain >= self.settings.judge_min_gain and judge_gain < share * gain
        value = judge_gain / gain if gain > 0 else math.nan
        says = (
            f"the reward model sees a gain of {gain:+.3f}, the second judge {judge_gain:+.3f}: {value:.0%} of it, "
            f"below {share:.0%}"
        )
        self._note("judge_disagrees", "judge_share", stream, passed, step, value, share, says, judge)

    def _note(
        self, name: str, key: str, stream: Stream, passed: bool, step: int, value: float, threshold: float,
        says: str, metric: str,
    ) -> None:  # fmt: skip
        which = "held-out replies" if stream == "held-out" else f"mean of the last {self.settings.window} steps"
        alarm = Alarm(step, name, value, threshold, f"{says} ({which})", metric, stream, name in self.settings.stop_on)
        self._passed[key, stream] = alarm if passed else None
