"""How well a small backbone judges real pairs: layer, pooling, loss, noise, ensembles, LoRA, the packaged sample.

    python -m benchmarks.rm_quality --pairs pairs.jsonl --cache cache --out results.json --parts layers,heads

The pairs are any rows that `ups-rm rm features --data` takes and that say which reply is unsafe. Everything is measured
on prompts that were not trained on: five folds by prompt, so each pair counts once. Intervals are percentile bootstraps
over prompts. Hidden states are computed once (layer_features.py) and kept in the cache folder; heads train on them in
seconds. Findings: docs/rm-quality.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.layer_features import POOLINGS
from benchmarks.rm_heads import (
    feature_set,
    gce_head,
    linear_head,
    out_of_fold,
    plain_head,
    trimmed_head,
)
from benchmarks.rm_ideas import ideas_part
from benchmarks.rm_inputs import TEMPLATES, Finding, Inputs, shown
from benchmarks.rm_lora import lora_part
from benchmarks.rm_ridge import ridge_part
from ups_rm.console import console
from ups_rm.data.rows import Row, read_rows
from ups_rm.models import resolve_model
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.head import calibrate, head_logits, split_prompts
from ups_rm.reward.head_objective import HeadSettings, part_of
from ups_rm.types import Message

PROMPTS, REPLIES = 32, 4
PROBE = HeadSettings(hidden_dims=(64,))
"""A smaller head, four times faster, where ways of training are compared with each other only."""


def layers_part(inputs: Inputs) -> Iterator[Finding]:
    """Which layer and pooling: linear heads, which train in a second, on every second layer."""
    layers = inputs.layers("real")
    for pooling in POOLINGS:
        for layer in range(2, layers.states[pooling].shape[1] + 1, 2):
            features = feature_set(layers, layer, pooling)
            logits = out_of_fold(features, HeadSettings(), trainer=linear_head)
            yield {"linear head on": f"{pooling}, layer {layer}", **shown(features, logits)}


def linear_part(inputs: Inputs) -> Iterator[Finding]:
    """Linear heads: share of the comparing loss, pooled states side by side, layers side by side."""
    layers, layer = inputs.layers("real"), inputs.layer
    one = feature_set(layers, layer, "mean")
    baseline = out_of_fold(one, HeadSettings(), trainer=linear_head)
    yield {"linear head on": f"mean, layer {layer}", **shown(one, baseline)}
    for contrast in (0.0, 0.25, 0.75):
        logits = out_of_fold(one, HeadSettings(contrast=contrast), trainer=linear_head)
        yield {"linear head on": f"mean, layer {layer}, contrast {contrast}", **shown(one, logits, baseline)}
    for poolings in (["last", "mean"], ["mean", "reply"]):
        both = feature_set(layers, layer, *poolings)
        logits = out_of_fold(both, HeadSettings(), trainer=linear_head)
        yield {"linear head on": f"{'+'.join(poolings)}, layer {layer}", **shown(both, logits, baseline)}
    several = [at for at in (layer - 4, layer, layer + 6) if 0 < at <= layers.states["mean"].shape[1]]
    beside = replace(one, hidden=torch.cat([layers.of(at, "mean") for at in several], dim=1))
    logits = out_of_fold(beside, HeadSettings(), trainer=linear_head)
    yield {"linear head on": f"mean, layers {several} side by side", **shown(beside, logits, baseline)}


def heads_part(inputs: Inputs) -> Iterator[Finding]:
    """The MLP head as `rm train` makes it, by features; gains over last token of the last layer."""
    layers, layer = inputs.layers("real"), inputs.layer
    final = layers.states["last"].shape[1]
    baseline = None
    for name, at, pooling, contrast in (
        (f"last, layer {final}", final, "last", 0.5),
        (f"mean, layer {layer}", layer, "mean", 0.5),
        (f"last, layer {layer}", layer, "last", 0.5),
        (f"mean, layer {final}", final, "mean", 0.5),
        (f"mean, layer {layer}, no contrast", layer, "mean", 0.0),
        (f"reply's mean, layer {layer}", layer, "reply", 0.5),
    ):
        features = feature_set(layers, at, pooling)
        logits = out_of_fold(features, HeadSettings(contrast=contrast))
        yield {"MLP head on": name, **shown(features, logits, baseline)}
        baseline = logits if baseline is None else baseline


def noise_part(inputs: Inputs) -> Iterator[Finding]:
    """Label noise: what robust losses give, on the labels as they are and with labels of the training texts flipped."""
    features = feature_set(inputs.layers("real"), inputs.layer, "mean")
    clean = out_of_fold(features, PROBE)
    chance = torch.rand(features.texts, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.2):
        noisy = replace(features, unsafe=torch.where(chance < share, 1 - features.unsafe, features.unsafe))
        for name, settings, trainer in (
            ("cross-entropy, smoothing 0.05 (default)", PROBE, plain_head),
            ("cross-entropy, no smoothing", replace(PROBE, label_smoothing=0), plain_head),
            ("cross-entropy, smoothing 0.2", replace(PROBE, label_smoothing=0.2), plain_head),
            ("generalized cross-entropy, q = 0.7", PROBE, gce_head),
            ("a tenth of the texts trimmed", PROBE, trimmed_head),
        ):
            logits = out_of_fold(features, settings, trainer=trainer, labels=noisy)
            yield {"training labels": f"{share:.0%} flipped", "loss": name, **shown(features, logits, clean)}
    linear = out_of_fold(features, HeadSettings(), trainer=linear_head)
    for share in (0.1, 0.2):
        for name, label in (("kept, target 0.5", 0.5), ("dropped", torch.nan)):
            planted = replace(features, unsafe=torch.where(chance < share, torch.tensor(label), features.unsafe))
            logits = out_of_fold(features, HeadSettings(), trainer=linear_head, labels=planted)
            row = {"training labels": f"{share:.0%} both ways", "loss": f"linear head, {name}"}
            yield row | shown(features, logits, linear)


def curve_part(inputs: Inputs) -> Iterator[Finding]:
    """More data or a better backbone: what an eighth, a quarter and a half of the training prompts give."""
    features = feature_set(inputs.layers("real"), inputs.layer, "mean")
    for share in (0.125, 0.25, 0.5, 1.0):
        yield {"share of training prompts": share, **shown(features, out_of_fold(features, PROBE, share=share))}


def sample_part(inputs: Inputs) -> Iterator[Finding]:
    """Heads that saw the packaged sample only, on all real pairs and on the default policy's own replies.

    Safe scores of the policy's replies say how much there is to gain by GRPO; their std within a prompt, how much
    signal a group has.
    """
    sets = {"sample": inputs.layers("sample"), "real": inputs.layers("real")}
    sets["replies"] = inputs.layers("replies", policy_replies(inputs))
    deepest = min(one.states["last"].shape[1] for one in sets.values())
    for layer, pooling in itertools.product(sorted({inputs.layer, deepest}), ("last", "mean")):
        features = {name: feature_set(one, layer, pooling) for name, one in sets.items()}
        found = [_from_sample(features, HeadSettings(seed=seed)) for seed in range(inputs.seeds)]
        yield {"head from the sample on": f"{pooling}, layer {layer}", **over_seeds(found)}


def _from_sample(features: dict[str, FeatureSet], settings: HeadSettings) -> Finding:
    sample = features["sample"]
    validation, _, train = split_prompts(sample.prompt_id, (0.1, 0.1), settings.seed)
    tensors = plain_head(sample, *(part_of(sample, ids, settings) for ids in (train, validation)), settings)
    temperature = calibrate(tensors, sample, validation, settings)
    logits = {name: head_logits(tensors, one.hidden, temperature=temperature) for name, one in features.items()}
    texts = features["replies"].row_texts.reshape(-1, REPLIES)  # (prompts, replies)
    safe, benign = torch.sigmoid(-logits["replies"])[texts], features["replies"].benign[texts[:, 0]] == 1
    return {
        **shown(features["real"], logits["real"]),
        "policy safe, unsafe prompts": round(safe[~benign].mean().item(), 3),
        "policy safe, benign prompts": round(safe[benign].mean().item(), 3),
        "std within a prompt": round(safe.std(dim=1).mean().item(), 3),
    }


def policy_replies(inputs: Inputs) -> list[Row]:
    """REPLIES replies of the default policy, sampled as the default recipe samples, to PROMPTS prompts of the sample's
    test split, half of them harmless; two rows of two replies for each prompt."""
    from ups_rm.local.policy import Policy
    from ups_rm.local.rollout import RolloutEngine
    from ups_rm.local.sampling import Sampling
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


def over_seeds(rows: list[Finding]) -> Finding:
    """Numbers as their mean over seeds; of intervals the first seed's."""
    return {
        name: value if isinstance(value, str) else round(sum(row[name] for row in rows) / len(rows), 4)
        for name, value in rows[0].items()
    }


