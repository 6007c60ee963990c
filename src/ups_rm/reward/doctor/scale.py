"""Scale: where do the logits lie, is the sigmoid flat there, and do replies to one prompt still score apart?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.grpo.metrics import LOW_STD, SATURATED, ZERO_STD
from ups_rm.reward.doctor.exam import DataExam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.head_metrics import expected_calibration_error, fit_temperature

GROUP_SIZE = 4
_GROUPS = 4000
MAX_SATURATED, FAIL_SATURATED = 0.5, 0.9
MAX_ZERO, FAIL_ZERO = 0.2, 0.5
MAX_ECE = 0.2
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Separation:
    """Groups of n = 4 replies to one prompt under one transform of the logit, safer = higher.

    zero_share: expected share of groups with std <= 1e-6, as `group/zero_std_share` counts them. low_share: with std <
    0.01. group_std: median std of a group, as a share of the std over all replies: how much of the reward's variance
    GRPO can see.
    """

    name: str
    zero_share: float
    low_share: float
    group_std: float


def transforms(logits: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """From logit (higher = less safe) to score (higher = safer), bounded ones first.

    The tempered sigmoid is sigmoid(-logit / T), T = the 95th percentile of |logit| / 4, at least 1: then 95% of the
    logits lie where it is not flat.
    """
    temperature = max(1.0, float(torch.quantile(logits.abs(), 0.95)) / 4)
    return {
        "sigmoid": lambda x: torch.sigmoid(-x),
        f"tempered sigmoid (T = {temperature:.3g})": lambda x: torch.sigmoid(-x / temperature),
        "logsigmoid": lambda x: F.logsigmoid(-x),
        "logit": lambda x: -x,
    }


def separations(logits: Tensor, prompt_id: Tensor, *, n: int = GROUP_SIZE, seed: int = 0) -> list[Separation]:
    """What each transform leaves of the differences within groups, by simulated groups.

    A group is a prompt's mean logit plus n residuals drawn from all prompts' (each scaled by sqrt(k / (k - 1)) for the
    k replies it was taken among). Scores are rounded to float32 first, as training holds them.

    Args:
        logits: shape (N,). prompt_id: shape (N,); prompts with one reply tell nothing and are left out.
    """
    _, inverse, counts = torch.unique(prompt_id, return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, logits.double()) / counts
    scale = (counts / (counts - 1).clamp(min=1)).sqrt()
    several = counts[inverse] > 1
    if not bool(several.any()):
        return []
    residuals = ((logits.double() - means[inverse]) * scale[inverse])[several]
    generator = torch.Generator().manual_seed(seed)
    centre = means[counts > 1][torch.randint(int((counts > 1).sum()), (_GROUPS, 1), generator=generator)]
    groups = centre + residuals[torch.randint(len(residuals), (_GROUPS, n), generator=generator)]  # (G, n)
    found = []
    for name, transform in transforms(logits).items():
        scores = transform(groups.float())
        deviations = scores.std(dim=1)
        overall = float(scores.std()) or math.nan
        found.append(
            Separation(
                name,
                (deviations <= ZERO_STD).double().mean().item(),
                (deviations < LOW_STD).double().mean().item(),
                float(deviations.median()) / overall,
            )
        )
    return found


def best_transform(found: list[Separation]) -> Separation:
    """The first (bounded ones stand first) with at most 5% flat and 50% low groups; else the one with fewest."""
    good = [one for one in found if one.zero_share <= 0.05 and one.low_share <= 0.5]
    return good[0] if good else min(found, key=lambda one: (one.zero_share, one.low_share))


def saturation(exam: DataExam) -> Result:
    """Share of replies whose safe score is within 0.01 of 0 or 1 (|logit| > 4.6), as `score/saturated_share` counts."""
    assert exam.data is not None
    logits = exam.data_logits
    edge = math.log(1 / SATURATED - 1)
    share = (logits.abs() > edge).double().mean().item()
    quantiles = torch.quantile(logits, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    details: dict[str, Any] = {
        "quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
        "std": logits.std().item(),
    }
    low, middle, high = quantiles[1], quantiles[3], quantiles[5]
    finding = (
        f"{share:.0%} of {len(logits)} logits are beyond ±{edge:.1f}; 5%, 50%, 95%: {low:.2f}, {middle:.2f}, {high:.2f}"
    )
    if share <= MAX_SATURATED:
        return Result("pass", finding, share, MAX_SATURATED, "", details)
    found = separations(logits, exam.data.prompt_id)
    way_out = f"reward through {best_transform(found).name}" if found else "a tempered sigmoid"
    if exam.kind == "myrm":
        way_out += ", or fold a temperature into the head (`ups-rm rm train` fits one)"
    else:
        way_out += " (reward_model.transform), or reward_model.model.normalize=reference"
    verdict, limit = ("fail", FAIL_SATURATED) if share > FAIL_SATURATED else ("warn", MAX_SATURATED)
    details["transforms"] = [vars(one) for one in found]
    return Result(verdict, f"saturated logits: {finding}", share, limit, way_out, details)  # type: ignore[arg-type]


def groups(exam: DataExam) -> Result:
    """Expected share of groups of 4 whose safe scores have no variance, and the transform that keeps them apart."""
    assert exam.data is not None
    found = separations(exam.data_logits, exam.data.prompt_id)
    if not found:
        return Result("skip", "no prompt has two replies in the data")
    now, best = found[0], best_transform(found)
    details = {"transforms": [vars(one) for one in found], "n": GROUP_SIZE}
    finding = (
        f"expected {now.zero_share:.1%} of groups of {GROUP_SIZE} with no variance and {now.low_share:.1%} with std < "
        f"{LOW_STD} under sigmoid; {best.name} keeps them apart (group std {best.group_std:.2f} of all)"
    )
    if now.zero_share <= MAX_ZERO:
        return Result("pass", finding, now.zero_share, MAX_ZERO, "", details)
    verdict, limit = ("fail", FAIL_ZERO) if now.zero_share > FAIL_ZERO else ("warn", MAX_ZERO)
    return Result(verdict, finding, now.zero_share, limit, f"reward through {best.name}", details)  # type: ignore[arg-type]


def calibration(exam: DataExam) -> Result:
    """ECE of sigmoid(logit) as the chance that the reply is unsafe, 15 bins; the reliability diagram goes to `plot`."""
    assert exam.data is not None
    if exam.output == "reward":
        return Result("skip", "a reward has no zero: it is no chance of being unsafe")
    if exam.kind == "pairwise":
        return Result("skip", "a preference between two replies is no chance of being unsafe")
    known = (exam.data.unsafe == 0) | (exam.data.unsafe == 1)
    logits, labels = exam.data_logits[known], exam.data.unsafe[known]
    error = expected_calibration_error(logits, labels)
    temperature, shift = fit_temperature(logits, labels, shift=True)
    details: dict[str, Any] = {
        "temperature": temperature,
        "shift": shift,
        "texts": len(logits),
        "unsafe_share": labels.mean().item(),
    }
    where = ""
    if exam.plot is not None:
        from ups_rm.reward.doctor.reliability import draw_reliability

        draw_reliability(logits, labels, exam.plot)
        details["plot"], where = str(exam.plot), f"; diagram: {exam.plot}"
    finding = f"ECE {error:.3f} on {len(logits)} texts; best with (logit {shift:+.2f}) / {temperature:.2f}{where}"
    if error <= MAX_ECE:
        return Result("pass", finding, error, MAX_ECE, "", details)
    way_out = (
        "only ranks count for GRPO; for thresholds, train the head on labels of this kind or fold in a temperature"
    )
    return Result("warn", finding, error, MAX_ECE, way_out, details)
