"""How well a small backbone judges real pairs: layer, pooling, template, loss, label noise, LoRA, the packaged sample.

    python -m benchmarks.rm_quality --pairs pairs.jsonl --cache cache --out results.json --parts layers,heads

The pairs are any rows that `ups-rm rm features --data` takes and that say which reply is unsafe. Everything is measured
on prompts that were not trained on: five folds by prompt, so each pair counts once. Intervals are percentile bootstraps
over prompts. Hidden states are computed once (layer_features.py) and kept in the cache folder; heads train on them in
seconds. Findings: docs/rm-quality.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.layer_features import POOLINGS, LayerFeatures, layer_features
from rich.table import Table
from torch import Tensor

from ups_rm.console import console
from ups_rm.data.rows import Row, read_rows
from ups_rm.models import resolve_model
from ups_rm.reward.feature_set import FeatureInfo, FeatureSet, ordered_pairs
from ups_rm.reward.features import extract_features
from ups_rm.reward.head import TrainableHead, calibrate, fit, head_logits, split_prompts
from ups_rm.reward.head_files import read_head
from ups_rm.reward.head_metrics import auc, cluster_interval, pair_wins
from ups_rm.reward.head_objective import HeadSettings, Part, part_of
from ups_rm.reward.lora import LoraSettings, train_lora
from ups_rm.reward.render import RenderPolicy
from ups_rm.reward.trim import JUDGE_TEMPLATE, trim_backbone
from ups_rm.types import Message

TEMPLATES = {"chat": None, "judge": JUDGE_TEMPLATE}
FOLDS = 5
PROMPTS, REPLIES = 32, 4
N_RESAMPLES = 2000
LINEAR_L2 = 0.003  # on standardised states, each divided by sqrt(H)


@dataclass(frozen=True)
class Figures:
    """Ranking of held-out texts and pairs by one head; intervals 95%, resampling prompts."""

    auc: float
    auc_ci95: tuple[float, float]
    pairwise: float
    pairwise_ci95: tuple[float, float]
    auc_gain_ci95: tuple[float, float] | None = None
    pairwise_gain_ci95: tuple[float, float] | None = None


def feature_set(layers: LayerFeatures, layer: int, *poolings: str) -> FeatureSet:
    """What `rm features` would have written for this layer and pooling."""
    hidden = layers.of(layer, *poolings)
    info = FeatureInfo("", "", hidden.shape[1], "float16", RenderPolicy(), "", (), pooling="+".join(poolings))
    truncated = torch.zeros(len(hidden), dtype=torch.uint8)
    return FeatureSet(hidden=hidden, tokens=layers.tokens, truncated=truncated, info=info, **layers.texts.labels)


def folds_of(features: FeatureSet, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(train, validation, test) prompt ids of each fold; validation is a tenth of what is not tested on."""
    parts = split_prompts(features.prompt_id, (1 / FOLDS,) * (FOLDS - 1), seed)
    folds = []
    for test in parts:
        rest = torch.cat([part for part in parts if part is not test])
        validation, train = split_prompts(rest, (0.1,), seed + 1)
        folds.append((train, validation, test))
    return folds


Trainer = Callable[[FeatureSet, Part, Part, HeadSettings], dict[str, Tensor]]


def plain_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """The head as `rm train` makes it."""
    return fit(features.hidden, train, validation, settings, False)[0].folded()


