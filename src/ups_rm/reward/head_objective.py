"""What a head is trained to do: its settings, the labelled items of each part of the split, and the losses over them.

Nothing here trains (head.py, lora.py) or knows where hidden states come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.data.degenerate import DEGENERATE
from ups_rm.errors import RMError
from ups_rm.reward.feature_set import UNKNOWN, FeatureSet, better_pairs, ordered_pairs
from ups_rm.reward.head_metrics import class_weights

Loss = Literal["bce", "severity", "pairs", "better"]
LOSSES: tuple[Loss, ...] = ("bce", "severity", "pairs")
"""Of a head for unsafety; `better` is that of a head for helpfulness."""
Target = Literal["safety", "helpfulness", "both"]
TARGETS: tuple[Target, ...] = ("safety", "helpfulness", "both")
"""Which heads are trained: for unsafety, for helpfulness, or both on the same features."""
LABELS = {
    "bce": "unsafe flags",
    "severity": "severity 0-3",
    "pairs": "pairs (safer, less safe)",
    "better": "pairs (better, other) by better_response_id",
}


@dataclass(frozen=True)
class HeadSettings:
    """How a head is trained. The defaults are what did best on the packaged sample (docs/design.md)."""

    hidden_dims: tuple[int, ...] = (256, 64)
    loss: Loss = "bce"
    lr: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.5
    """Share of inputs and of hidden units that are dropped while training."""
    label_smoothing: float = 0.05
    """`bce`: targets are this far from 0 and 1, which also keeps safe scores from saturating."""
    class_balance: bool = True
    """`bce`: safe and unsafe texts weigh the same in total."""
    contrast: float = 0.5
    """`bce`: share of the loss that compares unsafe with safe replies to one prompt (Bradley-Terry over the flags).
    Flags alone teach which prompts are dangerous; comparing within a prompt teaches which replies are."""
    helpful: float = 0.0
    """`bce`: weight of a further comparison: of two safe replies to a harmless prompt the better one
    (better_response_id) is to score safer (Bradley-Terry). It closes the gap that makes evasion pay."""
    degenerate: float = 0.0
    """`bce`: weight of a further comparison: a good reply is to score safer than its spoiled form (data/degenerate.py:
    looped, stuttered, another prompt's, a refusal of a harmless prompt). It keeps "No, no, no, no" from being the
    safest reply there is."""
    max_epochs: int = 60
    patience: int = 8
    """Epochs without a better validation loss before training stops."""
    batch_size: int = 64
    validation_share: float = 0.1
    test_share: float = 0.1
    """Share of prompts that are only reported on; 0 reports on the validation prompts."""
    calibrate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in (*LOSSES, "better"):
            raise RMError(f"loss is {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if not 0 < self.validation_share < 1 or not 0 <= self.test_share < 1 - self.validation_share:
            raise RMError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing to train on"
            )
        for name in ("helpful", "degenerate"):
            if getattr(self, name) < 0:
                raise RMError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.contrast < 1:
            raise RMError(f"contrast is {self.contrast}, expected a share in [0, 1)")
        if any(width < 1 for width in self.hidden_dims):
            raise RMError(f"hidden_dims are {list(self.hidden_dims)}, expected widths of at least 1")
        for name, low, high in (("dropout", 0, 1), ("label_smoothing", 0, 0.5)):
            if not low <= getattr(self, name) < high:
                raise RMError(f"{name} is {getattr(self, name)}, expected a number from {low} up to {high}")
        for name in ("max_epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise RMError(f"{name} is {getattr(self, name)}, expected at least 1")


def parse_dims(text: str) -> tuple[int, ...]:
    """Widths of hidden layers, such as "256,64"; none for an empty text.

    Raises:
        RMError: anything else.
    """
    try:
        return tuple(int(width) for width in text.split(",") if width.strip())
    except ValueError:
        raise RMError(f"hidden dims are {text!r}, expected widths such as 256,64") from None


@dataclass(frozen=True)
class Part:
    """What one part of the split is trained or validated on: items are texts (K,), or pairs of texts (K, 2).

    Pairs of replies to one prompt, each (C, 2), for the settings of the same names; None where there are none:
    `contrast` (unsafe, safe), `helpful` (other, better) of two safe ones to a harmless prompt, `degenerate` (spoiled,
    good).
    """

    items: Tensor
    targets: Tensor
    weights: Tensor
    contrast: Tensor | None = None
    helpful: Tensor | None = None
    degenerate: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)


def part_of(features: FeatureSet, prompts: Tensor, settings: HeadSettings) -> Part:
    """The labelled texts (or pairs) of these prompts.

    Raises:
        RMError: none, or of one class only.
    """
    if settings.loss == "better":
        pairs = better_pairs(features, prompts)
        _need(len(pairs), "pairs with a better reply (better_response_id)", settings)
        spoiled, ones = degenerate_pairs(features, prompts), torch.ones(len(pairs))
        # (good, spoiled): the good one is to have the higher logit here
        return Part(pairs, ones, ones, degenerate=None if spoiled is None else spoiled.flip(1))
    if settings.loss == "pairs":
        pairs, _ = ordered_pairs(features)
        pairs = pairs[torch.isin(features.prompt_id[pairs[:, 0]], prompts)]
        _need(len(pairs), "pairs with a safer reply", settings)
        ones = torch.ones(len(pairs))
        return Part(pairs, ones, ones)
    labels = features.unsafe if settings.loss == "bce" else features.severity
    items = (torch.isin(features.prompt_id, prompts) & labels.isfinite()).nonzero()[:, 0]
    targets = labels[items]
    _need(len(items), LABELS[settings.loss], settings)
    if targets.min() == targets.max():
        raise RMError(f"all {len(items)} texts have the label {targets[0]:g}: there is nothing to tell apart")
    if settings.loss == "severity":
        return Part(items, targets, torch.ones(len(items)))
    weights = class_weights(targets) if settings.class_balance else torch.ones(len(items))
    smooth = settings.label_smoothing + (1 - 2 * settings.label_smoothing) * targets
    return Part(
        items,
        smooth,
        weights,
        contrast_pairs(features, items),
        helpful_pairs(features, prompts),
        degenerate_pairs(features, prompts),
    )


def contrast_pairs(features: FeatureSet, items: Tensor) -> Tensor | None:
    """All (unsafe, safe) pairs of replies to one prompt among these texts; None if there are none. Shape (C, 2)."""
    of_prompt: dict[int, tuple[list[int], list[int]]] = {}
    for item in items.tolist():
        unsafe, safe = of_prompt.setdefault(int(features.prompt_id[item]), ([], []))
        if features.unsafe[item] in (0.0, 1.0):  # a text that is labelled both ways tells nothing here
            (unsafe if features.unsafe[item] == 1 else safe).append(item)
    pairs = [(u, s) for unsafe, safe in of_prompt.values() for u in unsafe for s in safe]
    return torch.tensor(pairs) if pairs else None


def helpful_pairs(features: FeatureSet, prompts: Tensor) -> Tensor | None:
    """(other, better) of rows with two safe replies to a harmless prompt among these; None without. Shape (C, 2)."""
    safe = (features.row_unsafe == 0).all(dim=1)
    harmless = features.benign[features.row_texts[:, 0]] == 1
    known = features.row_better != UNKNOWN
    return _worse_and_better(features, safe & harmless & known & torch.isin(features.row_prompt, prompts))


def degenerate_pairs(features: FeatureSet, prompts: Tensor) -> Tensor | None:
    """(spoiled, good) of the rows of data/degenerate.py with these prompts; None without. Shape (C, 2)."""
    made = [i for i, file in enumerate(features.info.files) if file == DEGENERATE]
    rows = torch.isin(features.row_file, torch.tensor(made, dtype=torch.long))
    return _worse_and_better(features, rows & torch.isin(features.row_prompt, prompts))


def _worse_and_better(features: FeatureSet, chosen: Tensor) -> Tensor | None:
    """Texts of the chosen rows, the one that is not `better_response_id` first. Shape (C, 2); None for no rows."""
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return None
    better = features.row_better[rows].long()
    return torch.stack([features.row_texts[rows, 1 - better], features.row_texts[rows, better]], dim=1)


def _need(count: int, what: str, settings: HeadSettings) -> None:
    if not count:
        raise RMError(
            f"no texts with {what} for loss {settings.loss!r} in a part of the split\n  fix: more rows, other shares "
            f"(validation_share {settings.validation_share}, test_share {settings.test_share}), or another --loss"
        )


def loss_of(
    head: Callable[[Tensor], Tensor], hidden: Tensor, part: Part, rows: Tensor, settings: HeadSettings
) -> Tensor:
    """Mean loss of the items `rows` of a part.

    bce: cross-entropy of sigmoid(logit) against the unsafe share, weighted by class. severity: squared error.
    pairs: -log sigmoid(logit of the less safe - logit of the safer), Bradley-Terry. better: the same of the better and
    the other reply.
    """
    items, targets, weights = part.items[rows], part.targets[rows], part.weights[rows]
    if settings.loss in ("pairs", "better"):
        logits = head(hidden[items.flatten()]).view(-1, 2)
        return F.softplus(logits[:, 0] - logits[:, 1]).mean()
    logits = head(hidden[items])
    if settings.loss == "severity":
        return F.mse_loss(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)


def step_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, part: Part, rows: Tensor, settings: HeadSettings
) -> Tensor:
    """The loss of one optimizer step: the items `rows`, and as many pairs of each kind drawn at random."""

    def draw(pairs: Tensor | None) -> Tensor | None:
        return None if pairs is None else pairs[torch.randint(len(pairs), (len(rows),))]

    drawn = replace(
        part,
        contrast=draw(part.contrast) if settings.contrast > 0 else None,
        helpful=draw(part.helpful) if settings.helpful > 0 else None,
        degenerate=draw(part.degenerate) if settings.degenerate > 0 else None,
    )
    return with_pairs(loss_of(head, hidden, part, rows, settings), head, hidden, drawn, settings)


def with_pairs(
    loss: Tensor,
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    part: Part,
    settings: HeadSettings,
) -> Tensor:
    """(1 - contrast) * loss + contrast * contrast_loss, + helpful and degenerate times that of their own pairs.

    The pairs are those of `part`; a kind that it has none of is left out.
    """
    if part.contrast is not None and settings.contrast > 0:
        loss = (1 - settings.contrast) * loss + settings.contrast * contrast_loss(head, hidden, part.contrast)
    for pairs, weight in ((part.helpful, settings.helpful), (part.degenerate, settings.degenerate)):
        if pairs is not None and weight > 0:
            loss = loss + weight * contrast_loss(head, hidden, pairs)
    return loss


def contrast_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, pairs: Tensor) -> Tensor:
    """Mean of -log sigmoid(logit of the first - logit of the second) over pairs (less safe, safer), of a head for
    helpfulness (more, less helpful). Shape (C, 2)."""
    logits = head(hidden[pairs.flatten()]).view(-1, 2)
    return F.softplus(logits[:, 1] - logits[:, 0]).mean()
