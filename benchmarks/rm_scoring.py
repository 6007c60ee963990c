"""The scorer against plain transformers on the same conversations, with SmolLM2-135M and a random head.

The peers load the same folder with its own code (`trust_remote_code`). The tuned one runs in bf16 (in fp32 on a CPU
that does not compute in bf16), sorted by length, in batches of 16; the default one in fp32, in the order given, padded
to the longest of each batch of 16. Real tokens per second, and per CPU second: padding does not count, and what we
compute once, a prompt for its replies, the template's words for a batch, counts for each text. The floor: the layers'
products over the tokens that we compute, at the machine's full speed.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.machine import computes_in_bf16, flops
from benchmarks.result import Result, versions
from ups_rm.types import Conversation

BATCH = 16
UNITS = {"tokens/s": perf_counter, "tokens/CPU s": process_time}
TEXT = "the a one of in to bread water garden piano because never always please explain slowly safe lock"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Peer:
    """How plain transformers is run."""

    name: str
    dtype: str
    sort: bool
    required: float


def peers() -> tuple[Peer, Peer]:
    """The tuned one and the default one."""
    short, dtype = ("bf16", "bfloat16") if computes_in_bf16() else ("fp32", "float32")
    tuned = Peer(f"transformers, {short}, sorted by length", dtype, True, 1.1)
    return tuned, Peer("transformers, fp32, padded", "float32", False, 3.0)


def conversations(prompts: int, n: int, seed: int = 0) -> list[Conversation]:
    """n replies of 5 to 80 words to each of some prompts of 5 to 60 words."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    questions = [words(5, 60) for _ in range(prompts)]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": words(5, 80)}]
        for question in questions
        for _ in range(n)
    ]


def plain_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, loaded as transformers alone does."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", trust_remote_code=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    return model.eval(), tokenizer


def plain_scorer(folder: Path, peer: Peer) -> Callable[[Sequence[Conversation]], list[float]]:
    """Logits by transformers alone."""
    import torch

    model, tokenizer = plain_model(folder, peer.dtype)

    @torch.inference_mode()
    def score(talks: Sequence[Conversation]) -> list[float]:
        texts = tokenizer.apply_chat_template(list(talks), tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if peer.sort else list(range(len(ids)))
        logits = [0.0] * len(ids)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt")
            for i, logit in zip(some, model(**batch).logits[:, 0].tolist(), strict=True):
                logits[i] = logit
        return logits

    return score


def measure(name: str, folder: Path, talks: list[Conversation], pairs: int) -> list[Result]:
    """All three in turn, after one warm-up each."""
    from ups_rm.reward.scorer import RewardScorer

    scorer = RewardScorer.load(folder)
    with _counted(scorer.model.model.embed_tokens) as computed:
        scores = scorer.score(talks)
    tokens = sum(score.tokens for score in scores)
    plain = {peer: plain_scorer(folder, peer) for peer in peers()}
    worst = {
        peer: max(abs(a - b.logit) for a, b in zip(score(talks), scores, strict=True)) for peer, score in plain.items()
    }
    sides: list[tuple[Peer | None, Callable[..., Any]]] = [(None, scorer.score), *plain.items()]
    speeds: dict[tuple[Peer | None, str], list[float]] = {(who, unit): [] for who, _ in sides for unit in UNITS}
    for _ in range(pairs):
        for who, score in sides:
            begun = {unit: clock() for unit, clock in UNITS.items()}
            score(talks)
            for unit, clock in UNITS.items():
                speeds[who, unit].append(tokens / (clock() - begun[unit]))
    used, dtype = versions("torch", "transformers"), str(scorer.dtype).removeprefix("torch.")
    body = sum(parameter.numel() for parameter in scorer.model.model.layers.parameters())
    floor = tokens * flops(dtype) / (2 * body * sum(computed))
    middle = {key: statistics.median(found) for key, found in speeds.items()}
    what = f"RM scoring, {name}, {tokens} tokens"
    return [
        Result(f"{what}, ours in {dtype}", middle[None, unit], middle[peer, unit], unit, peer.name,
               floor if unit == "tokens/s" else None, used, peer.required)
        for peer in plain for unit in UNITS
    ] + [
        Result(f"{what}, largest difference of a logit from {peer.name}", worst[peer], None, "logit", versions=used)
        for peer in plain
    ]  # fmt: skip


@contextmanager
def _counted(embedding: Any) -> Iterator[list[int]]:
    """Within: how many tokens go through, call by call."""
    counts: list[int] = []
    hook = embedding.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def run(pairs: int = 5, prompts: int = 16) -> list[Result]:
    """Groups of four replies to a prompt, as in training, and conversations that share the template's words alone."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import tiny_head
    from ups_rm.models import fetch
    from ups_rm.reward.merge import merge

    with tempfile.TemporaryDirectory() as folder:
        rm = Path(folder) / "rm"
        merge(fetch(), tiny_head(Path(folder) / "head", hidden_size=576, hidden_dims=(64, 16)), rm)
        return [
            *measure("4 replies to a prompt", rm, conversations(prompts, 4), pairs),
            *measure("1 reply to a prompt", rm, conversations(prompts * 4, 1), pairs),
        ]
