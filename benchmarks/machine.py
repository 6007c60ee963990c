"""What this machine does at best, measured in the same run: matrix products and memory."""

from __future__ import annotations

from time import perf_counter

from ups_rm.device import compute_dtype

ROWS, INNER, OUTER = 2048, 576, 1536
"""A product of SmolLM2-135M's forward."""


def computes_in_bf16() -> bool:
    """Whether this CPU does; if not, bf16 is some ten times slower here than fp32, and no side is asked for it."""
    import torch

    return compute_dtype("auto", "cpu") is torch.bfloat16


def flops(dtype: str = "bfloat16") -> float:
    """FLOP/s of the faster of torch's product and that of a `Projection`, best of ten rounds."""
    import torch

    from ups_rm.layers.projection import Projection

    x, weight = torch.randn(ROWS, INNER).to(getattr(torch, dtype)), torch.randn(OUTER, INNER).to(getattr(torch, dtype))
    packed = Projection(weight)
    times = []
    for _ in range(10):
        for product in (lambda: packed(x), lambda: torch.nn.functional.linear(x, weight)):
            begun = perf_counter()
            for _ in range(10):
                product()
            times.append((perf_counter() - begun) / 10)
    return 2.0 * ROWS * INNER * OUTER / min(times)


def bandwidth() -> float:
    """Bytes/s that are read and written while 1 GB is copied, best of five."""
    import torch

    source = torch.ones(2**27)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        begun = perf_counter()
        target.copy_(source)
        times.append(perf_counter() - begun)
    return 2.0 * source.numel() * source.element_size() / min(times)


def step_floor(
    prompt_tokens: float,
    reply_tokens: float,
    new_tokens: int,
    *,
    body: int,
    head: int,
    lora: bool = False,
    with_rm: bool = False,
) -> float:
    """Seconds that a GRPO step takes if all its products run at `flops` and weights are read at `bandwidth`.

    Each prompt is computed once: by the policy while it decodes, by the reference and backward (two products a layer).
    Decoding reads the weights once per token position.

    Args:
        body: parameters of the layers. head: of the output embedding.
        lora: backward has one product a layer, as no frozen weight wants a gradient. Adapters count as nothing.
        with_rm: a reward model with as many layers reads prompts and replies once.
    """
    dtype, size = ("bfloat16", 2) if computes_in_bf16() else ("float32", 4)
    rate, tokens = flops(dtype), prompt_tokens + reply_tokens
    compute = 2 * (2 if lora else 3) * (body * tokens + head * reply_tokens) + 2 * body * prompt_tokens
    compute += 2 * body * tokens if with_rm else 0
    decode = max(2 * (body + head) * reply_tokens / rate, new_tokens * size * (body + head) / bandwidth())
    return compute / rate + decode
