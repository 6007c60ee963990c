"""LoRA adapters of the backbone trained together with the head, then merged: a backbone and a head for `rm merge`.

A head is first trained on the frozen backbone (head.py), so that adapters start from a direction that means something
(arXiv:2202.10054 calls it linear probing, then fine-tuning). Then both learn from the same labels, split and loss; an
unsafe and a safe reply to one prompt go through the backbone together, so that comparing them costs nothing extra. The
adapters are merged into the backbone's own weights, and calibration and figures come from the merged backbone, computed
as the RM will compute it.

Out: `<out>/backbone` (Hugging Face folder), `<out>/head`, `<out>/adapter` (peft's form), `<out>/features.safetensors`.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ups_rm.console import progress_bar
from ups_rm.data.rows import Reject, Row
from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import RMError
from ups_rm.reward.batching import token_batches
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.features import collect_texts, extract_features, load_decoder, pad_batch, render_texts
from ups_rm.reward.head import (
    HeadReport,
    TrainableHead,
    calibrate,
    feature_quality,
    fit,
    head_logits,
    held_out_curves,
    split_prompts,
    write_head,
)
from ups_rm.reward.head_files import HELPFULNESS
from ups_rm.reward.head_metrics import Quality
from ups_rm.reward.head_objective import HeadSettings, Part, Target, contrast_loss, loss_of, part_of
from ups_rm.reward.helpful_head import HelpfulReport, train_helpfulness
from ups_rm.reward.merge import load_backbone, load_backbone_tokenizer
from ups_rm.reward.native import compute_context
from ups_rm.reward.replacing import check_replaceable, mark_as_ours

Unit = tuple[int, ...]
"""Positions in a Part's items that go through the backbone together: one item, or (unsafe, safe) of one prompt."""


