"""Products by oneDNN are torch's own, LoRA's are peft's, forward and backward, and taken only where they are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ups_rm.layers import linear as linear_module
from ups_rm.layers.elementwise import silu_mul_linear
from ups_rm.layers.linear import by_onednn, is_simple_lora, laid_out, linear, of_layout, product
from ups_rm.layers.native import multiplier
from ups_rm.layers.projection import can_pack


def layer_of(inner: int, outer: int, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inner + outer)
    return nn.Linear(inner, outer, bias=bias).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 8, 3), (37, 16, 48), (300, 64, 24)])
def test_values_and_all_gradients_are_torchs(rows: int, inner: int, outer: int, bias: bool) -> None:
    layer = layer_of(inner, outer, bias)
    x, slope = torch.randn(rows, inner, requires_grad=True), torch.randn(rows, outer)
    assert by_onednn(x, layer.weight)
    out = linear(x, layer)
    assert out.grad_fn is not None
    assert "Linear" in type(out.grad_fn).__name__  # ours: torch's own node is AddmmBackward or MmBackward
    wanted = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    leaves = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y, leaves, slope) for y in (out, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_what_is_trained_gets_a_gradient() -> None:
    layer = layer_of(8, 4, True).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    linear(x, layer).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, layer)
    assert [tensor.shape for tensor in kept] == [layer.weight.shape]  # a frozen weight needs no input
    layer.requires_grad_(True)
    linear(x.detach(), layer).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(4, 8), rtol=1e-5, atol=1e-5)


def test_rows_that_are_slices_and_heads_that_are_tied_are_taken_as_they_lie() -> None:
    whole, table = torch.randn(20, 32), torch.randn(11, 16)
    for x in (whole[3:9, :16], whole.t()[:16, :7].t()):
        torch.testing.assert_close(product(x, table), x @ table.t(), rtol=1e-5, atol=1e-5)


class Doubled(nn.Linear):
    """A layer of another class, as adapters are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("inner", [48, 96], ids=["by oneDNN", "by our product, on CPUs that have it"])
def test_laid_out_weights_give_the_same_and_are_gone_after(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("this CPU does not compute in bf16")
    monkeypatch.setattr(linear_module, "COPY", 10**6)
    layers = nn.ModuleList([layer_of(64, inner, True, torch.bfloat16), layer_of(inner, 32, False, torch.bfloat16)])
    hooked, doubled = layer_of(32, 16, True, torch.bfloat16), Doubled(8, 4).bfloat16()
    hooked.register_forward_hook(lambda *_: None)
    layers += [hooked, doubled, layer_of(8, 8, True)]
    x = torch.randn(33, 64, dtype=torch.bfloat16, requires_grad=True)

    def run() -> torch.Tensor:
        y = linear(x, layers[0])
        return silu_mul_linear(y, y, layers[1])

    with torch.no_grad():
        plain = run()
        with laid_out(layers):
            assert [of_layout(layer, x) is not None for layer in layers] == [True, True, False, False, False]
            assert (of_layout(layers[0], x).kernels is not None) == (multiplier(layers[0].weight) is not None)
            assert of_layout(layers[0], x.float()) is None
            assert of_layout(layers[0], x[:0]) is None
            with laid_out(layers):  # another thread's
                pass
            assert of_layout(layers[0], x) is not None
            torch.testing.assert_close(run(), plain, rtol=1e-2, atol=1e-2)
            handle = layers[0].register_forward_hook(lambda *_: None)
            assert of_layout(layers[0], x) is None
            handle.remove()
            with torch.enable_grad():  # it has none
                assert of_layout(layers[0], x) is None
                assert run().requires_grad
    assert [of_layout(layer, x) for layer in layers] == [None] * 5
    monkeypatch.setattr(linear_module, "COPY", 10)
    with laid_out(layers):
        assert of_layout(layers[0], x) is None  # too large


@pytest.mark.parametrize("outer", [48, 96], ids=["by oneDNN", "by our product, on CPUs that have it"])
def test_laid_out_weights_round_an_fp32_bias_as_autocast_does(outer: int) -> None:
    """Backbones that are lowered to bf16 keep biases in fp32, and a service holds its weights laid out for good."""
    if not can_pack(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("this CPU does not compute in bf16")
    layer = layer_of(64, outer, True, torch.bfloat16)
    layer.weight.data = torch.randint(-3, 4, layer.weight.shape).bfloat16()  # sums are exact, in any order
    layer.bias.data = 3 * torch.randn(outer)
    x = torch.randint(-3, 4, (33, 64)).bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = linear(x, layer)
        with laid_out(nn.ModuleList([layer])):
            assert of_layout(layer, x) is not None
            assert torch.equal(linear(x, layer), plain)


def test_a_layer_with_a_hook_is_called() -> None:
    layer, seen = layer_of(8, 4, True), []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x, layer), F.linear(x, layer.weight, layer.bias))
    assert seen == [1]
    handle.remove()
    linear(x, layer)
    assert seen == [1]
    layer = layer_of(8, 4, False)
    layer.register_forward_pre_hook(lambda *_: seen.append(2))
    silu_mul_linear(x, x, layer)
    assert seen == [1, 2]


