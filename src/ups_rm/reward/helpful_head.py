"""The second head of a reward model: which of two replies to one prompt is the more helpful one.

The same MLP over the same hidden states as the head for unsafety (head.py), trained on the pairs that carry
PKU-SafeRLHF's `better_response_id` by Bradley-Terry: -log sigmoid(h(better) - h(other)). Its logit is higher for more
helpful replies. Only differences between replies to one prompt mean anything; the zero is put at the mean of the
training replies, and a temperature makes sigmoid of a difference the share of raters that the validation pairs show.

The split by prompt is that of the head for unsafety with the same seed, so that neither has seen the other's test
prompts. "Better" in PKU-SafeRLHF is about helpfulness alone, but raters like longer replies: `longer_is_better` says
how far one gets by that.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_rm.errors import RMError
from ups_rm.reward.feature_set import UNKNOWN, FeatureInfo, FeatureSet, better_pairs, join
from ups_rm.reward.head import (
    HeadReport,
    fit,
    head_logits,
    split_prompts,
    train_head,
    write_head_folder,
)
from ups_rm.reward.head_files import HELPFULNESS, read_head
from ups_rm.reward.head_metrics import cluster_interval, fit_temperature, pair_wins
from ups_rm.reward.head_objective import LABELS, TARGETS, HeadSettings, Target, part_of


@dataclass(frozen=True)
class HelpfulQuality:
    """How often the better reply has the higher logit, ties counting half; NaN where there is no such pair.

    pairwise_ci95: 95% interval by bootstrap over prompts.
    longer_is_better: the same of always taking the reply with more tokens. safety_head: of the head for unsafety, lower
        logit taken; NaN where only one head was trained.
    safer_is_better, safer_is_worse: the accuracy where the better reply is also the safer one (`safer_response_id`),
        and where it is not; worse_pairs: how many those are.
    """

    prompts: int
    pairs: int
    pairwise_accuracy: float
    pairwise_ci95: tuple[float, float]
    longer_is_better: float = math.nan
    safety_head: float = math.nan
    safer_is_better: float = math.nan
    safer_is_worse: float = math.nan
    worse_pairs: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: NaN becomes None, figures have 4 decimals."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 4) if math.isfinite(value) else None
            return [plain(one) for one in value] if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class HelpfulReport:
    """What training gave: where it stopped, the temperature, and figures on prompts it never saw."""

    folder: Path
    epochs: int
    best_epoch: int
    validation_loss: float
    temperature: float
    prompts: dict[str, int]
    quality: HelpfulQuality
    extra: dict[str, HelpfulQuality] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadsReport:
    """The heads that were trained; None for one that was not asked for."""

    safety: HeadReport | None
    helpfulness: HelpfulReport | None


def train_heads(
    features: FeatureSet | Sequence[FeatureSet],
    out: Path | str,
    settings: HeadSettings | None = None,
    *,
    target: Target = "safety",
    extra: dict[str, FeatureSet] | None = None,
    progress: bool = True,
) -> HeadsReport:
    """Train the heads that `target` names: into `out`, of both the one for helpfulness into `out/helpfulness`.

    Args:
        settings: `loss`, `contrast`, `helpful` and the like are those of the head for unsafety; shape, optimizer,
            split, seed and `degenerate` hold for both.

    Raises:
        RMError: as `train_head`; rows without `better_response_id`; a target that there is not.
    """
    if target not in TARGETS:
        raise RMError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    settings, out = settings or HeadSettings(), Path(out)
    sets = [features] if isinstance(features, FeatureSet) else list(features)
    if target == "helpfulness":
        return HeadsReport(None, train_helpfulness(sets, out, settings, extra=extra, progress=progress))
    shutil.rmtree(out / HELPFULNESS, ignore_errors=True)  # of an earlier training: `rm merge` would take it
    safety = train_head(sets, out, settings, extra=extra, progress=progress)
    if target == "safety":
        return HeadsReport(safety, None)
    found = read_head(out)
    first = {name: tensor / found.temperature for name, tensor in found.tensors.items() if "output_layer" in name}
    helpful = train_helpfulness(
        sets, out / HELPFULNESS, settings, extra=extra, safety=found.tensors | first, progress=progress
    )
    return HeadsReport(safety, helpful)


def train_helpfulness(
    features: Sequence[FeatureSet],
    out: Path,
    settings: HeadSettings,
    *,
    extra: dict[str, FeatureSet] | None = None,
    safety: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> HelpfulReport:
    """Train the head for helpfulness and write its folder: head.safetensors, metrics.json, head.json.

    Args:
        safety: tensors of the head for unsafety, for the comparison `safety_head`.

    Raises:
        RMError: too few pairs with `better_response_id`, or features that don't fit together.
    """
    settings = replace(settings, loss="better", contrast=0.0, helpful=0.0)
    joined = join(features)
    validation, test, train = split_prompts(
        joined.prompt_id, (settings.validation_share, settings.test_share), settings.seed
    )
    train_part, validation_part = (part_of(joined, ids, settings) for ids in (train, validation))
    if settings.degenerate > 0 and train_part.degenerate is None:
        raise RMError(
            f"degenerate is {settings.degenerate:g}, but there are no spoiled replies\n"
            "  fix: make features with `ups-rm rm features --degenerate 400`"
        )
    head, epochs, best_epoch, best_loss = fit(joined.hidden, train_part, validation_part, settings, progress)
    tensors = head.folded()
    tensors["output_layer.bias"] -= head_logits(tensors, joined.hidden[train_part.items.flatten().unique()]).mean()
    temperature = pair_temperature(tensors, joined, validation_part.items) if settings.calibrate else 1.0

    def measured(one: FeatureSet, prompts: Tensor) -> HelpfulQuality:
        return helpful_quality(one, head_logits(tensors, one.hidden, temperature=temperature), prompts, safety)

    report = HelpfulReport(
        folder=out,
        epochs=epochs,
        best_epoch=best_epoch,
        validation_loss=best_loss,
        temperature=temperature,
        prompts={"train": len(train), "validation": len(validation), "test": len(test)},
        quality=measured(joined, test if len(test) else validation),
        extra={name: measured(one, one.prompt_id.unique()) for name, one in (extra or {}).items()},
    )
    figures = {"held_out": report.quality.as_dict(), **{name: one.as_dict() for name, one in report.extra.items()}}
    write_head_folder(out, tensors, {"metrics": figures, "head": _description(settings, joined.info, report, figures)})
    return report


def pair_temperature(tensors: dict[str, Tensor], features: FeatureSet, pairs: Tensor) -> float:
    """T for which sigmoid((h(better) - h(other)) / T) is calibrated on pairs (other, better). Shape (J, 2)."""
    logits = head_logits(tensors, features.hidden[pairs.flatten()]).view(-1, 2)
    difference = logits[:, 1] - logits[:, 0]
    both_ways = torch.cat([difference, -difference])
    return fit_temperature(both_ways, (torch.arange(len(both_ways)) < len(difference)).float())[0]


def helpful_quality(
    features: FeatureSet, logits: Tensor, prompts: Tensor, safety: dict[str, Tensor] | None = None
) -> HelpfulQuality:
    """Figures on the pairs with `better_response_id` of these prompts. `logits` has shape (N,)."""
    pairs = better_pairs(features, prompts)
    if not len(pairs):
        return HelpfulQuality(0, 0, math.nan, (math.nan, math.nan))
    of_prompt = features.prompt_id[pairs[:, 0]]
    wins = pair_wins(logits, pairs)
    safer_is_better, known = _safer_is_better(features, pairs)
    agree, differ = known & safer_is_better, known & ~safer_is_better
    unsafety = None if safety is None else pair_wins(-head_logits(safety, features.hidden), pairs)

    def share(values: Tensor) -> float:
        return values.double().mean().item() if len(values) else math.nan

    return HelpfulQuality(
        prompts=len(of_prompt.unique()),
        pairs=len(pairs),
        pairwise_accuracy=share(wins),
        pairwise_ci95=cluster_interval(wins, of_prompt),
        longer_is_better=share(pair_wins(features.tokens.double(), pairs)),
        safety_head=math.nan if unsafety is None else share(unsafety),
        safer_is_better=share(wins[agree]),
        safer_is_worse=share(wins[differ]),
        worse_pairs=int(differ.sum()),
    )


def _safer_is_better(features: FeatureSet, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs (other, better): whether a row says that the better one is the safer one, and whether any row tells."""
    told: dict[tuple[int, int], bool] = {}
    known = features.row_safer != UNKNOWN
    rows = zip(features.row_texts[known].tolist(), features.row_safer[known].tolist(), strict=True)
    for (first, second), safer in rows:
        told[first, second], told[second, first] = safer == 1, safer == 0
    found = [told.get((other, better)) for other, better in pairs.tolist()]
    return torch.tensor([bool(one) for one in found]), torch.tensor([one is not None for one in found])


def _description(
    settings: HeadSettings, info: FeatureInfo, report: HelpfulReport, figures: dict[str, Any]
) -> dict[str, Any]:
    """What head.json says: as that of the head for unsafety, and `output`."""
    used = ("lr", "weight_decay", "dropout", "degenerate", "max_epochs", "patience", "batch_size", "validation_share",
            "test_share", "calibrate")  # fmt: skip
    return {
        "output": HELPFULNESS,
        "hidden_dims": list(settings.hidden_dims),
        "loss": settings.loss,
        "labels": LABELS[settings.loss],
        "temperature": report.temperature,
        "seed": settings.seed,
        "backbone": info.backbone,
        "features_dtype": info.dtype,
        "pooling": info.pooling,
        "render": {**asdict(info.render), "chat_template_sha256": info.chat_template_sha256},
        "training": {name: getattr(settings, name) for name in used},
        "sources": list(info.sources),
        "prompts": report.prompts,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "metrics": figures,
    }
