"""A tiny RM that judges: trained in seconds on a made-up language in which safe and unsafe replies use other words.

It is right about its own pairs and about cheap tricks, its logits are moderate, so the doctor has nothing to say of it.
Faults are planted into copies of it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_rm
from ups_rm.reward.card import write_card
from ups_rm.reward.doctor.tricks import TRICKS, Talk
from ups_rm.reward.native import load_model, load_tokenizer
from ups_rm.reward.render import RenderPolicy, render
from ups_rm.reward.scorer import pad_batch
from ups_rm.types import Conversation

SAFE = ["bread", "flour", "water", "salt", "garden", "piano", "planets", "moon", "wait", "bake", "kind", "gently"]
UNSAFE = ["zap", "krull", "vex", "grox", "wrix", "jolt", "hex", "quaz", "skorn", "drax", "zorg", "vrak", "jinx", "blix"]
ASKED = "What is a good way to {} the {} at home?"
# These tricked replies answer nothing, so they are taught as not safe; the others are what their words are.
EMPTY_HANDED = ("emptied", "prompt copied", "Chinese")


def pair(draw: random.Random) -> tuple[str, str, str]:
    """A prompt, a safe and an unsafe reply to it."""
    words = [" ".join(draw.choices(of, k=draw.randint(4, 9))) + "." for of in (SAFE, UNSAFE)]
    return ASKED.format(draw.choice(["learn", "mix", "tell", "help"]), draw.choice(SAFE)), *words


def pairs_file(file: Path, *, count: int = 60, seed: int = 7) -> Path:
    """Pairs that it was not trained on, in the plain form."""
    draw = random.Random(seed)
    rows = [dict(zip(("prompt", "safe_response", "unsafe_response"), pair(draw), strict=True)) for _ in range(count)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


def talk(prompt: str, reply: str) -> Conversation:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def lessons(draw: random.Random) -> list[tuple[Conversation, float]]:
    """A pair, plain and under each trick, with labels (1 = unsafe)."""
    prompt, safe, unsafe = pair(draw)
    _, safe_too, unsafe_too = pair(draw)
    found = []
    for reply, other, label in ((safe, safe_too, 0.0), (unsafe, unsafe_too, 1.0)):
        found.append((talk(prompt, reply), label))
        for name, trick in TRICKS.items():
            tricked = trick(Talk(prompt, reply, other))
            found.append((talk(prompt, tricked), 1.0 if name in EMPTY_HANDED else label))
    return found


def tiny_judge(folder: Path, *, steps: int = 100, seed: int = 3) -> Path:
    """An RM folder as `tiny_rm` makes it, trained whole, with a card of what it became."""
    tiny_rm(folder)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    policy = RenderPolicy.infer(tokenizer, max_length=1024)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    draw = random.Random(seed)
    for step in range(steps):
        batch = lessons(draw)
        rows = [row.input_ids for row in render(tokenizer, [conversation for conversation, _ in batch], policy)]
        input_ids, attention_mask = pad_batch(rows)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        # smoothed labels keep logits where the sigmoid bends
        target = torch.tensor([label for _, label in batch]) * 0.9 + 0.05
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    rewrite(folder, model.state_dict())
    write_card(folder)
    return folder


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put these tensors in the place of those of the same name in the folder's shards."""
    for file in folder.glob("*.safetensors"):
        stored = load_file(file)
        save_file(
            {k: tensors.get(k, v).detach().to(v.dtype).contiguous() for k, v in stored.items()}, file, {"format": "pt"}
        )


def tiny_classifier(judge: Path, folder: Path, *, kind: str = "sequence", reads: int = -1) -> Path:
    """A classifier of plain transformers on the judge's backbone, with a linear head fitted by least squares.

    reads: the place of the token that its head was fitted for; elsewhere it was fitted to chance.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

    tokenizer, model = load_tokenizer(judge), load_model(judge, dtype=torch.float32)
    policy = RenderPolicy.infer(tokenizer, max_length=1024)
    draw = random.Random(5)
    batch = [lesson for _ in range(40) for lesson in lessons(draw)]
    rows = [row.input_ids for row in render(tokenizer, [conversation for conversation, _ in batch], policy)]
    input_ids, attention_mask = pad_batch(rows)
    with torch.inference_mode():
        states = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, H)
    lengths = attention_mask.sum(1)
    every = torch.arange(len(rows))
    features = states[every, lengths + reads].double()
    targets = torch.tensor([5.0 * label - 2.5 for _, label in batch], dtype=torch.float64)
    if reads != -1:
        features = torch.cat([features, states[every, lengths - 1].double()])
        chance = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
        targets = torch.cat([targets, chance])
    ridge = 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(features.T @ features / len(features) + ridge, features.T @ targets / len(features))
    tokenizer.pad_token = "<|end_of_text|>"  # no rendering has it
    fields = json.loads((judge / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings", "initializer_range", "vocab_size", "bos_token_id", "rms_norm_eps")  # fmt: skip
    config = LlamaConfig(**{n: fields[n] for n in names}, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    made = {"sequence": LlamaForSequenceClassification, "token": LlamaForTokenClassification}[kind](config)
    made.model.load_state_dict(model.model.state_dict())
    made.score.weight.data = weight.float()[None]
    if kind == "token":
        made.score.bias.data.fill_(0.01)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
