"""The RM folder's page for people: README.md in Hugging Face's form with plots, and `rm card --describe`.

Everything on it comes from rm_card.json and, where `rm merge` put them, from `rm_curves.json` (what the head's held-out
figures were drawn from). A README.md that somebody else wrote is left alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ups_rm.errors import RMError
from ups_rm.reward.card import CARD_FILE, RMCard

CURVES_FILE = "rm_curves.json"
SAYS = {
    "unsafety": "A reward model: a decoder with an MLP head that reads a conversation and answers **one logit, higher "
    "= less safe** (of the last reply). `safe_score = sigmoid(-logit)` is what a policy is rewarded with.",
    "unsafety, helpfulness": "A reward model: a decoder with two MLP heads that reads a conversation and answers **two "
    "logits of the last reply: higher = less safe, and higher = more helpful**. `safe_score = sigmoid(-first)`; "
    "the second compares replies to one prompt, its 0 has no meaning.",
    "helpfulness": "A reward model: a decoder with an MLP head that reads a conversation and answers **one logit, "
    "higher = more helpful** (of the last reply). It compares replies to one prompt and says nothing of safety.",
}
"""What an RM of these heads answers."""
README = "README.md"
MARK = "<!-- written by ups-rm from rm_card.json; take this line out to keep your own changes -->"
PLOTS = {
    "rm_roc.png": "ROC curve on held-out prompts",
    "rm_reliability.png": "Calibration: predicted against observed share of unsafe replies",
    "rm_logits.png": "Logits of safe and unsafe replies",
    "rm_categories.png": "AUC by harm category",
}
HELPFUL_COLUMNS = {
    "longer_is_better": "of always taking the longer reply",
    "safety_head": "of the safety head",
    "safer_is_better": "where the better reply is the safer one",
    "safer_is_worse": "where it is the less safe one",
}
"""Of a helpfulness head, further pairwise accuracies on the same pairs."""
COLUMNS = {"auc": "AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced", "ece": "ECE"}


def keep_curves(folder: Path, head: Path) -> None:
    """Put the head's curves.json and metrics.json into an RM folder, as one file; nothing where it has none."""
    head = head.parent if head.is_file() else head
    found = {name: head / f"{name}.json" for name in ("curves", "metrics")}
    kept = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items() if file.is_file()}
    if kept:
        (folder / CURVES_FILE).write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model_card(folder: Path) -> list[Path]:
    """README.md and its plots beside rm_card.json.

    Returns:
        The files written; none where README.md is not ours.

    Raises:
        RMError: the folder has no card.
    """
    card = RMCard.read(folder)
    if card is None:
        raise RMError(f"{folder} has no {CARD_FILE}\n  fix: ups-rm rm card {folder}")
    readme = folder / README
    if readme.exists() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        return []
    kept = _kept(folder)
    plots = _draw(folder, kept.get("curves") or {}, _categories(kept))
    temporary = folder / f".{README}.tmp"
    temporary.write_text(_page(card, folder.resolve().name, kept, plots), encoding="utf-8")
    temporary.replace(readme)
    return [readme, *plots]


def describe(card: RMCard) -> list[tuple[str, str]]:
    """(what, how it is) of a card, in words."""
    policy, backbone, head = card.render, card.backbone, card.head
    shape = ", ".join(f"{name} {value}" for name, value in backbone.items() if name not in ("name", "model_type"))
    rows = [
        ("output", f"{card.output}; {card.sign}"),
        *((name, f"output {i + 1}: {meaning}") for i, (name, meaning) in enumerate(card.outputs.items())),
        ("score", card.transform),
        ("backbone", f"{backbone.get('name', 'unknown')} ({backbone.get('model_type', 'unknown')}: {shape})"),
        ("head", f"MLP {card.hidden_dim_str or 'without hidden layers'} on the {card.pooling} hidden state"),
        ("trained on", f"{card.labels}; loss {head.get('loss', 'unknown')}, seed {head.get('seed', 'unknown')}"),
        ("data", ", ".join(map(str, head.get("sources") or ["unknown"]))),
        ("prompts", ", ".join(f"{n:,} {part}" for part, n in (head.get("prompts") or {}).items()) or "unknown"),
        ("temperature", f"{card.temperature:.3g}, folded into the output layer"),
        ("BOS", "exactly one at the start" if policy.bos == "one" else "none"),
        ("end of a reply", policy.end_token or "as the template writes it"),
        ("limit", f"{policy.max_length:,} tokens; of longer conversations the {policy.truncation_side} end is cut"),
        ("chat template", f"sha256 {card.chat_template_sha256[:12]}…"),
        ("golden answers", f"in {card.dtype}: {', '.join(f'{golden.logit:.3f}' for golden in card.golden)}"),
    ]
    for name, figures in (head.get("metrics") or {}).items():
        rows.append((f"measured: {name}", _figures(figures)))
    if second := card.helpfulness_head:
        told = f"{second.get('labels', 'unknown')}; temperature {second.get('temperature', 1.0):.3g}"
        rows.append(("helpfulness trained on", told))
        golden = ", ".join(f"{one.helpfulness:.3f}" for one in card.golden)
        rows.append(("golden helpfulness", f"in {card.dtype}: {golden}"))
    for name, figures in (card.helpfulness_head.get("metrics") or {}).items():
        rows.append((f"measured: helpfulness, {name}", _figures(figures)))
    return rows


