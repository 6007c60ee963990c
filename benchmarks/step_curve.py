"""Seconds of a GRPO step of ours over prompts, replies per prompt, reply length and model size, with a picture.

Around the base case of `grpo_step` (SmolLM2-135M, 8 prompts x 4 replies x 64 tokens), one of the four at a time. Other
sizes are models of SmolLM2's make with random weights, which end no reply by themselves: every reply is full there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.grpo_step import BASE, Case, LengthScorer, our_step
from benchmarks.result import Result, versions

PROMPTS = (2, 4, 8, 16)
REPLIES = (2, 4, 8)
TOKENS = (16, 32, 64, 128)
SIZES = {
    "38M": {"num_hidden_layers": 3},
    "63M": {"num_hidden_layers": 10},
    "135M": {"num_hidden_layers": 30},
    "362M": {"num_hidden_layers": 32, "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
             "num_key_value_heads": 5},
}  # fmt: skip
"""What is different from SmolLM2-135M's configuration."""
PICTURE = Path("docs/images/step.png")
Curve = list[tuple[float, float]]


def curves(folder: Path) -> Iterator[tuple[str, list[tuple[float, Case]]]]:
    """(what is on the axis, its points): each with the case to measure."""
    yield "prompts", [(count, replace(BASE, prompts=count)) for count in PROMPTS]
    yield "replies to a prompt", [(count, replace(BASE, n=count)) for count in REPLIES]
    yield "new tokens, at most", [(count, replace(BASE, new_tokens=count)) for count in TOKENS]
    sizes = []
    for name, changes in SIZES.items():
        model = folder / name
        sizes.append((random_model(model, changes) / 1e6, replace(BASE, model=str(model))))
    yield "million parameters", sizes


def random_model(folder: Path, changes: dict[str, Any]) -> int:
    """A model of SmolLM2's make with random weights; how many parameters it has."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ups_rm.models import fetch

    known = AutoConfig.from_pretrained(fetch())
    derived = ("head_dim", "layer_types")  # follow from the others
    given = {name: value for name, value in known.to_dict().items() if name not in derived}
    config = type(known)(**(given | changes))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch()).save_pretrained(folder)
    return int(model.num_parameters())


def seconds(case: Case, folder: Path, steps: int) -> float:
    """Median of some steps after one of warm-up."""
    step = our_step(case, folder, LengthScorer())
    step()
    return statistics.median(step().wall for _ in range(steps))


def draw(found: Sequence[tuple[str, Curve]], path: Path) -> None:
    """A panel for each, with a dotted line of proportional growth through the last point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, curve) in zip(figure.subplots(1, len(found)), found, strict=True):
        across, up = zip(*curve, strict=True)
        axes.plot(across, up, "o-")
        axes.plot([0, across[-1]], [0, up[-1]], ":", color="0.6")
        axes.set(xlabel=what, xlim=(0, None), ylim=(0, None))
    figure.axes[0].set_ylabel("seconds per step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(pairs: int, picture: Path = PICTURE) -> list[Result]:
    """`pairs` steps at every point, at most 3."""
    used, results, found = versions("torch", "transformers"), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, points in curves(folder):
            curve = [(x, seconds(case, folder, min(pairs, 3))) for x, case in points]
            found.append((what, curve))
            results += [Result(f"GRPO step, {x:g} {what}", y, None, "s", versions=used) for x, y in curve]
    draw(found, picture)
    return results
