"""Products of our own in bf16 against fp32, and the kernel for a whole layer against the steps it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_training import causal_lm, random_prompts, with_adapters
from ups_rm.layers import native, projection
from ups_rm.layers.elementwise import silu_mul
from ups_rm.layers.native import multiplier
from ups_rm.layers.projection import Projection
from ups_rm.local.decode import FastDecoder
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.sampling import Sampling

BF16 = torch.bfloat16
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def products() -> Any:
    found = multiplier(torch.zeros(32, 32, dtype=BF16))
    if found is None:
        pytest.skip("needs a compiler and a CPU with AVX512_BF16 and without AMX")
    return found


def whole_numbers(*shape: int) -> Tensor:
    """Their sums of products are exact in fp32, in any order."""
    return torch.randint(-3, 4, shape).to(BF16)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 90), inner=st.sampled_from([2, 32, 66, 576, 2046, 2048, 2080, 6000]),
    columns=st.sampled_from([32, 64, 96, 320]), bias=st.booleans(), residual=st.booleans(), given_out=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_products_are_the_exact_ones_rounded_once(
    products: Any, rows: int, inner: int, columns: int, bias: bool, residual: bool, given_out: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = whole_numbers(rows, inner), whole_numbers(columns, inner)
    b = torch.randn(columns).to(BF16) if bias else None
    r = whole_numbers(rows, columns) if residual else None
    expected = x.float() @ weight.float().t()
    for more in (b, r):
        expected = expected if more is None else expected + more.float()
    around = torch.full((rows + 2, columns), 7.0, dtype=BF16)
    out = products.times_packed(x, products.pack(weight), b, r, around[1:-1] if given_out else None)
    assert torch.equal(out, expected.to(BF16))
    assert not given_out or torch.equal(around[1:-1], out)
    assert (around[[0, -1]] == 7).all(), "written beyond the rows that were given"


@pytest.mark.parametrize(("rows", "inner"), [(400, 6000), (1821, 576), (4000, 576)])
def test_rows_beyond_those_that_meet_the_panels_at_once(products: Any, rows: int, inner: int) -> None:
    x, weight, more = whole_numbers(rows, inner), whole_numbers(96, inner), whole_numbers(rows, 96)
    panels = products.pack(weight)
    exact = x.float() @ weight.float().t()
    assert torch.equal(products.times_packed(x, panels, None, more, None), (exact + more.float()).to(BF16))
    product, gates, ups = products.gated(x, panels, panels, None, None)
    assert torch.equal(gates, exact.to(BF16))
    assert torch.equal(ups, gates)
    assert torch.equal(product, silu_mul(gates, ups))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), inner=st.sampled_from([32, 576, 2080]), columns=st.sampled_from([32, 160]))
def test_the_gated_product_is_its_steps(products: Any, rows: int, inner: int, columns: int) -> None:
    x, up, gate = whole_numbers(rows, inner), *(torch.randn(columns, inner).to(BF16) / inner**0.5 for _ in range(2))
    gate_panels, up_panels = products.pack(gate), products.pack(up)
    product, gates, ups = products.gated(x, gate_panels, up_panels, None, None)
    assert torch.equal(gates, products.times_packed(x, gate_panels, None, None, None))
    assert torch.equal(ups, products.times_packed(x, up_panels, None, None, None))
    assert torch.equal(product, silu_mul(gates, ups))
    rooms = torch.empty(2, rows, columns, dtype=BF16)
    again = products.gated(x, gate_panels, up_panels, *rooms)
    assert torch.equal(again[0], product)
    assert torch.equal(rooms, torch.stack([gates, ups]))


def test_infinite_and_missing_numbers_stay_in_their_rows(products: Any) -> None:
    x, weight = whole_numbers(30, 64), whole_numbers(64, 64)
    plain = products.times_packed(x, products.pack(weight), None, None, None)
    x[3, 5], x[17, 0] = float("nan"), float("inf")
    out = products.times_packed(x, products.pack(weight), None, None, None)
    assert out[3].isnan().all()
    assert not out[17].isfinite().all()
    others = [row for row in range(30) if row not in (3, 17)]
    assert torch.equal(out[others], plain[others])


def test_sizes_that_do_not_fit_are_refused(products: Any) -> None:
    with pytest.raises(RuntimeError, match="no panels"):
        products.pack(whole_numbers(33, 32))
    with pytest.raises(RuntimeError, match="no panels"):
        products.pack(whole_numbers(32, 31))
    with pytest.raises(RuntimeError, match="has not laid out"):
        products.times_packed(whole_numbers(2, 64), whole_numbers(32, 32), None, None, None)
    panels = products.pack(whole_numbers(32, 64))
    with pytest.raises(RuntimeError, match="32 columns and the weight 64"):
        products.times_packed(whole_numbers(2, 32), panels, None, None, None)
    with pytest.raises(RuntimeError, match="contiguous"):
        products.times_packed(whole_numbers(64, 2).t(), panels, None, None, None)
    with pytest.raises(RuntimeError, match="other sizes"):
        products.times_packed(whole_numbers(2, 64), panels, whole_numbers(31), None, None)
    with pytest.raises(RuntimeError, match="another size"):
        products.times_packed(whole_numbers(2, 64), panels, None, None, whole_numbers(3, 32))
    with pytest.raises(RuntimeError, match="one size"):
        products.gated(whole_numbers(2, 64), panels, products.pack(whole_numbers(64, 64)), None, None)


def test_what_has_no_panels_goes_to_torch(products: Any) -> None:
    good = torch.zeros(32, 64, dtype=BF16)
    assert multiplier(good) is not None
    for bad in (good.float(), good[:31], good[:, :62]):
        assert multiplier(bad) is None
        x = torch.randn(3, bad.shape[1]).to(bad.dtype)
        torch.testing.assert_close(Projection(bad)(x), x @ bad.t())


def test_without_such_a_cpu_projections_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "multiplier", lambda *_: None)
    x, weight, residual = whole_numbers(5, 64), whole_numbers(32, 64), whole_numbers(5, 32)
    found = Projection(weight)
    assert found.kernels is None
    assert torch.equal(found(x), torch.nn.functional.linear(x, weight))
    assert torch.equal(found.onto(x, residual), (residual.float() + x.float() @ weight.float().t()).to(BF16))


def decoded(model: Any, keep: bool) -> tuple[list[tuple[Tensor, Tensor]], KeptForward | None]:
    decoder = FastDecoder.of(model)
    assert decoder is not None
    kept = decoder.kept_forward() if keep else None
    uniforms = torch.rand(12, 9, generator=torch.Generator().manual_seed(0))
    prompts = [[token % 64 for token in row] for row in random_prompts(4, seed=1)]
    return decoder.generate(prompts, 3, 9, [2, 9, 33], Sampling(), uniforms, kept=kept), kept


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize(
    ("architecture", "whole"),
    [("llama", True), ("llama without GQA, biases", True), ("llama 3 rope", True), ("qwen2 tied", True),
     ("qwen3 wide heads", False), ("llama without GQA, biases and LoRA", True)],
)  # fmt: skip
def test_a_whole_layer_is_its_steps_to_the_last_bit(
    products: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, whole: bool, keep: bool
) -> None:
    model = causal_lm(architecture.removesuffix(" and LoRA"), **SHAPE).to(BF16)
    if "LoRA" in architecture:
        model = with_adapters(model)
    calls: list[int] = []
    run = native.kernels().decode_layer

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return run(*given)

    monkeypatch.setattr(products, "decode_layer", counted)
    ours, kept = decoded(model, keep)
    assert bool(calls) == whole
    monkeypatch.setattr("ups_rm.local.decode._Layer.whole", lambda *_: None)
    calls.clear()
    theirs, by_steps = decoded(model, keep)
    assert not calls
    assert len({len(tokens) for tokens, _ in ours}) > 2, "replies should end at different lengths"
    for (tokens, logprobs), (other, other_logprobs) in zip(ours, theirs, strict=True):
        assert torch.equal(tokens, other)
        assert torch.equal(logprobs, other_logprobs)
    if kept is not None and by_steps is not None:
        count = kept.before + kept.now
        for layer, other_layer in zip(kept.layers, by_steps.layers, strict=True):
            for part, other_part in zip(layer, other_layer, strict=True):
                assert torch.equal(part[:count], other_part[:count])
