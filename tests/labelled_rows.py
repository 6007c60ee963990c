"""Labelled rows and features made on the spot, for tests of the reward model's training."""

from __future__ import annotations

import torch

from ups_rm.data.rows import Row, text_hash
from ups_rm.data.schema import HARM_CATEGORIES
from ups_rm.reward.feature_set import FeatureInfo, FeatureSet
from ups_rm.reward.render import RenderPolicy

SAFE = [
    "I can't help with that.",
    "No, that could hurt someone.",
    "Please talk to a friend about it.",
    "That is wrong.",
]
UNSAFE = ["Sure, go ahead!", "Nobody will know, do it.", "Yes, you deserve it.", "Just wait until night and take it."]


def make_rows(prompts: int = 12, rows_per_prompt: int = 2) -> list[Row]:
    """Rows of one safe and one unsafe reply to each of several prompts, on alternating sides, with severity 0 and 2."""
    rows = []
    for p in range(prompts):
        for r in range(rows_per_prompt):
            safe = f"{SAFE[(p + r) % len(SAFE)]} Number {p}."
            unsafe = f"{UNSAFE[(p + 2 * r) % len(UNSAFE)]} Number {p}."
            side = (p + r) % 2  # where the unsafe one stands
            harm = (HARM_CATEGORIES[p % 2],)
            rows.append(
                Row(
                    prompt=f"Question {p}: may I take the bread?",
                    response_0=(unsafe, safe)[side],
                    response_1=(safe, unsafe)[side],
                    is_response_0_safe=side == 1,
                    is_response_1_safe=side == 0,
                    safer_response_id=1 - side,
                    better_response_id=None,
                    severity=((2, 0), (0, 2))[side],
                    categories=((harm, ()), ((), harm))[side],
                    prompt_source="test/benign" if p % 3 == 0 else "test/unsafe",
                    file="rows.jsonl",
                    line=len(rows) + 1,
                )
            )
    return rows


def make_features(
    prompts: int = 60, *, width: int = 12, signal: float = 2.0, seed: int = 0, unsafe_share: float = 0.5
) -> FeatureSet:
    """Two replies to each prompt; unsafe ones lie `signal` further along the first axis, each prompt along the second.

    Inputs are far from standardised (scale 30, shift 100 on half of the axes). One reply of each prompt is unsafe, or
    both are safe for a share of prompts when unsafe_share < 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.rand(prompts, generator=generator) < 2 * unsafe_share
    unsafe = torch.zeros(prompts, 2)
    side = torch.randint(2, (prompts,), generator=generator)
    unsafe[torch.arange(prompts), side] = mixed.float()
    hidden = torch.randn(prompts, 2, width, generator=generator)
    hidden[..., 0] += signal * unsafe
    hidden[..., 1] += 3 * torch.randn(prompts, 1, generator=generator)
    hidden[..., : width // 2] = hidden[..., : width // 2] * 30 + 100
    index = torch.arange(2 * prompts).view(prompts, 2)
    prompt_id = torch.tensor([text_hash(f"{seed}-{p}") >> 1 for p in range(prompts)])
    flat = unsafe.flatten()
    return FeatureSet(
        hidden=hidden.view(2 * prompts, width),
        unsafe=flat,
        severity=2 * flat,
        category_bits=(flat.long() << (prompt_id % 2).repeat_interleave(2)),
        prompt_id=prompt_id.repeat_interleave(2),
        benign=torch.zeros(2 * prompts, dtype=torch.uint8),
        tokens=torch.full((2 * prompts,), 9, dtype=torch.int32),
        truncated=torch.zeros(2 * prompts, dtype=torch.uint8),
        row_texts=index,
        row_unsafe=unsafe.to(torch.int8),
        row_severity=(2 * unsafe).to(torch.int8),
        row_safer=torch.where(mixed, 1 - side, 0).to(torch.int8),
        row_better=torch.full((prompts,), -1, dtype=torch.int8),
        row_id=torch.arange(prompts),
        row_file=torch.zeros(prompts, dtype=torch.long),
        row_line=torch.arange(prompts) + 1,
        info=FeatureInfo(
            backbone="tiny@0",
            fingerprint=f"{seed}",
            hidden_size=width,
            dtype="float32",
            render=RenderPolicy(),
            chat_template_sha256="0" * 64,
            categories=HARM_CATEGORIES,
        ),
    )
