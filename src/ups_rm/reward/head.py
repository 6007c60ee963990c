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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ups_rm.console import progress_bar
from ups_rm.errors import RMError
from ups_rm.reward.feature_set import FeatureInfo, FeatureSet, join, ordered_pairs
from ups_rm.reward.head_metrics import Quality, curves, fit_temperature, quality
from ups_rm.reward.head_objective import LABELS, LOSSES, HeadSettings, Part, loss_of, part_of, step_loss, with_pairs


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
    curves: dict[str, Any] = field(default_factory=dict)


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
    if settings.loss == "better":
        raise RMError(f"loss is 'better', expected one of {', '.join(LOSSES)}\n  fix: --target helpfulness or both")
    joined = join([features] if isinstance(features, FeatureSet) else list(features))
    validation, test, train = split_prompts(
        joined.prompt_id, (settings.validation_share, settings.test_share), settings.seed
    )
    parts = {name: part_of(joined, ids, settings) for name, ids in (("train", train), ("validation", validation))}
    if settings.degenerate > 0 and parts["train"].degenerate is None:
        raise RMError(
            f"degenerate is {settings.degenerate:g}, but there are no spoiled replies for loss {settings.loss!r}"
            "\n  fix: make features with `ups-rm rm features --degenerate 400` and train with --loss bce"
        )
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
        curves=held_out_curves(joined, logits, held_out),
    )
    write_head(tensors, settings, joined.info, report)
    return report


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
                    step_loss(head, hidden, train, rows, settings).backward()
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
    return with_pairs(torch.tensor(loss), head, hidden, part, settings).item()


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


def held_out_curves(features: FeatureSet, logits: Tensor, prompts: Tensor) -> dict[str, Any]:
    """`head_metrics.curves` of the texts of `prompts`."""
    chosen = torch.isin(features.prompt_id, prompts)
    return curves(logits[chosen], features.unsafe[chosen])


def write_head(tensors: dict[str, Tensor], settings: HeadSettings, info: FeatureInfo, report: HeadReport) -> None:
    """head.safetensors, metrics.json, curves.json and, last, head.json, each written beside its name and renamed."""
    figures = {
        "held_out": report.quality.as_dict(),
        **{name: one.as_dict() for name, one in report.extra.items()},
    }
    files = {"metrics": figures, "curves": report.curves, "head": head_description(settings, info, report)}
    write_head_folder(report.folder, tensors, files)


def write_head_folder(folder: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    """head.safetensors, then `<name>.json` of each of `files`, in their order."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".head.{os.getpid()}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(folder / "head.safetensors")
    for name, value in files.items():
        _write_json(folder / f"{name}.json", value)


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
        "pooling": info.pooling,
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
