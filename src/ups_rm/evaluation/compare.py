"""Two policies on the same prompts: the numbers, the table and the pairs of replies that show what training did.

In: prompts, one reply each before and after, the RM's scores of both. Out: `summary()` for `summary.json`, a table, the
pairs as JSONL. No model runs here, and the RM that scored is the one that was trained against: read some pairs as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ups_rm.console import console
from ups_rm.errors import DataError
from ups_rm.evaluation.bootstrap import Interval, paired_bootstrap
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.evaluation.text import common_opening, distinct_n, word_count
from ups_rm.types import Score

if TYPE_CHECKING:
    from ups_rm.data.prompts import PromptRow


@dataclass(frozen=True)
class Reply:
    """One policy's reply to one prompt and what is known of it. `length` in tokens or words, see `Comparison`."""

    response: str
    logit: float
    safe_score: float
    length: int
    refusal: bool


@dataclass(frozen=True)
class Comparison:
    """Replies before and after, prompt by prompt, with the interval of the safe score's mean difference.

    `score_before` and `score_after` are means over prompts of the mean over each prompt's replies.
    `length_unit` is "tokens" where the caller gave token counts and "words" otherwise. `kl` is the caller's: nats per
    response token from the reference.
    """

    prompts: list[PromptRow]
    before: list[Reply]
    after: list[Reply]
    safe_score: Interval
    score_before: float
    score_after: float
    kl: float
    length_unit: str

    def summary(self) -> dict[str, Any]:
        """The evaluation's part of `summary.json`. A rate over no prompts (no benign ones, say) is None."""
        return {
            "safe_score": {
                "before": self.score_before,
                "after": self.score_after,
                "diff": self.safe_score.diff,
                "ci95": [self.safe_score.low, self.safe_score.high],
                "n": self.safe_score.n,
            },
            "refusal_rate": {kind: self._refusal_rate(kind) for kind in ("unsafe", "benign")},
            "length": {
                "before": _mean([reply.length for reply in self.before]),
                "after": _mean([reply.length for reply in self.after]),
            },
            "distinct_2": {
                "before": _none_if_nan(distinct_n([reply.response for reply in self.before], 2)),
                "after": _none_if_nan(distinct_n([reply.response for reply in self.after], 2)),
            },
            "kl": self.kl,
        }

    def table(self) -> Table:
        """Before, after and the change of each number, as a table for the console."""
        return summary_table(self.summary(), self.length_unit)

    def show_pairs(self, count: int = 5) -> None:
        """Print how most replies begin, then `count` prompts with both replies, spread evenly: not the best ones."""
        before, after = (common_opening([reply.response for reply in side]) for side in (self.before, self.after))
        console.print(
            f'replies that begin with the same two words: before {before[0]:.0%} ("{escape(before[1])}"), '
            f'after {after[0]:.0%} ("{escape(after[1])}")'
        )
        for i in self._spread(count):
            prompt = self.prompts[i]
            console.print(f"\n[bold]{escape(prompt.messages[-1]['content'].strip())}[/bold]  ({prompt.kind})")
            for word, reply in (("before", self.before[i]), ("after ", self.after[i])):
                note = "  refusal" if reply.refusal else ""
                console.print(f"  {word} {reply.safe_score:.2f}{note}  {escape(reply.response.strip())}")

    def write_jsonl(self, file: Path) -> Path:
        """Write one line per prompt: index, kind, messages, and the `Reply` fields under "before" and "after"."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            for prompt, before, after in zip(self.prompts, self.before, self.after, strict=True):
                row = {
                    "index": prompt.index,
                    "kind": prompt.kind,
                    "messages": prompt.messages,
                    "before": vars(before),
                    "after": vars(after),
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(file)
        return file

    def _refusal_rate(self, kind: str) -> dict[str, float | None]:
        rows = [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind]
        return {
            "before": _mean([self.before[i].refusal for i in rows]),
            "after": _mean([self.after[i].refusal for i in rows]),
        }

    def _spread(self, count: int) -> list[int]:
        """Rows at equal distances, unsafe and benign prompts each in proportion and at least one where there is one."""
        picked: list[int] = []
        total = len(self.prompts)
        rows_of = {
            kind: [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind] for kind in ("unsafe", "benign")
        }
        benign = round(count * len(rows_of["benign"]) / total)
        benign = min(max(benign, min(1, len(rows_of["benign"]))), count - min(1, len(rows_of["unsafe"])))
        for kind, share in (("unsafe", count - benign), ("benign", benign)):
            rows = rows_of[kind]
            share = min(share, len(rows))
            picked += [rows[k * len(rows) // share] for k in range(share)]
        return picked


def summary_table(summary: dict[str, Any], length_unit: str = "tokens") -> Table:
    """The table of a `Comparison.summary()`, or of a `summary.json` read from disk."""
    low, high = summary["safe_score"]["ci95"]
    table = Table(title=f"Before and after, {summary['safe_score']['n']} held-out prompts")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    score = _row("safe score", summary["safe_score"], 3)
    table.add_row(*score[:3], f"{score[3]}  95% [{low:+.3f}, {high:+.3f}]")
    table.add_row(*_row("refusals, unsafe prompts", summary["refusal_rate"]["unsafe"], 1, percent=True))
    table.add_row(*_row("refusals, benign prompts", summary["refusal_rate"]["benign"], 1, percent=True))
    table.add_row(*_row(f"length, {length_unit}", summary["length"], 1))
    table.add_row(*_row("distinct-2", summary["distinct_2"], 3))
    table.add_row("KL, nats per token", "", f"{summary['kl']:.4f}", "")
    return table


def compare(
    prompts: list[PromptRow],
    before: list[str],
    after: list[str],
    scores_before: list[Score],
    scores_after: list[Score],
    *,
    kl: float,
    lengths_before: Sequence[int] | None = None,
    lengths_after: Sequence[int] | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the replies of two policies to the same prompts.

    Args:
        prompts: one per reply; a prompt (by `index`) may occur several times, with a reply each time. The interval is
            over prompts: replies to the same one are averaged first, and `n` counts prompts.
        before, after: replies, in the order of `prompts`.
        scores_before, scores_after: what the RM says about them.
        kl: mean KL of the policy after training from the one before, nats per response token.
        lengths_before, lengths_after: tokens of each reply; without both, lengths are counted in words.
        n_resamples, seed: of the bootstrap.

    Raises:
        DataError: lists of different lengths, or empty.
    """
    counts = [len(part) for part in (prompts, before, after, scores_before, scores_after)]
    counts += [len(lengths) for lengths in (lengths_before, lengths_after) if lengths is not None]
    if len(set(counts)) > 1 or not prompts:
        raise DataError(
            f"before and after must answer the same prompts: {counts[0]} prompts, {counts[1]} and {counts[2]} replies, "
            f"{counts[3]} and {counts[4]} scores{f', {counts[5:]} lengths' if counts[5:] else ''}"
        )
    in_tokens = lengths_before is not None and lengths_after is not None
    scores_by_prompt = [_by_prompt(prompts, scores) for scores in (scores_before, scores_after)]
    return Comparison(
        prompts=list(prompts),
        before=_replies(before, scores_before, lengths_before if in_tokens else None),
        after=_replies(after, scores_after, lengths_after if in_tokens else None),
        safe_score=paired_bootstrap(*scores_by_prompt, n_resamples=n_resamples, seed=seed),
        score_before=math.fsum(scores_by_prompt[0]) / len(scores_by_prompt[0]),
        score_after=math.fsum(scores_by_prompt[1]) / len(scores_by_prompt[1]),
        kl=float(kl),
        length_unit="tokens" if in_tokens else "words",
    )


