"""The MLP head of a reward model, trained on hidden states of a frozen backbone.

Features in (feature_set.py), a folder out: `head.safetensors` and `head.json`, which `rm merge` joins with the
backbone, and `metrics.json`. Three kinds of labels: unsafe flags (`bce`), severity 0..3 (`severity`), or which of two
replies is less safe (`pairs`, Bradley-Terry). Whatever it is trained on, the head ends up with one logit that is higher
for less safe replies and 0 where the reply is as likely safe as unsafe.

Prompts, not texts, are split into train, validation (early stopping, calibration) and test (the reported figures).
Inputs are standardised while training; what is saved has that folded into its first layer, so it takes raw hidden
states. Same features, settings and seed: the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ups_rm.console import progress_bar
from ups_rm.errors import RMError
from ups_rm.reward.feature_set import FeatureInfo, FeatureSet, join, ordered_pairs
from ups_rm.reward.head_metrics import Quality, class_weights, fit_temperature, quality

Loss = Literal["bce", "severity", "pairs"]
LOSSES: tuple[Loss, ...] = ("bce", "severity", "pairs")
LABELS = {"bce": "unsafe flags", "severity": "severity 0-3", "pairs": "pairs (safer, less safe)"}


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
        if self.loss not in LOSSES:
            raise RMError(f"loss is {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if not 0 < self.validation_share < 1 or not 0 <= self.test_share < 1 - self.validation_share:
            raise RMError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing to train on"
            )
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


@dataclass(frozen=True)
class HeadReport:
    """What training gave: where it stopped, the calibration, and figures on prompts it never saw."""

    folder: Path
    epochs: int
    best_epoch: int
    validation_loss: float
    temperature: float
    prompts: dict[str, int]
    quality: Quality
    extra: dict[str, Quality] = field(default_factory=dict)
    contradictory_pairs: int = 0


class TrainableHead(nn.Module):
    """Linear layers with LeakyReLU and dropout over standardised inputs. Shape (B, H) -> (B,)."""

    def __init__(self, mean: Tensor, std: Tensor, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = [len(mean), *hidden_dims]
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output_layer = nn.Linear(widths[-1], 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.dropout((hidden.float() - self.mean) / self.std)
        for layer in self.layers:
            x = self.dropout(F.leaky_relu(layer(x)))
        return self.output_layer(x)[:, 0]

    def folded(self) -> dict[str, Tensor]:
        """Weights for raw hidden states: W x' + b with x' = (x - mean) / std becomes (W / std) x + b - W mean / std."""
        tensors = {k: v.detach().cpu().clone() for k, v in self.state_dict().items() if k not in ("mean", "std")}
        first = "layers.0" if len(self.layers) else "output_layer"
        weight, bias = tensors[f"{first}.weight"].double(), tensors[f"{first}.bias"].double()
        scaled = weight / self.std.cpu().double()
        tensors[f"{first}.weight"] = scaled.float()
        tensors[f"{first}.bias"] = (bias - scaled @ self.mean.cpu().double()).float()
        return tensors


def head_logits(tensors: dict[str, Tensor], hidden: Tensor, *, temperature: float = 1.0, chunk: int = 8192) -> Tensor:
    """Logits of a saved head for raw hidden states, float32. Shape (N, H) -> (N,)."""
    layers = sum(name.startswith("layers.") for name in tensors) // 2
    answers = []
    for part in hidden.split(chunk):
        x = part.float()
        for i in range(layers):
            x = F.leaky_relu(F.linear(x, tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]))
        answers.append(F.linear(x, tensors["output_layer.weight"], tensors["output_layer.bias"])[:, 0])
    return torch.cat(answers) / temperature


def split_prompts(prompt_id: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Prompt ids of each part, the rest last; e.g. shares (0.1, 0.2) -> 10%, 20%, 70% of the prompts.

    The order of prompts hangs on their hash and the seed alone, not on the order of rows.
    """

    def key(prompt: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()

    order = sorted(prompt_id.unique().tolist(), key=key)
    parts, start = [], 0
    for share in shares:
        stop = start + (max(1, round(share * len(order))) if share else 0)
        parts.append(torch.tensor(order[start:stop], dtype=torch.long))
        start = stop
    return [*parts, torch.tensor(order[start:], dtype=torch.long)]


def train_head(
    features: FeatureSet | Sequence[FeatureSet],
    out: Path | str,
    settings: HeadSettings | None = None,
    *,
    extra: dict[str, FeatureSet] | None = None,
    progress: bool = True,
) -> HeadReport:
    """Train a head and write its folder.

    Args:
        features: of one source or several, of one backbone.
        out: folder for head.safetensors, head.json, metrics.json.
        extra: further features that the finished head is only measured on.

    Raises:
        RMError: nothing to train on (no labels, too few prompts, one class only), or features that don't fit together.
    """
    settings = settings or HeadSettings()
    joined = join([features] if isinstance(features, FeatureSet) else list(features))
    validation, test, train = split_prompts(
        joined.prompt_id, (settings.validation_share, settings.test_share), settings.seed
    )
    parts = {name: part_of(joined, ids, settings) for name, ids in (("train", train), ("validation", validation))}
    head, epochs, best_epoch, best_loss = fit(joined.hidden, parts["train"], parts["validation"], settings, progress)
    tensors = head.folded()
    temperature = calibrate(tensors, joined, validation, settings) if settings.calibrate else 1.0
    held_out = test if len(test) else validation
    logits = head_logits(tensors, joined.hidden, temperature=temperature)
    report = HeadReport(
        folder=Path(out),
        epochs=epochs,
        best_epoch=best_epoch,
        validation_loss=best_loss,
        temperature=temperature,
        prompts={"train": len(train), "validation": len(validation), "test": len(test)},
        quality=feature_quality(joined, logits, held_out),
        extra={
            name: feature_quality(one, head_logits(tensors, one.hidden, temperature=temperature))
            for name, one in (extra or {}).items()
        },
        contradictory_pairs=ordered_pairs(joined)[1],
    )
    write_head(tensors, settings, joined.info, report)
    return report


@dataclass(frozen=True)
class Part:
    """What one part of the split is trained or validated on: items are texts (K,), or pairs of texts (K, 2).

    `contrast` are pairs (unsafe, safe) of replies to one prompt (C, 2), for `HeadSettings.contrast`; may be None.
    """

    items: Tensor
    targets: Tensor
    weights: Tensor
    contrast: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)