def test_other_formats_other_classes_and_no_rows_go_to_torch() -> None:
    doubled = Doubled(8, 4)
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x, doubled), 2 * F.linear(x, doubled.weight, doubled.bias))
    half = layer_of(8, 4, False, torch.bfloat16)
    assert not by_onednn(x.bfloat16(), half.weight)
    assert linear(x.bfloat16(), half).dtype == torch.bfloat16
    wide = layer_of(8, 4, True, torch.float64)
    assert linear(x.double(), wide).dtype == torch.float64
    assert linear(x[:0], layer_of(8, 4, True)).shape == (0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, layer_of(8, 4, True)).dtype == torch.bfloat16
    assert linear(torch.empty(3, 8, device="meta"), layer_of(8, 4, False).to("meta")).shape == (3, 4)


def adapted(bias: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A frozen layer of 24 -> 40 with LoRA whose B is not nothing, as after some updates."""
    settings = {"r": 4, "lora_alpha": 10, "bias": "none", "target_modules": ["0"]} | settings
    model = nn.Sequential(layer_of(24, 40, bias, dtype).requires_grad_(False))
    layer = inject_adapter_in_model(LoraConfig(**settings), model)[0]
    layer.lora_A.float()
    layer.lora_B.float()
    for part in layer.lora_B.values():
        nn.init.normal_(part.weight)
    return layer


def is_ours(out: torch.Tensor) -> bool:
    return "LoraBackward" in type(out.grad_fn).__name__


@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_pefts_value_and_every_gradient(bias: bool) -> None:
    layer = adapted(bias)
    x, slope = torch.randn(37, 24, requires_grad=True), torch.randn(37, 40)
    out, wanted = linear(x, layer), layer(x)
    assert is_ours(out)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours, theirs = (torch.autograd.grad(y, leaves, slope) for y in (out, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    first = linear(x.detach(), layer)  # of a model whose embedding is frozen: no gradient of x
    torch.testing.assert_close(torch.autograd.grad(first, leaves[1:], slope), ours[1:])


def test_lora_in_bf16_is_as_near_to_fp32_as_peft_and_its_gradients_are_fp32() -> None:
    layer, wide = adapted(True, torch.bfloat16), adapted(True)
    wide.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    x, slope = torch.randn(300, 24).bfloat16(), torch.randn(300, 40).bfloat16()

    def run(how: Callable[[torch.Tensor, Any], torch.Tensor], of: Any, x: torch.Tensor) -> list[torch.Tensor]:
        out, leaves = how(x, of), [of.lora_A["default"].weight, of.lora_B["default"].weight]
        return [out, *torch.autograd.grad(out, leaves, slope.to(out.dtype))]

    def called(x: torch.Tensor, layer: Any) -> torch.Tensor:
        return layer(x)

    ours, pefts, exact = run(linear, layer, x), run(called, layer, x), run(called, wide, x.float())
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other, true in zip(ours, pefts, exact, strict=True):
        size = true.norm()
        assert (one.float() - true).norm() / size < max(1.5 * (other.float() - true).norm() / size, 6e-3)


def test_lora_keeps_its_input_once_and_nothing_wider() -> None:
    layer, x = adapted(False, torch.bfloat16), torch.randn(50, 24).bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, layer)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(4, 24), (40, 4), (40, 24), (50, 4), (50, 24)]
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept if len(tensor) == 50)


def test_the_base_alone_is_computed_where_adapters_are_off() -> None:
    layer, x = adapted(True), torch.randn(5, 24)
    layer.enable_adapters(False)
    assert torch.equal(linear(x, layer), linear(x, layer.base_layer))
    layer.enable_adapters(True)
    assert not torch.allclose(linear(x, layer), linear(x, layer.base_layer))


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "DoRA", "bias"]
)
def test_other_adapters_are_computed_by_peft(settings: dict[str, Any]) -> None:
    layer = adapted(True, **settings)
    x = torch.randn(5, 24)
    assert not is_simple_lora(layer)
    torch.manual_seed(1)
    out = linear(x, layer)
    torch.manual_seed(1)
    assert torch.equal(out, layer(x))


def test_what_else_peft_can_do_to_a_layer_is_left_to_it() -> None:
    x = torch.randn(5, 24)
    hooked, seen = adapted(False), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    within = adapted(False)
    within.lora_A["default"].register_forward_hook(lambda *_: seen.append(2))
    trained = adapted(False)
    trained.base_layer.weight.requires_grad_(True)
    merged = adapted(False)
    merged.merge()
    for layer in (hooked, within, trained, merged):
        assert torch.equal(linear(x, layer), layer(x))
        assert not is_simple_lora(layer)
    assert seen == [1, 1, 2, 2]
    two = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0"]), nn.Sequential(adapted(False).base_layer), adapter_name="first"
    )
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"]), two, adapter_name="second")
    for part in two[0].lora_B.values():
        nn.init.normal_(part.weight)
    two[0].set_adapter(["first", "second"])
    assert torch.equal(linear(x, two[0]), two[0](x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = adapted(False)
        assert torch.equal(linear(x, one), one(x))
        assert not is_ours(linear(x, one))