@dataclass(frozen=True)
class LoraSettings:
    """How adapters are trained."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str = "all-linear"
    """`all-linear`, or names of modules with commas between, e.g. q_proj,v_proj."""
    from_layer: int = 0
    """Adapters of layers below this one are not trained, and no gradient has to pass them: cheaper, learns less."""
    lr: float = 2e-4
    head_lr: float = 2e-4
    weight_decay: float = 0.01
    epochs: int = 3
    checks_per_epoch: int = 2
    """How often the validation loss is looked at; the best adapters and head of all looks are kept."""
    batch_size: int = 32
    """Texts (or pairs) of one optimizer step."""
    max_batch_tokens: int = 2048
    """Padded tokens that go through the backbone at once; smaller needs less memory and gives the same gradient."""
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "checks_per_epoch", "batch_size", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise RMError(f"lora {name} is {getattr(self, name)}, expected at least 1")
        if self.from_layer < 0:
            raise RMError(f"lora from_layer is {self.from_layer}, expected at least 0")


@dataclass(frozen=True)
class LoraReport:
    """The merged backbone, the head beside it, and the same figures for the frozen backbone and after LoRA."""

    backbone: Path
    head: HeadReport
    frozen: Quality
    steps: int
    seconds: float
    helpfulness: HelpfulReport | None = None


@dataclass
class LoraRun:
    """What the training loop works on: a decoder with adapters, a head, and the token ids of each text."""

    model: Any
    head: TrainableHead
    ids: Sequence[Tensor]
    device: str
    dtype: torch.dtype
    head_settings: HeadSettings
    settings: LoraSettings
    pooling: str = "last"
    tokens: int = 0


def train_lora(
    backbone: Path | str,
    rows: Sequence[Row],
    out: Path | str,
    head_settings: HeadSettings | None = None,
    settings: LoraSettings | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    chat_template: str | None = None,
    end_token: str | None = None,
    truncation_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
    pooling: str = "last",
    sources: Sequence[str] = (),
    rejects: Sequence[Reject] = (),
    extra: dict[str, Sequence[Row]] | None = None,
    target: Target = "safety",
    overwrite: bool = False,
    progress: bool = True,
) -> LoraReport:
    """Train adapters and head on `rows` and write the merged backbone and the head.

    Args:
        head_settings: labels, loss, split and shape of the head, as for a frozen backbone.
        extra: further rows that the finished RM is only measured on.
        target: "both" trains a head for helpfulness, too, on the merged backbone, into `out/head/helpfulness`; adapters
            themselves learn from safety alone.
        overwrite: replace what is in `out`. Other arguments as in `extract_features`.

    Raises:
        RMError: as `extract_features` and `train_head`; `out/backbone` exists; `helpful` or `degenerate` of the head's
            settings; the target "helpfulness".
    """
    start, out = perf_counter(), Path(out)
    head_settings, settings = head_settings or HeadSettings(), settings or LoraSettings()
    for name in ("helpful", "degenerate"):
        if getattr(head_settings, name) > 0:
            raise RMError(
                f"{name} is {getattr(head_settings, name):g}, but adapters do not learn from that comparison, only a "
                f"head on a frozen backbone does\n  fix: leave {name} out, or train without --lora"
            )
    if target == "helpfulness":
        raise RMError(
            "target is 'helpfulness', but adapters learn from labels of safety\n"
            "  fix: --target both puts a helpfulness head on the same backbone; or train without --lora"
        )
    merged = out / "backbone"
    check_replaceable(merged, overwrite=overwrite)
    place = str(torch_device(device))
    how: dict[str, Any] = {"device": place, "dtype": dtype, "chat_template": chat_template, "progress": progress}
    limits: dict[str, Any] = {"end_token": end_token, "truncation_side": truncation_side, "max_length": max_length}
    limits["pooling"] = pooling
    notes: dict[str, Any] = {"sources": sources, "rejects": rejects}
    file = out / "features.safetensors"
    extract_features(backbone, rows, file, **how, **limits, **notes, overwrite=True)
    frozen = FeatureSet.read(file)
    validation, test, train = split_prompts(
        frozen.prompt_id, (head_settings.validation_share, head_settings.test_share), head_settings.seed
    )
    train_part, validation_part = (part_of(frozen, ids, head_settings) for ids in (train, validation))
    head, *_ = fit(frozen.hidden, train_part, validation_part, head_settings, progress)
    held_out = test if len(test) else validation
    before = feature_quality(frozen, head_logits(head.folded(), frozen.hidden), held_out)

    tokenizer = load_backbone_tokenizer(backbone, chat_template)
    ids, _ = render_texts(tokenizer, collect_texts(rows), frozen.info.render)
    number_format = compute_dtype(dtype, place)
    model = with_adapters(load_decoder(backbone, number_format, place), settings, head_settings.seed)
    run = LoraRun(model, head.to(place), ids, place, number_format, head_settings, settings, pooling)
    steps, best_loss = train_adapters(run, train_part, validation_part, progress)
    adapter = out / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(adapter)
    head = run.head.cpu()
    del run, model  # the merge needs the memory
    _merge_adapter(backbone, adapter, tokenizer, merged)

    after_file = out / "features_lora.safetensors"
    extract_features(merged, rows, after_file, **how, **limits, **notes, overwrite=True)
    after, tensors = FeatureSet.read(after_file), head.folded()
    temperature = calibrate(tensors, after, validation, head_settings) if head_settings.calibrate else 1.0
    figures: dict[str, Quality] = {"frozen backbone": before}
    others: dict[str, FeatureSet] = {}
    for name, more in (extra or {}).items():
        extra_file = out / "features_extra.safetensors"
        extract_features(merged, more, extra_file, **how, **limits, overwrite=True)
        one = FeatureSet.read(extra_file)
        figures[name] = feature_quality(one, head_logits(tensors, one.hidden, temperature=temperature))
        others[name] = one
        extra_file.unlink()
    report = HeadReport(
        folder=out / "head",
        epochs=settings.epochs,
        best_epoch=settings.epochs,
        validation_loss=best_loss,
        temperature=temperature,
        prompts={"train": len(train), "validation": len(validation), "test": len(test)},
        quality=feature_quality(after, head_logits(tensors, after.hidden, temperature=temperature), held_out),
        extra=figures,
        curves=held_out_curves(after, head_logits(tensors, after.hidden, temperature=temperature), held_out),
    )
    info = replace(after.info, sources=tuple(sources))
    write_head(tensors, head_settings, info, report)
    second = report.folder / HELPFULNESS
    shutil.rmtree(second, ignore_errors=True)
    helpful = None
    if target == "both":
        how_trained: dict[str, Any] = {"extra": others, "safety": tensors, "progress": progress}
        helpful = train_helpfulness([replace(after, info=info)], second, head_settings, **how_trained)
    return LoraReport(merged, report, before, steps, perf_counter() - start, helpful)


def with_adapters(model: Any, settings: LoraSettings, seed: int) -> Any:
    """The decoder as a peft model with fresh adapters; those below `from_layer` are not trained.

    Raises:
        RMError: no such layer, or no module of the names given.
    """
    from peft import LoraConfig, get_peft_model

    there = model.config.get_text_config().num_hidden_layers
    if settings.from_layer >= there:
        raise RMError(f"lora from_layer is {settings.from_layer}, but the backbone has {there} layers")
    names = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        task_type="FEATURE_EXTRACTION",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # peft: no module of that name
            raise RMError(f"LoRA can't be put on this backbone: {error}") from error
    for name, parameter in adapted.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        if layer is not None and int(layer[1]) < settings.from_layer:
            parameter.requires_grad_(False)  # its B stays 0: no change
    return adapted


def train_adapters(run: LoraRun, train: Part, validation: Part, progress: bool) -> tuple[int, float]:
    """AdamW with linear warm-up and decay; leaves the best adapters and head in place. Returns steps, best loss."""
    settings = run.settings
    adapters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapters, "lr": settings.lr}, {"params": list(run.head.parameters()), "lr": settings.head_lr}],
        weight_decay=settings.weight_decay,
    )
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = per_epoch * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_decay(total, settings.warmup_share))
    looks = {round(per_epoch * (i + 1) / settings.checks_per_epoch) for i in range(settings.checks_per_epoch)}
    best_loss, best = _check(run, validation), _state(run)
    step, start = 0, perf_counter()
    with torch.random.fork_rng(devices=[]), progress_bar("LoRA", total, unit="steps", enabled=progress) as advance:
        torch.manual_seed(run.head_settings.seed)
        for _ in range(settings.epochs):
            for i, units in enumerate(_steps(train, settings.batch_size), start=1):
                _gradient(run, train, units)
                torch.nn.utils.clip_grad_norm_([*adapters, *run.head.parameters()], settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if i in looks and (loss := _check(run, validation)) < best_loss:
                    best_loss, best = loss, _state(run)
                advance(
                    note=f"best validation loss {best_loss:.4f}, {run.tokens / (perf_counter() - start):,.0f} tok/s"
                )
    _restore(run, best)
    return step, best_loss


def _steps(part: Part, batch_size: int) -> Iterator[list[Unit]]:
    """One epoch in random order: the units of each optimizer step, together `batch_size` items or one more."""
    units = _units(part, torch.randperm(len(part)))
    starts = [0, *accumulate(map(len, units))]
    steps: dict[int, list[Unit]] = {}
    for start, unit in zip(starts, units, strict=False):
        steps.setdefault(start // batch_size, []).append(unit)
    yield from steps.values()


def _units(part: Part, order: Tensor) -> list[Unit]:
    """The items of `order`, each once: (unsafe, safe) where an opposite of the same prompt is left, else alone."""
    place = {text: i for i, text in enumerate(part.items.flatten().tolist())} if part.contrast is not None else {}
    opposites: dict[int, list[int]] = {}
    for unsafe, safe in [] if part.contrast is None else part.contrast.tolist():
        opposites.setdefault(place[unsafe], []).append(place[safe])
        opposites.setdefault(place[safe], []).append(place[unsafe])
    left = dict.fromkeys(order.tolist())
    units: list[Unit] = []
    while left:
        item = next(iter(left))
        del left[item]
        other = next((one for one in opposites.get(item, ()) if one in left), None)
        if other is None:
            units.append((item,))
        else:
            del left[other]
            units.append((item, other) if part.targets[item] > part.targets[other] else (other, item))
    return units


def _gradient(run: LoraRun, part: Part, units: Sequence[Unit]) -> None:
    """Adds the gradient of the loss over `units`, in pieces that fit the token limit."""
    run.model.train()
    run.head.train()
    for loss in _losses(run, part, units):
        loss.backward()


@torch.no_grad()
def _check(run: LoraRun, part: Part) -> float:
    """The loss over a whole part."""
    run.model.eval()
    run.head.eval()
    return sum(loss.item() for loss in _losses(run, part, _units(part, torch.arange(len(part)))))


def _losses(run: LoraRun, part: Part, units: Sequence[Unit]) -> Iterator[Tensor]:
    """What each piece adds to (1 - contrast) * mean loss of the items + contrast * mean comparison of the pairs.

    A piece are units of like length and of one kind, whose texts, padded, stay within max_batch_tokens.
    """
    items, pairs = sum(map(len, units)), sum(len(unit) == 2 for unit in units)
    share = run.head_settings.contrast if pairs else 0.0
    for size in (1, 2):
        of_size = [unit for unit in units if len(unit) == size]
        if not of_size:
            continue
        chosen = torch.tensor(of_size)  # (U, size)
        texts = part.items[chosen].view(len(chosen), -1)
        lengths = [max(len(run.ids[text]) for text in unit) for unit in texts.tolist()]
        for batch in token_batches(lengths, max(1, run.settings.max_batch_tokens // texts.shape[1])):
            piece = chosen[torch.tensor(batch)]
            plain, compared = _piece_loss(run, part, piece)
            yield (1 - share) * plain * (piece.numel() / items) + share * compared * (len(piece) / max(1, pairs))


def _piece_loss(run: LoraRun, part: Part, piece: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of head.py on hidden states computed just now, and that of comparing (unsafe, safe) if size is 2."""
    from ups_rm.reward.myrm.modeling_myrm import pooled_hidden

    rows = piece.flatten()
    texts = part.items[rows].flatten()
    input_ids, mask = pad_batch([run.ids[text] for text in texts.tolist()], run.device)
    run.tokens += int(mask.sum())
    with compute_context(run.dtype, run.device):
        hidden, _ = pooled_hidden(run.model.get_base_model(), input_ids, mask, pooling=run.pooling)  # (texts, H)
    here = torch.arange(len(texts)).view(part.items[rows].shape)
    computed = Part(here, part.targets[rows].to(run.device), part.weights[rows].to(run.device))
    plain = loss_of(run.head, hidden, computed, torch.arange(len(rows)), run.head_settings)
    compared = contrast_loss(run.head, hidden, here.view(piece.shape)) if piece.shape[1] == 2 else plain.new_zeros(())
    return plain, compared


def _warmup_then_decay(total: int, warmup_share: float) -> Callable[[int], float]:
    warmup = max(1, round(total * warmup_share))
    return lambda step: min((step + 1) / warmup, max(0.0, (total - step) / max(1, total - warmup)))


def _state(run: LoraRun) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    adapters = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    return adapters, copy.deepcopy(run.head.state_dict())


def _restore(run: LoraRun, state: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    adapters, head = state
    parameters: dict[str, nn.Parameter] = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapters.items():
            parameters[name].copy_(tensor)
    run.head.load_state_dict(head)
    run.head.eval()


def _merge_adapter(backbone: Path | str, adapter: Path, tokenizer: Any, out: Path) -> None:
    """The backbone, in the number format it is stored in, with the adapters added; beside its name, then renamed."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_backbone(backbone)[0], adapter).merge_and_unload(safe_merge=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    mark_as_ours(temporary, "ups-rm rm train --lora")
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)