def print_card(card: RMCard, folder: Path) -> None:
    """`describe` as a table."""
    from rich.table import Table

    from ups_rm.console import console

    table = Table(title=str(folder), title_justify="left", show_header=False)
    for what, how in describe(card):
        table.add_row(what, how.replace("[", r"\["))
    console.print(table)


def _figures(figures: dict[str, Any]) -> str:
    shown = [f"{label} {figures[name]:.3f}" for name, label in COLUMNS.items() if _is_number(figures.get(name))]
    if _is_number(figures.get("pairwise_accuracy")):
        low, high = figures.get("pairwise_ci95") or (None, None)
        interval = f" [{low:.3f}, {high:.3f}]" if _is_number(low) and _is_number(high) else ""
        shown.append(
            f"pairwise accuracy {figures['pairwise_accuracy']:.3f}{interval} ({figures.get('pairs', 0):,} pairs)"
        )
    for name, label in HELPFUL_COLUMNS.items():
        if _is_number(figures.get(name)):
            shown.append(f"{label} {figures[name]:.3f}")
    return ", ".join([*shown, *([f"{figures['texts']:,} texts"] if "texts" in figures else [])])


def _page(card: RMCard, name: str, kept: dict[str, Any], plots: list[Path]) -> str:
    """The text of README.md."""
    metrics = card.head.get("metrics") or {}
    alone = card.heads == ("helpfulness",)
    safety, ask = (", safety=False", "helpfulness") if alone else ("", "score")
    lines = ["---", *_front_matter(card, name, metrics), "---", MARK, f"# {name}", ""]
    lines += [
        SAYS[", ".join(card.heads)],
        "",
        "## Use",
        "",
        "```python",
        "from ups_rm import RewardScorer",
        "",
        f'scorer = RewardScorer.load("{name}"{safety})  # checks weights, tokenizer and golden answers against '
        "rm_card.json",
        f'print(scorer.{ask}([[{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Hello!"}}]]))',
        "```",
        "",
        "Plain transformers loads it too: `AutoModelForTokenClassification.from_pretrained(..., "
        "trust_remote_code=True)`; render conversations as the table says.",
        "",
        "## What it is",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {_cell(how)} |" for what, how in describe(card) if not what.startswith("measured")),
        "",
    ]
    lines += [] if alone else _measured(metrics, _categories(kept))
    lines += _helpful_measured(metrics if alone else card.helpfulness_head.get("metrics") or {})
    for plot in plots:
        lines += [f"![{PLOTS[plot.name]}]({plot.name})", "", f"*{PLOTS[plot.name]}.*", ""]
    lines += _provenance(card)
    return "\n".join(lines) + "\n"


def _front_matter(card: RMCard, name: str, metrics: dict[str, Any]) -> list[str]:
    import yaml

    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "safety", "ups-rm"],
    }
    backbone = str(card.backbone.get("name", ""))
    if "/" in backbone:  # a hub id; names of local folders mean nothing to others
        matter["base_model"] = backbone
    held_out = metrics.get("held_out") or {}
    values = [
        {"type": kind, "name": label, "value": held_out[key]}
        for key, kind, label in (("auc", "roc_auc", "AUC"), ("pairwise_accuracy", "accuracy", "pairwise accuracy"))
        if _is_number(held_out.get(key))
    ]
    if values:
        data = {"type": "held-out", "name": ", ".join(map(str, card.head.get("sources") or ["unknown"]))}
        quality = "helpfulness" if card.heads == ("helpfulness",) else "safety"
        task = {"type": "text-classification", "name": f"{quality} of a reply"}
        matter["model-index"] = [{"name": name, "results": [{"task": task, "dataset": data, "metrics": values}]}]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).rstrip("\n").split("\n")


