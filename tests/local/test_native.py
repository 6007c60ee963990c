"""The C++ kernels against the torch forms beside them, and what happens where they can't be built."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ups_rm.layers import native
from ups_rm.layers.elementwise import masked_softmax, rms_norm, rotate, silu_mul, silu_mul_linear
from ups_rm.local.group_cache import GroupCache, NativeCache
from ups_rm.local.sampling import Sampling, draw
from ups_rm.local.selected_logprobs import SelectedLogprobs

TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.sampled_from([2, 16, 18, 62, 64, 128, 300])


@pytest.fixture(scope="module", autouse=True)
def built() -> Any:
    """Skipped only where there is no compiler: CI has one."""
    found = native.kernels()
    if found is None:
        pytest.skip("the kernels can't be built here")
    return found


def both(monkeypatch: pytest.MonkeyPatch, function: Any, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of `function`, by the kernels and by torch in the same dtype."""
    results = []
    for kernels in (native.kernels, lambda: None):
        with monkeypatch.context() as patch:
            patch.setattr(native, "kernels", kernels)
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
            results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return results[0], results[1]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **TOLERANCE[a.dtype])


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=40, deadline=None)
@given(dtype=DTYPES, rows=st.integers(1, 70), size=SIZES, seed=st.integers(0, 99))
def test_elementwise_functions_and_their_gradients(
    module_patch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y = (3 * torch.randn(rows, size)).to(dtype), torch.randn(rows, size).to(dtype)
    close(*both(module_patch, silu_mul, x, y))
    weight = torch.rand(size).to(dtype)
    ours, theirs = both(module_patch, lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    # the weight's gradient is a sum over rows, bf16 only at its end
    rtol, atol = (2e-2, 1e-1) if dtype == torch.bfloat16 else (1e-4, 1e-4)
    torch.testing.assert_close(ours[2], theirs[2], rtol=rtol, atol=atol)
    close(ours[:2], theirs[:2])
    angle = torch.randn(rows, size // 2).repeat(1, 2)[:, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    heads = torch.randn(rows, 3, size).to(dtype)
    close(*both(module_patch, lambda x: rotate(x, cos, sin), heads))
    close(*both(module_patch, lambda x: rotate(x, angle.cos(), angle.sin()), heads))  # angles wider than states
    torch.testing.assert_close(  # a rotation keeps lengths
        rotate(heads, cos, sin).float().norm(dim=-1), heads.float().norm(dim=-1), rtol=3e-2, atol=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(
    dtype=DTYPES, batch=st.integers(1, 3), kv_heads=st.integers(1, 2), shared=st.integers(1, 3),
    queries=st.integers(1, 9), keys=st.sampled_from([1, 2, 15, 16, 17, 63, 116]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_masked_softmax_and_its_gradient(
    module_patch: pytest.MonkeyPatch, dtype: torch.dtype, batch: int, kv_heads: int, shared: int, queries: int,
    keys: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    scores = (5 * torch.randn(batch, kv_heads, shared * queries, keys)).to(dtype)
    seen = torch.rand(batch, 1, queries, keys) < 0.6
    seen[..., 0] = True  # no query sees nothing
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    ours, theirs = both(module_patch, lambda x: masked_softmax(x, mask, 0.3), scores)
    close(ours, theirs)
    exact = scores.double().requires_grad_()
    hidden = (~seen)[:, :, None].expand(-1, kv_heads, shared, -1, -1).flatten(2, 3)
    expected = (0.3 * exact).masked_fill(hidden, float("-inf")).softmax(-1)
    expected.backward(torch.linspace(-1, 1, expected.numel()).view(expected.shape).to(dtype).double())
    assert exact.grad is not None
    for found, wanted in zip(ours, (expected.detach(), exact.grad), strict=True):
        torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    assert (ours[0][hidden] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_product_made_again_gives_the_gradients_of_one_that_was_kept(bias: bool) -> None:
    torch.manual_seed(0)
    gate, up, linear = torch.randn(7, 32), torch.randn(7, 32), torch.nn.Linear(32, 5, bias=bias)
    found = []
    for compute in (silu_mul_linear, lambda gate, up, linear: linear(torch.nn.functional.silu(gate) * up)):
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        linear.zero_grad()
        out = compute(*leaves, linear)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach(), *(one.grad for one in (*leaves, *linear.parameters()))])
    close(found[0], found[1])


@settings(max_examples=30, deadline=None)
@given(
    dtype=DTYPES, rows=st.integers(1, 40), vocabulary=st.sampled_from([5, 16, 255, 256, 300, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]), seed=st.integers(0, 99),
)  # fmt: skip
def test_selected_logprobs_and_their_gradients(
    module_patch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, vocabulary: int, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, 8).to(dtype), torch.randn(vocabulary, 8).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    ours, theirs = both(
        module_patch, lambda h, w: SelectedLogprobs.apply(h, w, targets, temperature, 7), hidden, weight
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=2e-5)
    frozen = both(module_patch, lambda h: SelectedLogprobs.apply(h, weight, targets, temperature, 7), hidden)
    for found in frozen:  # another way to the same gradient
        torch.testing.assert_close(
            found[1], theirs[1], **(TOLERANCE[dtype] | {"atol": 3e-2 if dtype.itemsize == 2 else 1e-4})
        )
    scale = theirs[2].float().abs().max().clamp(min=1)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(
            a.float() / scale, b.float() / scale, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
        )


@settings(max_examples=60, deadline=None)
@given(
    dtype=DTYPES, vocabulary=st.sampled_from([1, 3, 256, 257, 511, 1024, 5000]),
    scale=st.sampled_from([0.1, 3.0, 40.0]), temperature=st.sampled_from([0.3, 1.0, 2.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_draws_are_the_torch_forms(
    module_patch: pytest.MonkeyPatch, dtype: torch.dtype, vocabulary: int, scale: float, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = (scale * torch.randn(20, vocabulary)).to(dtype)
    logits[:, torch.rand(vocabulary) < 0.3] = float("-inf")
    logits[:, -1] = 0
    uniform = torch.rand(20)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    sampling = Sampling(temperature=temperature)
    token, logprob, norm = draw(logits.clone(), sampling, uniform)
    module_patch.setattr(native, "kernels", lambda: None)
    try:
        other, other_logprob, _ = draw(logits.clone(), sampling, uniform)
    finally:
        module_patch.undo()
    torch.testing.assert_close(norm.double(), (logits.double() / temperature).logsumexp(-1), atol=1e-4, rtol=1e-5)
    probs = (logits.double() / temperature).softmax(-1)
    cdf = probs.cumsum(-1)
    for i in range(len(token)):
        assert probs[i, token[i]] > 0
        if token[i] != other[i]:  # a draw on the edge between two tokens, within fp32's rounding
            low, high = sorted((int(token[i]), int(other[i])))
            assert abs(float(cdf[i, low]) - float(uniform[i])) < 1e-5
            assert float(probs[i, low + 1 : high].sum()) < 1e-5
        else:
            assert float(logprob[i]) == pytest.approx(float(other_logprob[i]), abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    dtype=DTYPES, groups=st.integers(1, 4), columns=st.integers(1, 5), kv_heads=st.integers(1, 2),
    shared=st.integers(1, 7), size=st.sampled_from([4, 64, 128]), width=st.integers(1, 70), length=st.integers(1, 40),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_is_the_torch_forms_while_rows_leave(
    built: Any, dtype: torch.dtype, groups: int, columns: int, kv_heads: int, shared: int, size: int, width: int,
    length: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    keys, values = (torch.randn(2, groups, kv_heads, width, size).to(dtype) for _ in range(2))
    lengths = torch.randint(1, width + 1, (groups,))
    heads = kv_heads * shared
    sizes = {"columns": columns, "reply_length": length, "heads": heads}
    plain = GroupCache(keys, values, lengths, **sizes)
    fast = NativeCache(keys, values, lengths, kernels=built, **sizes)
    for position in range(length):
        angle = torch.randn(len(plain.cells), size // 2).repeat(1, 2)[:, None]
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for layer in range(2):
            qkv = torch.randn(len(plain.cells), heads + 2 * kv_heads, size).to(dtype)
            ours, theirs = (cache.attend(layer, qkv, cos, sin, position) for cache in (fast, plain))
            torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
        alive = torch.rand(len(plain.cells)) < 0.8
        if not alive.any():
            break
        plain.keep(alive)
        fast.keep(alive)
        assert torch.equal(plain.cells, fast.cells)


def test_attention_is_softmax_over_prompt_and_reply(built: Any) -> None:
    """Both caches against the definition, row by row."""
    torch.manual_seed(0)
    groups, columns, size, width, length = 3, 2, 8, 5, 4
    keys, values = torch.randn(1, groups, 1, width, size), torch.randn(1, groups, 1, width, size)
    lengths, sizes = torch.tensor([5, 1, 3]), {"columns": columns, "reply_length": length, "heads": 2}
    caches = [GroupCache(keys, values, lengths, **sizes), NativeCache(keys, values, lengths, kernels=built, **sizes)]
    one, zero = torch.ones(6, 1, size), torch.zeros(6, 1, size)  # no rotation
    seen = [torch.randn(6, 4, size) for _ in range(length)]  # 2 query heads, key, value
    for position, qkv in enumerate(seen):
        outs = [cache.attend(0, qkv, one, zero, position) for cache in caches]
        for row in range(6):
            group = row // columns
            k = torch.cat([keys[0, group, 0, : lengths[group]], *(past[row, 2:3] for past in seen[: position + 1])])
            v = torch.cat([values[0, group, 0, : lengths[group]], *(past[row, 3:4] for past in seen[: position + 1])])
            expected = ((qkv[row, :2] @ k.T) / size**0.5).softmax(-1) @ v
            for out in outs:
                torch.testing.assert_close(out[row].view(2, size), expected, rtol=1e-5, atol=1e-6)


def test_tensors_that_the_kernels_do_not_take_are_left_to_torch() -> None:
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert native.usable(single) is not None
    assert native.usable(double) is None
    assert native.usable(single, single.bfloat16()) is None
    assert native.usable(torch.ones(2, device="meta")) is None


def test_python_goes_on_while_a_kernel_computes(built: Any) -> None:
    """Checkpoints, trackers and requests have threads of their own, which must not wait for decoding."""
    logits, uniform = torch.randn(6000, 8192), torch.rand(6000)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.001):
            ticks.append(perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begun = perf_counter()
    built.draw(logits, uniform, 1.0)
    ended = perf_counter()
    over.set()
    thread.join()
    inside = [tick for tick in ticks if begun < tick < ended]
    assert len(inside) > 3, f"{len(inside)} turns in {ended - begun:.3f} s"  # one at either end does not count


def test_wrong_sizes_and_targets_are_refused(built: Any) -> None:
    with pytest.raises(RuntimeError, match="another size"):
        built.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5)
    with pytest.raises(RuntimeError, match="not in the vocabulary"):
        built.selected_logprobs(torch.ones(2, 4), torch.tensor([0, 4]), 1.0)
    with pytest.raises(RuntimeError, match="do not fit"):
        built.masked_softmax(torch.ones(2, 2, 6, 5), torch.ones(2, 1, 4, 5), 1.0)
    with pytest.raises(RuntimeError, match="contiguous"):
        built.silu_mul(torch.ones(4, 2).t(), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="fp32 or bf16"):
        built.silu_mul(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))


# ---- building


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that has not asked for the kernels yet, with an empty cache."""
    monkeypatch.setenv("UPS_RM_CACHE", str(tmp_path))
    monkeypatch.delenv("UPS_RM_NATIVE", raising=False)
    cached = native.kernels
    monkeypatch.setattr(native, "kernels", native.functools.cache(cached.__wrapped__))
    return tmp_path


def test_a_failed_build_is_told_and_decoding_goes_on_in_torch(
    anew: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Path) -> None:
        raise RuntimeError("Error building extension 'ups_rm_kernels': c++ not found\nand much more")

    monkeypatch.setattr(native, "_build", fails)
    assert native.kernels() is None
    out = " ".join(capsys.readouterr().out.split())
    assert "building kernels for this CPU" in out
    assert "c++ not found" in out
    assert "and much more" not in out
    x = torch.randn(3, 16)
    torch.testing.assert_close(rms_norm(x, torch.ones(16), 1e-5), torch.nn.functional.rms_norm(x, (16,), eps=1e-5))


def test_what_a_killed_build_left_is_removed_and_a_built_one_is_not_touched_again(
    anew: Path, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = anew / "native" / native._key()
    (folder / "build").mkdir(parents=True)
    (folder / "build" / "lock").touch()
    seen: list[list[str]] = []

    def load(name: str, sources: list[str], build_directory: str, **_: Any) -> Any:
        seen.append(sorted(entry.name for entry in Path(build_directory).iterdir()))
        assert Path(sources[0]).parent == Path(build_directory), "another checkout's path would be another build"
        return built

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    assert native.kernels() is built
    assert seen == [[source.name for source in native.SOURCES]]
    assert "products.cpp" in seen[0]
    library = folder / "ups_rm_kernels.so"
    before = library.stat().st_mtime_ns
    assert native.kernels.__wrapped__().rms_norm(torch.ones(1, 2), torch.ones(2), 0.0).tolist() == [[1.0, 1.0]]
    assert len(seen) == 1
    assert library.stat().st_mtime_ns == before


def test_the_environment_can_leave_them_out(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPS_RM_NATIVE", "0")
    assert native.kernels() is None
    assert not (anew / "native").exists()


@pytest.mark.parametrize("which", [source.name for source in native.SOURCES])
def test_another_source_or_cpu_is_another_folder(which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = native._key()
    for source in native.SOURCES:
        more = "\n" if source.name == which else ""
        (tmp_path / source.name).write_text(source.read_text() + more)
    monkeypatch.setattr(native, "SOURCES", [tmp_path / source.name for source in native.SOURCES])
    assert native._key() != key
