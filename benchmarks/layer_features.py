"""Hidden states of every layer, pooled in several ways, in one pass over the texts: what rm_quality.py compares.

Rows in, a folder of safetensors parts out. Layer l is read after the backbone's final norm, which is exactly what the
backbone trimmed to l layers (`ups-rm rm trim --layers l`) gives. Stored as float16. A process that was stopped goes on
where it was.

N texts, L layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ups_rm.console import progress_bar
from ups_rm.data.rows import Row
from ups_rm.device import compute_dtype
from ups_rm.reward.batching import token_batches
from ups_rm.reward.features import (
    Texts,
    backbone_config,
    backbone_identity,
    collect_texts,
    load_decoder,
    pad_batch,
    render_texts,
)
from ups_rm.reward.merge import load_backbone_tokenizer, render_policy
from ups_rm.reward.native import compute_context
from ups_rm.reward.render import template_sha256

# last: the last attended token. mean: all attended tokens. reply: from the first token in which the text differs from
# that with an empty reply, to the end.
POOLINGS = ("last", "mean", "reply")
SAVE_SECONDS = 20.0
MAX_BATCH_TOKENS = 4096
AT_ONCE = 256


@dataclass(frozen=True)
class LayerFeatures:
    """Pooled states by layer: `states[pooling]` has shape (N, L, H), float16; layer l is at index l - 1.

    `unpooled`: of each text the states of every token after layer `keep_layer`, before the norm, (T, H) in bfloat16.
    """

    texts: Texts
    states: dict[str, Tensor]
    tokens: Tensor
    unpooled: tuple[Tensor, ...] = ()

    def of(self, layer: int, *poolings: str) -> Tensor:
        """States of one layer, several poolings side by side, float32. Shape (N, H * len(poolings))."""
        return torch.cat([self.states[pooling][:, layer - 1] for pooling in poolings], dim=1).float()


def layer_features(
    backbone: str,
    rows: Sequence[Row],
    folder: Path,
    *,
    chat_template: str | None = None,
    max_seconds: float = 1e9,
    max_layer: int | None = None,
    keep_layer: int | None = None,
) -> LayerFeatures | None:
    """The features of `rows`, from `folder` as far as they are there; None if `max_seconds` were not enough.

    Args:
        max_layer: compute only the first so many layers (cheaper).
        keep_layer: keep every token's state after this layer too (2 H bytes a token), for what begins there.
    """
    texts = collect_texts(rows)
    tokenizer = load_backbone_tokenizer(backbone, chat_template)
    config = backbone_config(backbone)
    policy = render_policy(tokenizer, {}, config)
    ids, _ = render_texts(tokenizer, texts, policy)
    empty, _ = render_texts(tokenizer, Texts(texts.prompts, [""] * len(texts.prompts)), policy)
    starts = torch.tensor([_common_prefix(a, b) for a, b in zip(ids, empty, strict=True)])
    digest = hashlib.sha256(f"{backbone_identity(backbone, config)} {template_sha256(tokenizer)} {max_layer}".encode())
    for row in ids:
        digest.update(row.numpy().tobytes() + b"/")
    manifest, wanted = folder / "manifest.json", {"fingerprint": digest.hexdigest(), "texts": len(ids)}
    told = json.loads(manifest.read_text()) if manifest.is_file() else wanted | {"keep_layer": keep_layer}
    if told["fingerprint"] != wanted["fingerprint"]:
        raise ValueError(f"{folder} holds features of other texts or another backbone: remove it or give another")
    if keep_layer is not None and told.get("keep_layer") != keep_layer:
        raise ValueError(f"{folder} was made without the tokens' states after layer {keep_layer}: remove it")
    keep_layer = told.get("keep_layer")
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(told))
    done = torch.zeros(len(ids), dtype=torch.bool)
    parts = sorted(folder.glob("*.safetensors"))
    for part in parts:
        done[load_file(part)["index"]] = True
    todo = (~done).nonzero()[:, 0].tolist()
    if todo and not _fill(backbone, ids, starts, todo, folder, len(parts), max_seconds, max_layer, keep_layer):
        return None
    loaded = [load_file(part) for part in sorted(folder.glob("*.safetensors"))]
    order = torch.cat([part["index"] for part in loaded]).argsort()
    states = {pooling: torch.cat([part[pooling] for part in loaded])[order] for pooling in POOLINGS}
    lengths = [len(row) for row in ids]
    unpooled: list[Tensor] = [torch.empty(0)] * len(ids)
    for part in loaded if keep_layer else ():
        index = part["index"].tolist()
        for i, rows_of in zip(index, part["unpooled"].split([lengths[i] for i in index]), strict=True):
            unpooled[i] = rows_of
    return LayerFeatures(texts, states, torch.tensor(lengths), tuple(unpooled) if keep_layer else ())


def _fill(
    backbone: str,
    ids: Sequence[Tensor],
    starts: Tensor,
    todo: Sequence[int],
    folder: Path,
    next_part: int,
    max_seconds: float,
    max_layer: int | None,
    keep_layer: int | None,
) -> bool:
    """Writes the parts that are missing; False when time was over before the end."""
    start = saved = perf_counter()
    dtype = compute_dtype("auto")
    model = load_decoder(backbone, dtype)
    model.layers = model.layers[:max_layer]
    waiting: list[tuple[Tensor, dict[str, Tensor]]] = []

    def save() -> None:
        nonlocal next_part
        index = torch.cat([batch for batch, _ in waiting])
        states = {name: torch.cat([one[name] for _, one in waiting]) for name in waiting[0][1]}
        temporary = folder / "part.tmp"
        save_file({"index": index, **states}, temporary)
        temporary.replace(folder / f"{next_part:05d}.safetensors")
        waiting.clear()
        next_part += 1

    with progress_bar("layers", len(todo), unit="texts") as advance:
        for index in _order(ids, todo):
            rows = [ids[i] for i in index.tolist()]
            waiting.append((index, pooled_layers(model, rows, starts[index], dtype, keep_layer)))
            advance(len(index))
            over = perf_counter() - start > max_seconds
            if over or perf_counter() - saved > SAVE_SECONDS:
                save()
                saved = perf_counter()
            if over:
                return False
    if waiting:
        save()
    return True


def _order(ids: Sequence[Tensor], todo: Sequence[int]) -> Iterator[Tensor]:
    """Batches of like length out of a few hundred texts drawn at random, so that half a run is half of any texts."""
    shuffled = torch.tensor(todo)[torch.randperm(len(todo), generator=torch.Generator().manual_seed(0))]
    for some in shuffled.split(AT_ONCE):
        for batch in token_batches([len(ids[i]) for i in some.tolist()], MAX_BATCH_TOKENS):
            yield some[torch.tensor(batch)]


@torch.inference_mode()
def pooled_layers(
    model: Any, rows: Sequence[Tensor], starts: Tensor, dtype: torch.dtype, keep_layer: int | None = None
) -> dict[str, Tensor]:
    """Every layer's normed states under every pooling, float16. Shape of each (B, L, H).

    With `keep_layer` also `unpooled`: that layer's states of all tokens, one text after the other. Shape (sum T, H).
    """
    input_ids, mask = pad_batch(rows)
    with compute_context(dtype, "cpu"):
        output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        # hidden_states: the embeddings, then each layer's output; the last one is normed already
        layers = [model.norm(state) for state in output.hidden_states[1:-1]] + [output.last_hidden_state]
    positions = torch.arange(input_ids.shape[1])
    lengths = mask.sum(1)
    masks = {
        "last": positions == (lengths - 1)[:, None],
        "mean": mask.bool(),
        "reply": mask.bool() & (positions >= torch.minimum(starts, lengths - 1)[:, None]),
    }
    pooled = {}
    for name, chosen in masks.items():
        weights = chosen.float() / chosen.sum(1, keepdim=True)  # (B, T)
        pooled[name] = torch.stack([(weights[:, None] @ state.float())[:, 0] for state in layers], dim=1).half()
    if keep_layer:
        pooled["unpooled"] = output.hidden_states[keep_layer][mask.bool()].bfloat16()
    return pooled


def _common_prefix(a: Tensor, b: Tensor) -> int:
    shorter = min(len(a), len(b))
    differ = (a[:shorter] != b[:shorter]).nonzero()
    return int(differ[0, 0]) if len(differ) else shorter