def _measured(metrics: dict[str, Any], categories: dict[str, dict[str, Any]]) -> list[str]:
    if not metrics:
        return ["## How good it is", "", "Not known: the card holds no figures of its training.", ""]
    head = ["texts", "unsafe", *COLUMNS.values(), "pairs", "pairwise accuracy [95%]"]
    lines = ["## How good it is", "", f"| | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    rows = list(metrics.items())
    rows += [(f"held_out: {name}", figures) for name, figures in categories.items()]
    for name, figures in rows:
        low, high = figures.get("pairwise_ci95") or (None, None)
        interval = f" [{_number(low)}, {_number(high)}]" if _is_number(low) else ""
        cells = [f"{figures.get('texts', 0):,}", _number(figures.get("unsafe_share"))]
        cells += [_number(figures.get(key)) for key in COLUMNS]
        cells += [f"{figures.get('pairs', 0):,}", _number(figures.get("pairwise_accuracy")) + interval]
        lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "`held_out` are prompts of the training sources that the head never saw; the other rows are further data or, "
        "as `frozen backbone`, a comparison. AUC: chance that an unsafe text has the higher logit. Pairwise accuracy: "
        "share of pairs whose less safe reply has the higher logit, interval by bootstrap over prompts.",
        "",
    ]


def _helpful_measured(metrics: dict[str, Any]) -> list[str]:
    """The helpfulness head's figures as a table; nothing where there are none."""
    if not metrics:
        return []
    head = ["pairs", "pairwise accuracy [95%]", *HELPFUL_COLUMNS.values()]
    lines = ["## How good its helpfulness is", "", f"| | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    for name, figures in metrics.items():
        low, high = figures.get("pairwise_ci95") or (None, None)
        interval = f" [{_number(low)}, {_number(high)}]" if _is_number(low) else ""
        cells = [f"{figures.get('pairs', 0):,}", _number(figures.get("pairwise_accuracy")) + interval]
        cells += [_number(figures.get(key)) for key in HELPFUL_COLUMNS]
        lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Share of pairs whose better reply (`better_response_id`) has the higher helpfulness logit, interval by "
        "bootstrap over prompts; beside it what other rules reach on the same pairs, and the head itself on parts of "
        "them.",
        "",
    ]


def _provenance(card: RMCard) -> list[str]:
    head = card.head
    told = {k: v for k, v in head.items() if k not in ("metrics", "sources", "prompts", "labels", "loss", "seed")}
    return [
        "## Where it comes from",
        "",
        f"- Backbone: {card.backbone.get('name', 'unknown')}; its license holds for these weights too.",
        f"- Labels: {card.labels}. Rows: {', '.join(map(str, head.get('sources') or ['unknown']))}.",
        f"- Split by prompt: {json.dumps(head.get('prompts') or 'unknown')}, seed {head.get('seed', 'unknown')}.",
        f"- Training: `{json.dumps(told, ensure_ascii=False)}`" if told else "- Training: unknown.",
        "",
        "Labels of safety carry the judgement and the errors of those who gave them. Measure the RM on your own data "
        "(`ups-rm rm check FOLDER --data PAIRS`) before you train against it.",
    ]


def _draw(folder: Path, curves: dict[str, Any], categories: dict[str, dict[str, Any]]) -> list[Path]:
    """The plots that there is data for; those of an earlier page that there is none for are removed."""
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)
    scored = {name: one["auc"] for name, one in categories.items() if _is_number(one.get("auc"))}
    if not curves and not scored:
        return []
    from matplotlib.figure import Figure

    drawn: dict[str, Figure] = {}
    if curves:
        drawn["rm_roc.png"], axes = _axes("share of safe replies called unsafe", "share of unsafe replies found")
        axes.plot(*zip(*curves["roc"], strict=True))
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        drawn["rm_reliability.png"], axes = _axes("mean sigmoid(logit) of the bin", "share of unsafe replies in it")
        predicted, observed, texts = zip(*curves["reliability"], strict=True)
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        axes.plot(predicted, observed, linewidth=1)
        axes.scatter(predicted, observed, s=[10 + 200 * n / max(texts) for n in texts])
        drawn["rm_logits.png"], axes = _axes("logit (higher = less safe)", "texts")
        edges = curves["histogram"]["edges"]
        for kind in ("safe", "unsafe"):
            axes.stairs(curves["histogram"][kind], edges, fill=True, alpha=0.5, label=kind)
        axes.legend()
    if scored:
        drawn["rm_categories.png"], axes = _axes("AUC", "")
        names = sorted(scored, key=lambda name: scored[name])
        axes.barh(names, [scored[name] for name in names])
        axes.axvline(0.5, color="grey", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=100, bbox_inches="tight", metadata={"Software": None})
    return [folder / name for name in drawn]


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _kept(folder: Path) -> dict[str, Any]:
    file = folder / CURVES_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RMError(f"{file} can't be read: {error}\n  fix: remove it; the model card then has no plots") from error


def _categories(kept: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(((kept.get("metrics") or {}).get("held_out") or {}).get("by_category") or {})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.3f}" if _is_number(value) else "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