def linear_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """The linear head with the least loss of `rm train` plus a small L2 penalty: what the states hold, linearly."""
    states = features.hidden[train.items]
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6) * states.shape[1] ** 0.5
    states = (states - mean) / scale
    differences = None
    if train.contrast is not None:
        pairs = (features.hidden[train.contrast] - mean) / scale  # (C, 2, H)
        differences = pairs[:, 0] - pairs[:, 1]
    weights = torch.zeros(states.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = states @ weights[:-1] + weights[-1]
        value = F.binary_cross_entropy_with_logits(logits, train.targets, weight=train.weights)
        if differences is not None:
            apart = F.softplus(-(differences @ weights[:-1])).mean()
            value = (1 - settings.contrast) * value + settings.contrast * apart
        value = value + LINEAR_L2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weights.detach()
    slope = found[:-1] / scale
    return {"output_layer.weight": slope[None], "output_layer.bias": found[-1:] - slope @ mean}


def out_of_fold(
    features: FeatureSet,
    settings: HeadSettings,
    *,
    trainer: Trainer = plain_head,
    labels: FeatureSet | None = None,
    share: float = 1.0,
    folds: Iterable[int] = range(FOLDS),
) -> Tensor:
    """Calibrated logit of each text by the head that did not see its prompt; NaN in folds left out. Shape (N,).

    Args:
        labels: the same features with other (noisy) labels to train on.
        share: of the training prompts that are used.
    """
    seen = labels or features
    logits = torch.full((features.texts,), torch.nan)
    every = folds_of(features)
    for fold in folds:
        train, validation, test = every[fold]
        train = train[: round(share * len(train))]
        parts = [part_of(seen, prompts, settings) for prompts in (train, validation)]
        tensors = trainer(seen, *parts, settings)
        temperature = calibrate(tensors, seen, validation, settings)
        held_out = torch.isin(features.prompt_id, test)
        logits[held_out] = head_logits(tensors, features.hidden[held_out], temperature=temperature)
    return logits


def figures(features: FeatureSet, logits: Tensor, baseline: Tensor | None = None) -> Figures:
    """AUC over texts and pairwise accuracy over pairs, of the texts that have a logit; gains over `baseline`."""
    known = logits.isfinite() & (features.unsafe.isfinite()) & (features.unsafe != 0.5)
    pairs, _ = ordered_pairs(features, by_flags=True)
    pairs = pairs[known[pairs].all(dim=1)]
    labels, prompts = features.unsafe[known], features.prompt_id[known]
    areas = bootstrap_auc(logits[known], labels, prompts)
    wins = pair_wins(logits, pairs)
    pair_prompts = features.prompt_id[pairs[:, 0]]
    result = Figures(
        auc=auc(logits[known], labels),
        auc_ci95=interval(areas),
        pairwise=wins.double().mean().item(),
        pairwise_ci95=cluster_interval(wins, pair_prompts),
    )
    if baseline is None:
        return result
    return replace(
        result,
        auc_gain_ci95=interval(areas - bootstrap_auc(baseline[known], labels, prompts)),
        pairwise_gain_ci95=cluster_interval(wins - pair_wins(baseline, pairs), pair_prompts),
    )


def bootstrap_auc(logits: Tensor, labels: Tensor, prompts: Tensor, seed: int = 0) -> Tensor:
    """AUC in resamples of whole prompts, the same resamples for every head. Shape (N_RESAMPLES,)."""
    order = logits.argsort()
    unsafe = (labels[order] > 0.5).double()
    _, group = torch.unique(prompts, return_inverse=True)
    group = group[order]
    count = int(group.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    areas = torch.empty(N_RESAMPLES, dtype=torch.float64)
    for i in range(N_RESAMPLES):
        drawn = torch.randint(count, (count,), generator=generator)
        weight = torch.bincount(drawn, minlength=count)[group].double()  # how often each text was drawn
        safe_below = ((1 - unsafe) * weight).cumsum(0)
        areas[i] = (unsafe * weight * safe_below).sum() / ((unsafe * weight).sum() * safe_below[-1])
    return areas


def interval(values: Tensor) -> tuple[float, float]:
    """The middle 95% of bootstrap values."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass
class Inputs:
    """Where features come from; the cache fills as parts ask for them."""

    pairs: str
    cache: Path
    backbone: str
    max_seconds: float
    layer: int
    seeds: int
    sample_layers: int | None

    def layers(self, source: str, template: str = "chat", texts: Sequence[Row] | None = None) -> LayerFeatures:
        """All layers' features of the pairs ("real"), of the packaged sample ("sample"), or of given rows.

        Raises:
            SystemExit: `max_seconds` were not enough; the next call goes on.
        """
        named = {"real": self.pairs, "sample": "sample"}
        rows = (
            texts
            if texts is not None
            else list(read_rows(named[source], split="train" if source == "sample" else None))
        )
        found = layer_features(
            self.backbone,
            rows,
            self.cache / f"{source}-{template}",
            chat_template=TEMPLATES[template],
            max_seconds=self.max_seconds,
            max_layer=None if source == "real" else self.sample_layers,
        )
        if found is None:
            raise SystemExit(f"{source}-{template}: not finished in {self.max_seconds:.0f} s; call again to go on")
        return found


def layers_part(inputs: Inputs) -> list[dict[str, Any]]:
    """Which layer and pooling: linear heads, which train in a second, on every second layer."""
    layers = inputs.layers("real")
    settings = HeadSettings()
    rows = []
    for pooling in POOLINGS:
        for layer in range(2, layers.states[pooling].shape[1] + 1, 2):
            features = feature_set(layers, layer, pooling)
            logits = out_of_fold(features, settings, trainer=linear_head)
            rows.append({"head": f"{pooling}, layer {layer}", **shown(features, logits)})
    return rows


def heads_part(inputs: Inputs) -> list[dict[str, Any]]:
    """The MLP head as `rm train` makes it, by features; gains over last token of the last layer."""
    layers = inputs.layers("real")
    final = layers.states["last"].shape[1]
    baseline_features = feature_set(layers, final, "last")
    baseline = out_of_fold(baseline_features, HeadSettings())
    rows = [{"head": f"last, layer {final}", **shown(baseline_features, baseline)}]
    for name, layer, poolings, settings in (
        (f"last, layer {final}, no contrast", final, ["last"], HeadSettings(contrast=0)),
        (f"last, layer {inputs.layer}", inputs.layer, ["last"], HeadSettings()),
        (f"mean, layer {final}", final, ["mean"], HeadSettings()),
        (f"mean, layer {inputs.layer}", inputs.layer, ["mean"], HeadSettings()),
        (f"mean, layer {inputs.layer}, no contrast", inputs.layer, ["mean"], HeadSettings(contrast=0)),
        (f"mean, layer {inputs.layer}, contrast 0.8", inputs.layer, ["mean"], HeadSettings(contrast=0.8)),
        (f"mean, layer {inputs.layer}, linear head", inputs.layer, ["mean"], HeadSettings(hidden_dims=())),
        (f"reply's mean, layer {inputs.layer}", inputs.layer, ["reply"], HeadSettings()),
        (f"last+mean, layer {inputs.layer}", inputs.layer, ["last", "mean"], HeadSettings()),
    ):
        features = feature_set(layers, layer, *poolings)
        rows.append({"head": name, **shown(features, out_of_fold(features, settings), baseline)})
    return rows


def noise_part(inputs: Inputs) -> list[dict[str, Any]]:
    """Label noise: what robust losses give, on the labels as they are and with labels of the training texts flipped."""
    features = feature_set(inputs.layers("real"), inputs.layer, "mean")
    clean = out_of_fold(features, HeadSettings())
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(features.texts, generator=generator)
    rows = []
    for share in (0.0, 0.2):
        noisy = replace(features, unsafe=torch.where(chance < share, 1 - features.unsafe, features.unsafe))
        for name, settings, trainer in (
            ("cross-entropy, smoothing 0.05 (default)", HeadSettings(), plain_head),
            ("cross-entropy, no smoothing", HeadSettings(label_smoothing=0), plain_head),
            ("cross-entropy, smoothing 0.2", HeadSettings(label_smoothing=0.2), plain_head),
            ("generalized cross-entropy, q = 0.7", HeadSettings(), gce_head),
            ("a tenth of the texts trimmed", HeadSettings(), trimmed_head),
        ):
            logits = out_of_fold(features, settings, trainer=trainer, labels=noisy)
            rows.append({"labels flipped": share, "head": name, **shown(features, logits, clean)})
    both_ways = chance < 0.1
    for name, label in (("kept, target 0.5", 0.5), ("dropped", torch.nan)):
        planted = replace(features, unsafe=torch.where(both_ways, torch.tensor(label), features.unsafe))
        logits = out_of_fold(features, HeadSettings(), labels=planted)
        rows.append({"labelled both ways": 0.1, "head": name, **shown(features, logits, clean)})
    return rows


def gce_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """A head on generalized cross-entropy, (1 - p^q) / q with p the probability of the label (arXiv:1805.07836).

    Texts that the head finds implausible weigh less (p^q times their cross-entropy's gradient). Pairs of one prompt are
    compared with the same loss.
    """

    def loss(logits: Tensor, q: float = 0.7) -> Tensor:  # logits of the label being right
        return ((1 - logits.sigmoid().pow(q)) / q).mean()

    def of(head: TrainableHead, part: Part, rows: Tensor) -> Tensor:
        signs = torch.where(part.targets[rows] > 0.5, 1.0, -1.0)
        texts = loss(signs * head(features.hidden[part.items[rows]]))
        if part.contrast is None:
            return texts
        pairs = part.contrast[torch.randint(len(part.contrast), (len(rows),))]
        compared = head(features.hidden[pairs.flatten()]).view(-1, 2)
        return (1 - settings.contrast) * texts + settings.contrast * loss(compared[:, 0] - compared[:, 1])

    torch.manual_seed(settings.seed)
    known = features.hidden[train.items]
    head = TrainableHead(known.mean(0), known.std(0).clamp(min=1e-6), settings.hidden_dims, settings.dropout)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best, best_state, since = math.inf, copy.deepcopy(head.state_dict()), 0
    for _ in range(settings.max_epochs):
        head.train()
        for rows in torch.randperm(len(train)).split(settings.batch_size):
            optimizer.zero_grad()
            of(head, train, rows).backward()
            optimizer.step()
        head.eval()
        with torch.no_grad():
            validated = of(head, validation, torch.arange(len(validation))).item()
        since += 1
        if validated < best:
            best, best_state, since = validated, copy.deepcopy(head.state_dict()), 0
        if since >= settings.patience:
            break
    head.load_state_dict(best_state)
    return head.folded()


def trimmed_head(features: FeatureSet, train: Part, validation: Part, settings: HeadSettings) -> dict[str, Tensor]:
    """A head on the nine tenths of the training texts whose labels heads of the other prompts find most plausible."""
    prompts = features.prompt_id[train.items]
    first = torch.isin(prompts, prompts.unique()[::2])
    losses = torch.zeros(len(train))
    for own in (first, ~first):
        tensors = plain_head(features, only(train, ~own), validation, settings)
        logits = head_logits(tensors, features.hidden[train.items[own]])
        losses[own] = F.binary_cross_entropy_with_logits(logits, train.targets[own].round(), reduction="none")
    return plain_head(features, only(train, losses <= losses.quantile(0.9)), validation, settings)


def only(part: Part, chosen: Tensor) -> Part:
    """The chosen items of a part, and the pairs among them."""
    items, contrast = part.items[chosen], part.contrast
    if contrast is not None:
        contrast = contrast[torch.isin(contrast, items).all(dim=1)]
    return Part(items, part.targets[chosen], part.weights[chosen], contrast, part.helpful)


def curve_part(inputs: Inputs) -> list[dict[str, Any]]:
    """More data or a better backbone: what a half, a quarter and an eighth of the training prompts give."""
    features = feature_set(inputs.layers("real"), inputs.layer, "mean")
    rows = []
    for share in (0.125, 0.25, 0.5, 1.0):
        logits = out_of_fold(features, HeadSettings(), share=share)
        rows.append({"share of training prompts": share, **shown(features, logits)})
    return rows


def sample_part(inputs: Inputs) -> list[dict[str, Any]]:
    """Heads that saw the packaged sample only, on all real pairs and on the default policy's own replies.

    Safe scores of the policy's replies say how much there is to gain by GRPO; their std within a prompt, how much
    signal a group has.
    """
    rows = []
    replies = policy_replies(inputs)
    for layer, pooling in itertools.product((30, 22, 18, 16, 14, 12), ("last", "mean")):
        sets = {name: inputs.layers(name) for name in ("sample", "real")}
        sets["replies"] = inputs.layers("replies", "chat", replies)
        if layer > min(one.states["last"].shape[1] for one in sets.values()):
            continue  # not computed
        features = {name: feature_set(one, layer, pooling) for name, one in sets.items()}
        found = []
        for seed in range(inputs.seeds):
            settings = HeadSettings(seed=seed)
            sample = features["sample"]
            validation, _, train = split_prompts(sample.prompt_id, (0.1, 0.1), seed)
            tensors = plain_head(sample, *(part_of(sample, ids, settings) for ids in (train, validation)), settings)
            temperature = calibrate(tensors, sample, validation, settings)
            logits = {n: head_logits(tensors, f.hidden, temperature=temperature) for n, f in features.items()}
            texts = features["replies"].row_texts.view(-1, REPLIES)  # (prompts, replies)
            safe, benign = torch.sigmoid(-logits["replies"])[texts], features["replies"].benign[texts[:, 0]] == 1
            found.append(
                {
                    **shown(features["real"], logits["real"]),
                    "policy safe, unsafe prompts": round(safe[~benign].mean().item(), 3),
                    "policy safe, benign prompts": round(safe[benign].mean().item(), 3),
                    "std within a prompt": round(safe.std(dim=1).mean().item(), 3),
                }
            )
        rows.append({"head": f"{pooling}, layer {layer}", **over_seeds(found)})
    return rows


def policy_replies(inputs: Inputs) -> list[Row]:
    """REPLIES replies of the default policy, sampled as the default recipe samples, to PROMPTS prompts of the sample's
    test split, half of them harmless; two rows of two replies for each prompt."""
    from ups_rm.local.decode import Sampling
    from ups_rm.local.policy import Policy
    from ups_rm.local.rollout import RolloutEngine
    from ups_rm.recipe import load_recipe

    file = inputs.cache / "replies.jsonl"
    if not file.is_file():
        kinds: dict[str, list[str]] = {"unsafe": [], "benign": []}
        for row in read_rows("sample", split="test"):
            kind = kinds["benign" if (row.prompt_source or "").endswith("benign") else "unsafe"]
            if row.prompt not in kind and len(kind) < PROMPTS // 2:
                kind.append(row.prompt)
        recipe = load_recipe()
        temperature = recipe.actor_rollout_ref.rollout.temperature
        engine = RolloutEngine(Policy.load(recipe, trainable=False))
        written = []
        for kind, prompts in kinds.items():
            messages = [[Message(role="user", content=prompt)] for prompt in prompts]
            sampling = Sampling(temperature=temperature, seed=0)
            texts = engine.generate(messages, n=REPLIES, max_new_tokens=48, sampling=sampling).texts
            for i, prompt in enumerate(prompts):
                for at in range(i * REPLIES, (i + 1) * REPLIES, 2):
                    row = {"prompt": prompt, "response_0": texts[at], "response_1": texts[at + 1]}
                    written.append(json.dumps(row | {"prompt_source": kind}))
        file.write_text("\n".join(written) + "\n", encoding="utf-8")
    return list(read_rows(str(file)))


def lora_part(inputs: Inputs) -> list[dict[str, Any]]:
    """What `rm train --lora` gains: one split, the first fold, on the backbone trimmed to the layer, mean-pooled.

    Call it again if it was stopped before training began; training itself does not resume.
    """
    layers = inputs.layers("real")
    features = feature_set(layers, inputs.layer, "mean")
    test = torch.isin(features.prompt_id, folds_of(features)[0][2])
    rows = list(read_rows(inputs.pairs))
    held_out = {layers.texts.prompts[i] for i in test.nonzero()[:, 0].tolist()}
    parts = [[row for row in rows if (row.prompt in held_out) == wanted] for wanted in (False, True)]
    folder = inputs.cache / "lora"
    if not (folder / "head" / "head.json").is_file():
        trimmed = trim_backbone(
            inputs.backbone, folder / "trimmed", layers=inputs.layer, chat_template=None, overwrite=True
        )
        settings = LoraSettings(from_layer=inputs.layer // 4, epochs=2, lr=3e-4, max_batch_tokens=2048)
        head = HeadSettings(validation_share=0.1, test_share=0)
        train_lora(trimmed, parts[0], folder, head, settings, pooling="mean", overwrite=True)
    extract_features(folder / "backbone", parts[1], folder / "test.safetensors", pooling="mean", overwrite=True)
    adapted, head_weights = FeatureSet.read(folder / "test.safetensors"), read_head(folder / "head")
    with_lora = head_logits(head_weights.tensors, adapted.hidden, temperature=head_weights.temperature)
    frozen = out_of_fold(features, HeadSettings(), folds=[0])[test]  # the same texts in the same order
    return [
        {"head": f"frozen, mean, layer {inputs.layer}", **shown(adapted, frozen)},
        {"head": f"LoRA, mean, layer {inputs.layer}", **shown(adapted, with_lora, frozen)},
    ]


def shown(features: FeatureSet, logits: Tensor, baseline: Tensor | None = None) -> dict[str, Any]:
    """Figures as they are printed and written."""

    def span(ci95: tuple[float, float]) -> str:
        return f"[{ci95[0]:+.3f}, {ci95[1]:+.3f}]" if min(ci95) < 0 else f"[{ci95[0]:.3f}, {ci95[1]:.3f}]"

    one = figures(features, logits, baseline)
    row: dict[str, Any] = {
        "AUC": round(one.auc, 4),
        "AUC 95%": span(one.auc_ci95),
        "pairwise": round(one.pairwise, 4),
        "pairwise 95%": span(one.pairwise_ci95),
    }
    if one.auc_gain_ci95 and one.pairwise_gain_ci95:
        row |= {"AUC gain 95%": span(one.auc_gain_ci95), "pairwise gain 95%": span(one.pairwise_gain_ci95)}
    return row


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers as their mean over seeds; of intervals the first seed's."""
    return {
        name: value if isinstance(value, str) else round(sum(row[name] for row in rows) / len(rows), 4)
        for name, value in rows[0].items()
    }


PARTS: dict[str, Callable[[Inputs], list[dict[str, Any]]]] = {
    "layers": layers_part,
    "heads": heads_part,
    "noise": noise_part,
    "curve": curve_part,
    "sample": sample_part,
    "lora": lora_part,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, prints a table of each and writes all findings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="labelled rows or pairs to measure on")
    parser.add_argument("--cache", type=Path, default=Path("runs/rm_quality"), help="folder for hidden states")
    parser.add_argument("--out", type=Path, default=Path("runs/rm_quality/results.json"))
    parser.add_argument("--parts", default="layers,heads,noise,curve,sample", help=f"of {','.join(PARTS)}")
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, default=16, help="the earlier layer that is looked at more closely")
    parser.add_argument("--seeds", type=int, default=3, help="heads per row of the part `sample`")
    parser.add_argument("--sample-layers", type=int, help="compute only so many layers of the sample (cheaper)")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="stop computing hidden states after this long")
    given = parser.parse_args(arguments)
    inputs = Inputs(
        given.pairs,
        given.cache,
        resolve_model(given.backbone),
        given.max_seconds,
        given.layer,
        given.seeds,
        given.sample_layers,
    )
    for name in given.parts.split(","):
        if name not in PARTS:
            parser.error(f"--parts: {name!r} is none of {', '.join(PARTS)}")
    for name in given.parts.split(","):
        rows = PARTS[name](inputs)
        print_table(name, rows)
        found = json.loads(given.out.read_text()) if given.out.is_file() else {}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found | {name: rows}, indent=1) + "\n")
    return 0


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
