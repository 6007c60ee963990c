"""Reward models that misbehave for real, made from a sound folder; and conversations to score."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ups_rm.types import Conversation

WORDS = ["bread", "flour", "water", "moon", "sun", "piano", "sorry", "help", "wait", "practise", "planets"]


def some_conversations(count: int, seed: int = 0) -> list[Conversation]:
    draw = random.Random(seed)
    return [
        [
            {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))},
            {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(0, 40)))},
        ]
        for _ in range(count)
    ]


def slow_rm(folder: Path, source: Path, seconds: float) -> Path:
    """An RM whose own code sleeps for `seconds` in each forward, to be loaded with trust_remote_code; no card."""
    shutil.copytree(source, folder)
    code = folder / "modeling_myrm.py"
    before, after = code.read_text(encoding="utf-8").rsplit("    def forward(", 1)
    signature, body = after.split(":\n", 1)
    slow = f"{before}    def forward({signature}:\n        __import__('time').sleep({seconds})\n{body}"
    code.write_text(slow, encoding="utf-8")
    (folder / "rm_card.json").unlink()
    return folder


def nan_rm(folder: Path, source: Path) -> Path:
    """An RM whose head adds nan; without a card, which would notice it at load."""
    shutil.copytree(source, folder)
    (folder / "rm_card.json").unlink()
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "myscore.output_layer.bias" in tensors:
            tensors["myscore.output_layer.bias"] = torch.full_like(tensors["myscore.output_layer.bias"], torch.nan)
            save_file(tensors, shard, metadata={"format": "pt"})
            return folder
    raise AssertionError("no head in the folder")
