"""Direction: does the less safe reply get the higher logit, and the better one the higher helpfulness logit?

AUC and pairwise accuracy with bootstrap intervals.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ups_rm.reward.doctor.exam import DataExam
from ups_rm.reward.doctor.labelled import Labelled
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.head_metrics import auc, cluster_interval, pair_wins


@dataclass(frozen=True)
class Figures:
    """How well logits tell labels apart. Intervals: 95% percentile bootstrap over prompts; NaN where none is known."""

    texts: int
    prompts: int
    pairs: int
    auc: float
    auc_ci95: tuple[float, float]
    pairwise_accuracy: float
    pairwise_ci95: tuple[float, float]


def figures(data: Labelled, logits: Tensor) -> Figures:
    """AUC over texts with an uncontradicted label, pairwise accuracy over pairs. `logits` has shape (N,)."""
    known = (data.unsafe == 0) | (data.unsafe == 1)
    wins = pair_wins(logits, data.pairs)
    return Figures(
        texts=int(known.sum()),
        prompts=len(data.prompt_id.unique()),
        pairs=len(data.pairs),
        auc=auc(logits[known], data.unsafe[known]),
        auc_ci95=auc_interval(logits[known], data.unsafe[known], data.prompt_id[known]),
        pairwise_accuracy=wins.double().mean().item(),
        pairwise_ci95=cluster_interval(wins, data.prompt_id[data.pairs[:, 0]]),
    )


def auc_interval(
    logits: Tensor, labels: Tensor, groups: Tensor, *, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the AUC, whole groups (prompts) drawn with replacement. Shapes (N,).

    Samples of one class only are left out; NaN if there is no other.
    """
    generator = torch.Generator().manual_seed(seed)
    _, inverse = torch.unique(groups, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    members = [(inverse == group).nonzero()[:, 0] for group in range(count)]
    found = []
    for _ in range(n_resamples if count else 0):
        drawn = torch.cat([members[i] for i in torch.randint(count, (count,), generator=generator).tolist()])
        found.append(auc(logits[drawn], labels[drawn]))
    known = torch.tensor([value for value in found if value == value], dtype=torch.float64)
    if not len(known):
        return float("nan"), float("nan")
    low, high = torch.quantile(known, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def direction(exam: DataExam) -> Result:
    """Fails as flipped sign if AUC or pairwise accuracy lies below chance with its whole interval."""
    assert exam.data is not None
    found = figures(exam.data, exam.data_logits)
    share, (low, high), (pair_low, pair_high) = found.pairwise_accuracy, found.auc_ci95, found.pairwise_ci95
    finding = (
        f"AUC {found.auc:.3f} [{low:.3f}, {high:.3f}] on {found.texts} texts; the less safe reply has the higher logit "
        f"in {share:.1%} [{pair_low:.1%}, {pair_high:.1%}] of {found.pairs} pairs ({exam.data.source})"
    )
    details = asdict(found) | {"source": exam.data.source, "rows_in_source": exam.data.of_rows}
    above, below = low > 0.5 or pair_low > 0.5, high < 0.5 or pair_high < 0.5
    if below and not above:
        way_out = "negate the output layer once (docs/guides/scores-and-signs.md), or turn the labels round"
        if exam.kind != "myrm":
            way_out = (
                f"say what its number means, now {exam.output}: --output, in a recipe reward_model.model.output"
                + (" (or the head was never trained: a random one may point anywhere)" if exam.is_folder else "")
            )
        return Result("fail", f"flipped sign: {finding}", found.auc, 0.5, way_out, details)
    if below or not above:
        way_out = "no better than a coin: more pairs (--data, --max-pairs), or a better head"
        return Result("warn", f"not told from chance: {finding}", found.auc, 0.5, way_out, details)
    return Result("pass", finding, found.auc, 0.5, "", details)


def helpfulness(exam: DataExam) -> Result:
    """The second head on pairs with `better_response_id`: fails as flipped sign if it lies below chance with its whole
    interval, warns if the interval has 0.5 in it."""
    assert exam.data is not None
    pairs = exam.data.better
    if not len(pairs):
        return Result("skip", f"no row of {exam.data.source} has better_response_id")
    wins = pair_wins(exam.data_helpfulness, pairs)
    of_prompt = exam.data.prompt_id[pairs[:, 0]]
    share, (low, high) = wins.double().mean().item(), cluster_interval(wins, of_prompt)
    safest = pair_wins(-exam.data_logits, pairs).double().mean().item()
    finding = (
        f"the better reply has the higher helpfulness logit in {share:.1%} [{low:.1%}, {high:.1%}] of {len(pairs)} "
        f"pairs ({exam.data.source}), the lower unsafety logit in {safest:.1%}"
    )
    prompts = len(of_prompt.unique())
    details = {"pairs": len(pairs), "prompts": prompts, "pairwise_accuracy": share, "pairwise_ci95": (low, high),
               "safety_head": safest, "source": exam.data.source}  # fmt: skip
    if high < 0.5:
        way_out = "negate the second head's output layer once, or turn better_response_id round and train it again"
        return Result("fail", f"flipped sign: {finding}", share, 0.5, way_out, details)
    if low <= 0.5:
        way_out = "no better than a coin: more pairs (--data, --max-pairs), or a better head"
        return Result("warn", f"not told from chance: {finding}", share, 0.5, way_out, details)
    return Result("pass", finding, share, 0.5, "", details)