def _by_prompt(prompts: Sequence[PromptRow], scores: Sequence[Score]) -> list[float]:
    """Mean safe score of each prompt, in the order in which the prompts first occur."""
    members: dict[int, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        members.setdefault(prompt.index, []).append(float(score.safe_score))
    return [math.fsum(values) / len(values) for values in members.values()]


def _replies(responses: Sequence[str], scores: Sequence[Score], lengths: Sequence[int] | None) -> list[Reply]:
    return [
        Reply(
            response=response,
            logit=float(score.logit),
            safe_score=float(score.safe_score),
            length=int(lengths[i]) if lengths is not None else word_count(response),
            refusal=is_refusal(response),
        )
        for i, (response, score) in enumerate(zip(responses, scores, strict=True))
    ]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _row(
    name: str, numbers: dict[str, float | None], digits: int, *, percent: bool = False
) -> tuple[str, str, str, str]:
    before, after = numbers["before"], numbers["after"]
    if before is None or after is None:
        return name, "-", "-", "-"
    scale, unit, change_unit = (100, "%", " points") if percent else (1, "", "")
    change = f"{scale * (after - before):+.{digits}f}{change_unit}"
    return name, f"{scale * before:.{digits}f}{unit}", f"{scale * after:.{digits}f}{unit}", change