PARTS: dict[str, Callable[[Inputs], Iterator[Finding]]] = {
    "layers": layers_part,
    "linear": linear_part,
    "heads": heads_part,
    "noise": noise_part,
    "curve": curve_part,
    "sample": sample_part,
    "ideas": ideas_part,
    "lora": lora_part,
    "ridge": ridge_part,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, prints a table of each and writes all findings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="labelled rows or pairs to measure on")
    parser.add_argument("--cache", type=Path, default=Path("runs/rm_quality"), help="folder for hidden states")
    parser.add_argument("--out", type=Path, default=Path("runs/rm_quality/results.json"))
    parser.add_argument("--parts", default="layers,linear,heads,noise,curve,sample", help=f"of {','.join(PARTS)}")
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--template", default="chat", choices=TEMPLATES, help="judge: a question follows the reply")
    parser.add_argument("--layer", type=int, default=16, help="the earlier layer that is looked at more closely")
    parser.add_argument("--seeds", type=int, default=3, help="heads per row of the part `sample`, of an ensemble")
    parser.add_argument("--max-layer", type=int, help="compute only the first so many layers (cheaper)")
    parser.add_argument("--folds", default="0", help="of 0 to 4, those that the part `lora` trains on")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="stop computing hidden states after this long")
    given = parser.parse_args(arguments)
    inputs = Inputs(
        given.pairs,
        given.cache,
        resolve_model(given.backbone),
        given.max_seconds,
        given.layer,
        given.seeds,
        given.max_layer,
        given.template,
        tuple(int(fold) for fold in given.folds.split(",")),
    )
    for name in given.parts.split(","):
        if name not in PARTS:
            parser.error(f"--parts: {name!r} is none of {', '.join(PARTS)}")
    for name in given.parts.split(","):
        rows: list[Finding] = []
        for row in PARTS[name](inputs):
            rows.append(row)
            console.print(", ".join(f"{key} {value}" for key, value in row.items()), soft_wrap=True)
            found = json.loads(given.out.read_text()) if given.out.is_file() else {}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found | {name: rows}, indent=1) + "\n")
        print_table(name, rows)
    return 0


def print_table(title: str, rows: list[Finding]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
