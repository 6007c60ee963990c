"""LoRA and head on real pairs, by folds: what `rm train --lora` learns, at half of its price.

Adapters of the layers above `begin` are trained as reward/lora.py trains them (its own loop, loss and early stopping).
The layers below do not change, so every token's state after them is computed once (layer_features.py), and what is
trained is a decoder of the layers above that reads these states where it would read embeddings.

N texts, T tokens of all texts together, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.layer_features import LayerFeatures
from benchmarks.rm_heads import feature_set, folds_of, out_of_fold
from benchmarks.rm_inputs import Finding, Inputs, shown
from ups_rm.device import compute_dtype
from ups_rm.reward.batching import token_batches
from ups_rm.reward.features import load_decoder, pad_batch
from ups_rm.reward.head import fit
from ups_rm.reward.head_metrics import fit_temperature
from ups_rm.reward.head_objective import HeadSettings, part_of
from ups_rm.reward.lora import LoraRun, LoraSettings, train_adapters, with_adapters
from ups_rm.reward.myrm.modeling_myrm import pooled_hidden
from ups_rm.reward.native import compute_context

SETTINGS = LoraSettings(epochs=2, lr=3e-4, max_batch_tokens=4096)


class StatesTable(nn.Module):
    """In the place of an embedding: row i is the state of token i of all texts; row 0 is for padding."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, index: Tensor) -> Tensor:
        return self.states[index].float()


def lora_part(inputs: Inputs) -> Iterator[Finding]:
    """Frozen and adapted backbone on the folds that were asked for; a fold that is done is kept in the cache."""
    begin = inputs.layer // 2
    layers = inputs.layers("real", keep_layer=begin)
    features, settings = feature_set(layers, inputs.layer, "mean"), HeadSettings(contrast=0.0)
    adapted, steps, seconds = torch.full((features.texts,), torch.nan), 0, 0.0
    for fold in inputs.folds:
        file = inputs.cache / f"lora-{inputs.template}-{inputs.layer}" / f"fold{fold}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(lora_fold(inputs, layers, begin, fold, settings), file)
        found = load_file(file)
        adapted[found["index"]] = found["logits"]
        steps, seconds = steps + int(found["steps"]), seconds + float(found["seconds"])
    frozen = out_of_fold(features, settings, folds=inputs.folds)
    name = f"mean, layer {inputs.layer}, no contrast, folds {list(inputs.folds)}"
    yield {"backbone": f"frozen, {name}", **shown(features, frozen)}
    yield {"backbone": f"LoRA, {name}", **shown(features, adapted, frozen), "steps": steps, "seconds": round(seconds)}
    both = frozen + adapted
    yield {"backbone": f"both, logits added, {name}", **shown(features, both, frozen)}


def lora_fold(
    inputs: Inputs, layers: LayerFeatures, begin: int, fold: int, settings: HeadSettings
) -> dict[str, Tensor]:
    """One fold: index and calibrated logit of each held-out text, optimizer steps and seconds taken."""
    started = perf_counter()
    features = feature_set(layers, inputs.layer, "mean")
    train, validation, test = folds_of(features)[fold]
    parts = [part_of(features, prompts, settings) for prompts in (train, validation)]
    head, *_ = fit(features.hidden, *parts, settings, False)
    dtype = compute_dtype("auto")
    decoder, ids = upper_decoder(inputs.backbone, layers, begin, inputs.layer, dtype)
    model = with_adapters(decoder, SETTINGS, settings.seed)
    run = LoraRun(model, head, ids, "cpu", dtype, settings, SETTINGS, "mean")
    steps, _ = train_adapters(run, *parts, True)
    logits = torch.full((features.texts,), torch.nan)
    known = torch.isin(features.prompt_id, torch.cat([validation, test])).nonzero()[:, 0]
    with torch.no_grad():
        head.eval()
        logits[known] = head(states_of(run, known)).flatten()
    checked, index = (torch.isin(features.prompt_id, one).nonzero()[:, 0] for one in (validation, test))
    temperature, _ = fit_temperature(logits[checked], features.unsafe[checked], shift=False)
    return {
        "index": index,
        "logits": logits[index] / temperature,
        "steps": torch.tensor(steps),
        "seconds": torch.tensor(perf_counter() - started),
    }


def upper_decoder(
    backbone: str, layers: LayerFeatures, begin: int, end: int, dtype: torch.dtype
) -> tuple[Any, list[Tensor]]:
    """Layers `begin` to `end` and the norm, over a table of all tokens' states; and the table's rows of each text."""
    states = torch.cat([layers.unpooled[0].new_zeros(1, layers.unpooled[0].shape[1]), *layers.unpooled])  # (1 + T, H)
    starts = accumulate((len(one) for one in layers.unpooled), initial=1)
    ids = [torch.arange(at, at + len(one)) for at, one in zip(starts, layers.unpooled, strict=False)]
    decoder = load_decoder(backbone, dtype)
    decoder.layers = decoder.layers[begin:end]
    decoder.config.num_hidden_layers = len(decoder.layers)
    decoder.embed_tokens = StatesTable(states)
    return decoder, ids


@torch.no_grad()
def states_of(run: LoraRun, texts: Tensor) -> Tensor:
    """Pooled states of texts by the adapted decoder, in their order. Shape (len(texts), H)."""
    run.model.eval()
    rows = [run.ids[i] for i in texts.tolist()]
    pooled: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in token_batches([len(row) for row in rows], run.settings.max_batch_tokens):
        input_ids, mask = pad_batch([rows[i] for i in batch])
        with compute_context(run.dtype, "cpu"):
            found, _ = pooled_hidden(run.model.get_base_model(), input_ids, mask, pooling=run.pooling)
        for i, state in zip(batch, found, strict=True):
            pooled[i] = state
    return torch.stack(pooled)
