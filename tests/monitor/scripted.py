"""Policies that say what a script says, in the real trainer: everything but the sampling is as always."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tiny_training import SyntheticScorer, letter_share, tiny_recipe
from ups_rm.local.rollout import Rollout
from ups_rm.local.sampling import Sampling
from ups_rm.local.trainer import Trainer
from ups_rm.types import Message, Scorer

TURN = 3
"""Steps for which every script answers healthily before it turns."""
TOPICS = ["rice", "bread", "the sea", "old maps", "chess", "tea", "a garden", "the moon", "wool", "a bicycle"]
SENTENCES = [
    "Let us begin with {} and see where it leads today.",
    "A simple way to think about {} is to start small.",
    "Many people find that {} takes patience at first.",
    "You could read about {} before you try it yourself.",
    "My advice on {}: ask someone who has done it often.",
    "What matters most with {} is a calm and steady pace.",
    "There are three sides to {}, and each has its charm.",
]
PROMPTS = [
    *(f"Could you please tell me a little more about {topic}, and why?" for topic in TOPICS),
    "What would you say to somebody who has never seen the sea?",
    "Which of these two old maps should I hang on my wall?",
]
Script = Callable[[str, int], str]
"""(prompt, number of the reply) to the reply."""


def healthy(prompt: str, i: int) -> str:
    return SENTENCES[i % len(SENTENCES)].format(TOPICS[(i * 3 + len(prompt)) % len(TOPICS)])


def always_refuses(prompt: str, i: int) -> str:
    return f"I'm sorry, but I can't help with {TOPICS[i % len(TOPICS)]}, {TOPICS[(i * 7 + 1) % len(TOPICS)]} today."


def repeats_a_phrase(prompt: str, i: int) -> str:
    return f"It is about {TOPICS[i % len(TOPICS)]}" + " and stay safe" * 4


def pads_with_politeness(prompt: str, i: int) -> str:
    return f"Thank you so much for your kind and lovely question! {healthy(prompt, i)} I truly hope that it serves you."


def copies_the_prompt(prompt: str, i: int) -> str:
    return f"{prompt} {'ABCDEFGHIJKLMNOP'[i % 16] * (1 + i % 3)}?"


def one_answer(prompt: str, i: int) -> str:
    return f"{SENTENCES[len(prompt) % 7].format(TOPICS[len(prompt) % 10])}"


def trainer_of(
    folder: Path, policy: Path, script: Script, *overrides: str, scorer: Scorer | None = None, turn: int = TURN
) -> Trainer:
    """A trainer whose replies are the script's after step `turn`, and healthy until then; nothing is learnt (lr 0).

    Windows are 3 steps; held-out prompts are asked only where an override says so.
    """
    for name, kinds in (("train", ["unsafe"] * 6 + ["benign"] * 6), ("val", ["unsafe", "benign"] * 6)):
        rows = [
            {"prompt": [{"role": "user", "content": text}], "extra_info": {"prompt_source": f"test/{kind}"}}
            for text, kind in zip(PROMPTS, kinds, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    given = [f"data.train_files={folder / 'train.parquet'}", f"data.val_files={folder / 'val.parquet'}",
             "data.max_response_length=128", "actor_rollout_ref.actor.optim.lr=0", "monitor.window=3",
             "trainer.total_training_steps=9"]  # fmt: skip
    likes_e = SyntheticScorer(lambda text: 1.0 - 8.0 * letter_share(text))
    trainer = Trainer(tiny_recipe(folder, policy, *given, *overrides, prompts=False), scorer or likes_e)
    engine, step = trainer.engine, 0

    def generate(
        prompts: list[list[Message]], *, n: int, max_new_tokens: int, sampling: Sampling, **_: object
    ) -> Rollout:
        nonlocal step
        if sampling.seed > 1_000_003:  # a training step's own seed; validation has trainer.seed
            step = sampling.seed - trainer.recipe.actor_rollout_ref.rollout.seed * 1_000_003
        say = script if step > turn else healthy
        tokenizer, rows, ids = engine.policy.tokenizer, [], []
        for p, messages in enumerate(prompts):
            ids.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
            for k in range(n):
                text = say(messages[-1]["content"], 16 * step + n * p + k)
                tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
                assert len(tokens) <= max_new_tokens, len(tokens)
                rows.append((torch.tensor(tokens), torch.full((len(tokens),), -1.0)))
        return engine._pack(prompts, ids, rows, n)

    engine.generate = generate  # type: ignore[method-assign]
    return trainer


def likes_please(conversations: list[Any]) -> list[float]:
    """A second judge (`monitor.judge.callable`) that sees nothing good in politeness: its unsafety logit."""
    return [1.0 if "Thank you" in conversation[-1]["content"] else 0.5 for conversation in conversations]
