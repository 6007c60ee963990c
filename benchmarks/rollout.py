"""Our decode loop against transformers' `generate`: 8 prompts x 4 replies of at most 64 tokens, SmolLM2-135M.

In bf16, on a CPU that computes in it, and in fp32; once with every reply 64 tokens long, once with early ends: full
stop and comma count as end tokens, so that replies end at random and few are left at last. Both sides sample from the
whole distribution at temperature 1, hold the same weights in the same number format, and are counted by the reply
tokens they made, the end token included; prompts are read by both and counted for neither. Nothing is kept for a
training forward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

from benchmarks.grpo_step import BASE, chats
from benchmarks.machine import bandwidth, computes_in_bf16, flops
from benchmarks.result import Result, versions

DTYPES = ("bfloat16", "float32")
ENDS = (".", ",")
UNITS = {"tokens/s": perf_counter, "tokens/CPU s": process_time}


@dataclass(frozen=True)
class Case:
    """`early`: ENDS count as end tokens; otherwise none does."""

    dtype: str
    early: bool
    prompts: int = 8
    n: int = 4
    new_tokens: int = 64

    @property
    def name(self) -> str:
        ends = "early ends" if self.early else "no ends"
        return f"rollout, {self.prompts * self.n} rows x {self.new_tokens} tokens, {self.dtype}, {ends}"


CASES = tuple(Case(dtype, early) for dtype in DTYPES for early in (False, True))
Side = Callable[[int], int]  # from a seed to the reply tokens made


def sides(case: Case) -> tuple[Side, Side, float]:
    """Our side, transformers' side, and how many tokens a second the machine could make at best."""
    import torch
    from transformers import GenerationConfig

    from ups_rm.data.prompts import encode_prompts
    from ups_rm.layers.grid import Distinct
    from ups_rm.local.decode import FastDecoder
    from ups_rm.local.policy import load_model
    from ups_rm.local.sampling import Sampling
    from ups_rm.models import fetch

    model, tokenizer = load_model(str(fetch()), dtype=getattr(torch, case.dtype))
    model.eval().requires_grad_(False)
    prompts = encode_prompts(tokenizer, chats(BASE)[: case.prompts])
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ENDS] if case.early else []
    decoder = FastDecoder.of(model)
    assert decoder is not None

    def ours(seed: int) -> int:
        sampling = Sampling(seed=seed)
        uniforms = sampling.uniforms(case.prompts * case.n, case.new_tokens)
        rows = decoder.generate(prompts, case.n, case.new_tokens, ends, sampling, uniforms)
        return sum(len(tokens) for tokens, _ in rows)

    model.generation_config = GenerationConfig()  # the folder's own end token would fill in for none
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.new_tokens,
        num_return_sequences=case.n, eos_token_id=ends or None, pad_token_id=0,
    )  # fmt: skip
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])

    @torch.inference_mode()
    def plain(seed: int) -> int:
        torch.manual_seed(seed)
        replies = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)[:, width:]
        ended = torch.isin(replies, torch.tensor(ends, dtype=torch.long)).int().cumsum(1)
        return int((ended.cumsum(1) <= 1).sum())  # up to the first end token and with it

    made, read = case.prompts * case.n * case.new_tokens, len(Distinct.of(prompts).ids)
    parameters = sum(one.numel() for one in model.parameters())
    size = parameters * (2 if case.dtype == "bfloat16" else 4)
    rate = flops(case.dtype)
    decode = max(2 * parameters * made / rate, case.new_tokens * size / bandwidth())
    return ours, plain, made / (decode + 2 * parameters * read / rate)


def measure(case: Case, pairs: int) -> list[Result]:
    """Both sides in turn, after one warm-up each."""
    ours, plain, floor = sides(case)
    speeds: dict[tuple[str, str], list[float]] = {(side, unit): [] for side in ("ours", "plain") for unit in UNITS}
    for seed in range(pairs + 1):
        for side, make in (("ours", ours), ("plain", plain)):
            begun = {unit: clock() for unit, clock in UNITS.items()}
            tokens = make(seed)
            for unit, clock in UNITS.items():
                speeds[side, unit].append(tokens / (clock() - begun[unit]))
    middle = {key: statistics.median(found[1:]) for key, found in speeds.items()}
    used = versions("torch", "transformers")
    floors = {"tokens/s": None if case.early else floor}
    return [
        Result(case.name, middle["ours", unit], middle["plain", unit], unit, "transformers generate",
               floors.get(unit), used)
        for unit in UNITS
    ]  # fmt: skip


def run(pairs: int = 5) -> list[Result]:
    """Every case, those in bf16 only on a CPU that computes in it."""
    cases = [case for case in CASES if case.dtype == "float32" or computes_in_bf16()]
    return [one for case in cases for one in measure(case, pairs)]
