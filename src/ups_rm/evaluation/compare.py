"""Two policies on the same prompts: the numbers, the table and the pairs of replies that show what training did.

In: prompts, one reply each before and after, the RM's scores of both, further judges' verdicts. Out: `summary()` for
`summary.json`, tables, the pairs as JSONL. No model runs here, and the RM that scored is the one that was trained
against: read some pairs as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ups_rm.console import console
from ups_rm.data.prompts import categories_of
from ups_rm.durable import publishing, write_text
from ups_rm.errors import DataError
from ups_rm.evaluation.bootstrap import Interval, paired_bootstrap
from ups_rm.evaluation.figures import Replies, Reply, Verdict, group_figures, judge_figures, safety_figures
from ups_rm.evaluation.prompt_sets import GROUPS, group_of
from ups_rm.evaluation.refusal import is_refusal, refusal_label
from ups_rm.evaluation.tables import summary_table
from ups_rm.evaluation.text import common_opening, distinct_n, word_count
from ups_rm.types import Score

if TYPE_CHECKING:
    from ups_rm.data.prompts import PromptRow


@dataclass(frozen=True)
class LogprobSums:
    """Log-probabilities summed over each reply's tokens, nats, in the order of the replies.

    kl: log pi_after - log pi_before of after's replies. nll_before, nll_after: -log pi_before of the replies of before
    and of after, for their perplexity under the policy that training began with. None where not measured.
    """

    kl: Sequence[float] | None = None
    nll_before: Sequence[float] | None = None
    nll_after: Sequence[float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Replies before and after, prompt by prompt, with the interval of the safe score's mean difference.

    `score_before` and `score_after` are means over prompts of the mean over each prompt's replies.
    `length_unit` is "tokens" where the caller gave token counts and "words" otherwise. `kl` is the caller's: nats per
    response token from the reference. `judges` names the further judges.
    """

    prompts: list[PromptRow]
    before: list[Reply]
    after: list[Reply]
    safe_score: Interval
    score_before: float
    score_after: float
    kl: float
    length_unit: str
    judges: tuple[str, ...] = ()
    n_resamples: int = 10_000
    seed: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The evaluation's part of `summary.json`. A rate over no prompts (no benign ones, say) is None.

        `groups`, `categories` and `judges` are described in docs/evaluation.md; `about` is the caller's.
        """
        everything = Replies(self.prompts, self.before, self.after, self.n_resamples, self.seed)
        rows_of = {group: [i for i, prompt in enumerate(self.prompts) if group_of(prompt) == group] for group in GROUPS}
        groups = {group: everything.only(rows) for group, rows in rows_of.items() if rows}
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
            "groups": {group: group_figures(replies) for group, replies in groups.items()},
            "categories": {
                category: safety_figures(everything.only(rows)) for category, rows in self._by_category().items()
            },
            "judges": {
                judge: {group: judge_figures(replies, judge) for group, replies in groups.items()}
                for judge in self.judges
            },
            **self.about,
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
            console.print(f"\n[bold]{escape(prompt.messages[-1]['content'].strip())}[/bold]  ({group_of(prompt)})")
            for word, reply in (("before", self.before[i]), ("after ", self.after[i])):
                note = "  refusal" if reply.refusal else ""
                console.print(f"  {word} {reply.safe_score:.2f}{note}  {escape(reply.response.strip())}")

    def write(self, folder: Path) -> None:
        """`pairs.jsonl` and `comparison.json`, the summary, with manifests."""
        self.write_jsonl(folder / "pairs.jsonl")
        summary = json.dumps(self.summary(), indent=1, ensure_ascii=False)
        write_text(folder / "comparison.json", summary + "\n", manifest=True)

    def write_jsonl(self, file: Path) -> Path:
        """Write one line per prompt and reply: index, kind, group, categories, messages, and the `Reply` fields under
        "before" and "after"."""
        file = Path(file)
        with publishing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for prompt, before, after in zip(self.prompts, self.before, self.after, strict=True):
                row = {
                    "index": prompt.index,
                    "kind": prompt.kind,
                    "group": group_of(prompt),
                    "categories": list(categories_of(prompt)),
                    "messages": prompt.messages,
                    "before": asdict(before),
                    "after": asdict(after),
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        return file

    def _by_category(self) -> dict[str, list[int]]:
        """Rows of the unsafe prompts of each harm category, by name; a prompt may be of several."""
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            if group_of(prompt) == "unsafe":
                for category in categories_of(prompt):
                    rows.setdefault(category, []).append(i)
        return dict(sorted(rows.items()))

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
    logprobs: LogprobSums | None = None,
    judges: Mapping[str, tuple[Sequence[Verdict], Sequence[Verdict]]] | None = None,
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
        logprobs: for KL and perplexity by group; needs the lengths in tokens.
        judges: verdicts of further judges by name, on the replies before and after.
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
    of_judges = judges or {}
    sums = logprobs if logprobs is not None and in_tokens else LogprobSums()
    replies_before = _replies(
        before,
        scores_before,
        lengths_before if in_tokens else None,
        nll=sums.nll_before,
        kl=None,
        judges={name: given[0] for name, given in of_judges.items()},
    )
    replies_after = _replies(
        after,
        scores_after,
        lengths_after if in_tokens else None,
        nll=sums.nll_after,
        kl=sums.kl,
        judges={name: given[1] for name, given in of_judges.items()},
    )
    pairs = Replies(prompts, replies_before, replies_after).by_prompt(
        [reply.safe_score for reply in replies_before], [reply.safe_score for reply in replies_after]
    )
    by_prompt = list(zip(*pairs, strict=True))
    return Comparison(
        prompts=list(prompts),
        before=replies_before,
        after=replies_after,
        safe_score=paired_bootstrap(*by_prompt, n_resamples=n_resamples, seed=seed),
        score_before=math.fsum(by_prompt[0]) / len(pairs),
        score_after=math.fsum(by_prompt[1]) / len(pairs),
        kl=float(kl),
        length_unit="tokens" if in_tokens else "words",
        judges=tuple(of_judges),
        n_resamples=n_resamples,
        seed=seed,
    )


def _replies(
    responses: Sequence[str],
    scores: Sequence[Score],
    lengths: Sequence[int] | None,
    *,
    nll: Sequence[float] | None,
    kl: Sequence[float] | None,
    judges: Mapping[str, Sequence[Verdict]],
) -> list[Reply]:
    return [
        Reply(
            response=response,
            logit=float(score.logit),
            safe_score=float(score.safe_score),
            length=int(lengths[i]) if lengths is not None else word_count(response),
            refusal=is_refusal(response),
            refusal_label=refusal_label(response),
            nll=None if nll is None else nll[i],
            kl=None if kl is None else kl[i],
            judges={name: verdicts[i] for name, verdicts in judges.items()},
            helpfulness=score.helpfulness,
        )
        for i, (response, score) in enumerate(zip(responses, scores, strict=True))
    ]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