def part_of(features: FeatureSet, prompts: Tensor, settings: HeadSettings) -> Part:
    """The labelled texts (or pairs) of these prompts.

    Raises:
        RMError: none, or of one class only.
    """
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
    return Part(items, smooth, weights, contrast_pairs(features, items))


def contrast_pairs(features: FeatureSet, items: Tensor) -> Tensor | None:
    """All (unsafe, safe) pairs of replies to one prompt among these texts; None if there are none. Shape (C, 2)."""
    of_prompt: dict[int, tuple[list[int], list[int]]] = {}
    for item in items.tolist():
        unsafe, safe = of_prompt.setdefault(int(features.prompt_id[item]), ([], []))
        if features.unsafe[item] in (0.0, 1.0):  # a text that is labelled both ways tells nothing here
            (unsafe if features.unsafe[item] == 1 else safe).append(item)
    pairs = [(u, s) for unsafe, safe in of_prompt.values() for u in unsafe for s in safe]
    return torch.tensor(pairs) if pairs else None


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
    pairs: -log sigmoid(logit of the less safe - logit of the safer), Bradley-Terry.
    """
    items, targets, weights = part.items[rows], part.targets[rows], part.weights[rows]
    if settings.loss == "pairs":
        logits = head(hidden[items.flatten()]).view(-1, 2)
        return F.softplus(logits[:, 0] - logits[:, 1]).mean()
    logits = head(hidden[items])
    if settings.loss == "severity":
        return F.mse_loss(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)


def fit(
    hidden: Tensor, train: Part, validation: Part, settings: HeadSettings, progress: bool
) -> tuple[TrainableHead, int, int, float]:
    """AdamW with early stopping. Returns the best head, epochs run, its epoch (from 1), its validation loss."""
    seen = hidden[train.items.flatten().unique()].float()
    mean, std = seen.mean(0), seen.std(0).clamp(min=1e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = TrainableHead(mean, std, settings.hidden_dims, settings.dropout)
        if settings.loss == "severity":
            nn.init.constant_(head.output_layer.bias, train.targets.mean().item())
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        best_loss, best_epoch, best_state, epoch = math.inf, 0, copy.deepcopy(head.state_dict()), 0
        with progress_bar("head", settings.max_epochs, unit="epochs", enabled=progress) as advance:
            for epoch in range(1, settings.max_epochs + 1):
                head.train()
                for rows in torch.randperm(len(train)).split(settings.batch_size):
                    optimizer.zero_grad(set_to_none=True)
                    loss = loss_of(head, hidden, train, rows, settings)
                    if train.contrast is not None and settings.contrast > 0:
                        drawn = train.contrast[torch.randint(len(train.contrast), (len(rows),))]
                        loss = (1 - settings.contrast) * loss + settings.contrast * contrast_loss(head, hidden, drawn)
                    loss.backward()
                    optimizer.step()
                head.eval()
                validated = _validation_loss(head, hidden, validation, settings)
                advance(note=f"validation loss {validated:.4f}")
                if validated < best_loss:
                    best_loss, best_epoch, best_state = validated, epoch, copy.deepcopy(head.state_dict())
                elif epoch - best_epoch >= settings.patience:
                    break
    head.load_state_dict(best_state)
    return head.eval(), epoch, best_epoch, best_loss


@torch.no_grad()
def _validation_loss(head: TrainableHead, hidden: Tensor, part: Part, settings: HeadSettings) -> float:
    chunks = torch.arange(len(part)).split(4096)
    loss = sum(loss_of(head, hidden, part, rows, settings).item() * len(rows) for rows in chunks) / len(part)
    if part.contrast is None or settings.contrast == 0:
        return loss
    return (1 - settings.contrast) * loss + settings.contrast * contrast_loss(head, hidden, part.contrast).item()


def contrast_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, pairs: Tensor) -> Tensor:
    """Mean of -log sigmoid(logit of the unsafe - logit of the safe reply) over pairs (C, 2) of one prompt each."""
    logits = head(hidden[pairs.flatten()]).view(-1, 2)
    return F.softplus(logits[:, 1] - logits[:, 0]).mean()


def calibrate(tensors: dict[str, Tensor], features: FeatureSet, prompts: Tensor, settings: HeadSettings) -> float:
    """Temperature that fits sigmoid(logit / T) to the flags of `prompts`.

    Severity and pairs say nothing about where safe ends and unsafe begins: for them a shift is fitted as well and goes
    into the output layer's bias, in place.
    """
    known = torch.isin(features.prompt_id, prompts) & features.unsafe.isfinite()
    logits = head_logits(tensors, features.hidden[known])
    temperature, shift = fit_temperature(
        logits, features.unsafe[known], shift=settings.loss != "bce" or settings.contrast > 0
    )
    tensors["output_layer.bias"] += shift
    return temperature


def feature_quality(features: FeatureSet, logits: Tensor, prompts: Tensor | None = None) -> Quality:
    """Figures on the texts of `prompts` (all, if None); pairs are those whose safety flags differ."""
    chosen = torch.ones(features.texts, dtype=torch.bool)
    if prompts is not None:
        chosen = torch.isin(features.prompt_id, prompts)
    pairs, _ = ordered_pairs(features, by_flags=True)
    pairs = pairs[chosen[pairs].all(dim=1)]
    new_index = chosen.long().cumsum(0) - 1
    return quality(
        logits[chosen],
        features.unsafe[chosen],
        new_index[pairs],
        features.prompt_id[chosen],
        features.category_bits[chosen],
        features.info.categories,
    )


def write_head(tensors: dict[str, Tensor], settings: HeadSettings, info: FeatureInfo, report: HeadReport) -> None:
    """head.safetensors, head.json and metrics.json, each written beside its name and renamed; head.json last."""
    from safetensors.torch import save_file

    folder = report.folder
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".head.{os.getpid()}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(folder / "head.safetensors")
    figures = {
        "held_out": report.quality.as_dict(),
        **{name: one.as_dict() for name, one in report.extra.items()},
    }
    _write_json(folder / "metrics.json", figures)
    _write_json(folder / "head.json", head_description(settings, info, report))


def head_description(settings: HeadSettings, info: FeatureInfo, report: HeadReport) -> dict[str, Any]:
    """What head.json says: shape, labels, calibration, how conversations were rendered, what it was trained on."""

    def short(one: Quality) -> dict[str, Any]:
        return {k: v for k, v in one.as_dict().items() if k != "by_category"}

    training = {k: v for k, v in asdict(settings).items() if k not in ("hidden_dims", "loss", "seed")}
    return {
        "hidden_dims": list(settings.hidden_dims),
        "loss": settings.loss,
        "labels": LABELS[settings.loss],
        "temperature": report.temperature,
        "seed": settings.seed,
        "backbone": info.backbone,
        "features_dtype": info.dtype,
        "render": {**asdict(info.render), "chat_template_sha256": info.chat_template_sha256},
        "training": training,
        "sources": list(info.sources),
        "prompts": report.prompts,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "metrics": {"held_out": short(report.quality), **{k: short(v) for k, v in report.extra.items()}},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
