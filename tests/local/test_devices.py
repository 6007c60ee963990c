"""What can be seen of a GPU without one: every tensor is made on the model's device, and a step's shapes stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_training import FAST, VOCAB, causal_lm, policy_of, random_prompts, random_sequences, with_adapters
from ups_rm.errors import RunError
from ups_rm.layers.decoder import DecoderLayers
from ups_rm.layers.grid import Grid
from ups_rm.local import graphed
from ups_rm.local.decode import FastDecoder
from ups_rm.local.graphed import Replay, recorder
from ups_rm.local.group_cache import StaticCache
from ups_rm.local.sampling import Sampling

EOS = [*range(1, VOCAB // 8)]


def decoder_of(model: Any, record: Callable[[Replay], Replay] | None = None) -> FastDecoder:
    decoder = FastDecoder.of(model)
    assert decoder is not None
    decoder.record = record
    return decoder


def generate(decoder: FastDecoder, sampling: Sampling, n: int = 3, length: int = 20) -> list[tuple[Tensor, Tensor]]:
    prompts, uniforms = random_prompts(5), sampling.uniforms(5 * n, length)
    with torch.device("meta"):  # what is made without a device lands there, and fails beside the model's tensors
        return decoder.generate(prompts, n, length, EOS, sampling, uniforms)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", FAST)
def test_forward_and_backward_make_every_tensor_on_the_models_device(architecture: str, lora: bool) -> None:
    model = with_adapters(causal_lm(architecture)) if lora else causal_lm(architecture)
    policy, sequences = policy_of(model), random_sequences([5, 3, 0, 7], [0, 0, 1, 2])
    with torch.device("meta"):
        logprobs, _ = policy.response_logprobs(sequences, 0.8)
        logprobs.sum().backward()
    assert logprobs.device.type == "cpu"
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.device.type == "cpu" for parameter in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_the_layers_run_on_a_device_without_numbers(lora: bool) -> None:
    """On `meta` there are shapes and devices only: a tensor of another device would be an error."""
    model = causal_lm("qwen3 wide heads")
    model = (with_adapters(model).get_base_model() if lora else model).to("meta")
    layers = DecoderLayers(model.model)
    ids = torch.zeros(6, dtype=torch.long, device="meta")
    mask = layers.additive(torch.ones(2, 3, 3, dtype=torch.bool, device="meta"), torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layers.attention(*(y.view(2, 3, *y.shape[1:]) for y in (q, k, v)), mask).flatten(0, 1)

    hidden = layers.norm(layers(ids, ids, attend))
    assert (hidden.device.type, hidden.shape) == ("meta", (6, model.config.hidden_size))


@pytest.mark.parametrize("lora", [False, True])
def test_a_recorded_step_runs_on_a_device_without_numbers(lora: bool) -> None:
    model = causal_lm("qwen2 untied")
    decoder = decoder_of((with_adapters(model) if lora else model).to("meta"), lambda run: run)
    last, lengths, cache = decoder._prefill([[4, 5, 6], [7]], 2, 8)
    assert isinstance(cache, StaticCache)
    token = torch.zeros(4, dtype=torch.long, device="meta")
    hidden = decoder._decode(cache, token, lengths.repeat_interleave(2), torch.zeros_like(token[:1]))
    assert {part.device.type for part in (last, lengths, hidden, cache.keys)} == {"meta"}
    assert hidden.shape == (4, decoder.embed.shape[1])


@pytest.mark.parametrize("architecture", FAST)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=4)], ids=["greedy", "sampled"])
def test_steps_of_one_shape_decode_the_same_tokens(architecture: str, sampling: Sampling) -> None:
    """Recorded steps compute ended rows too and mask what is not written: tokens are those of the plain loop."""
    model, recorded = causal_lm(architecture, initializer_range=0.3), []

    def record(run: Replay) -> Replay:
        recorded.append(run().shape[0])  # a warm-up, as on CUDA: it must leave nothing behind
        return run

    plain, static = (generate(decoder_of(model, how), sampling) for how in (None, record))
    for (tokens, logprobs), (others, other_logprobs) in zip(plain, static, strict=True):
        assert tokens.tolist() == others.tolist()
        torch.testing.assert_close(logprobs, other_logprobs, atol=1e-5, rtol=0)
    if sampling.temperature > 0:
        assert len(recorded) > 1, "no row ended early enough for the grid to shrink: the test would see nothing"
        assert recorded == sorted(recorded, reverse=True)


class FakeGraph:
    """Stands in for torch.cuda: what is run while one is open is kept, and replayed by running it again."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.calls

        class Stream:
            def wait_stream(self, other: object) -> None:
                calls.append("wait")

        class Graph:
            def replay(self) -> None:
                calls.append("replay")

        @contextmanager
        def using(_: object) -> Iterator[None]:
            calls.append("side")
            yield
            calls.append("main")

        @contextmanager
        def recording(_: object) -> Iterator[None]:
            calls.append("record")
            yield
            calls.append("recorded")

        fakes = {"Stream": Stream, "current_stream": Stream, "stream": using, "CUDAGraph": Graph, "graph": recording}
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_warmed_up_on_a_stream_of_its_own_recorded_once_and_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeGraph()
    fake.install(monkeypatch)
    out = torch.zeros(2)

    def run() -> Tensor:
        fake.calls.append("run")
        return out

    replay = graphed.cuda_graph(run)
    assert replay() is replay() is out
    assert fake.calls == ["wait", "side", "run", "main", "wait", "record", "run", "recorded", "replay", "replay"]


def test_only_cuda_records_and_a_variable_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorder(torch.device("cpu")) is None
    assert recorder(torch.device("cuda")) is graphed.cuda_graph
    monkeypatch.setenv("UPS_RM_CUDA_GRAPHS", "0")
    assert recorder(torch.device("cuda")) is None


def test_a_step_that_can_not_be_recorded_names_the_way_out() -> None:
    def record(_: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = decoder_of(causal_lm(), record)
    with pytest.raises(RunError, match="stream is capturing\n  fix: UPS_RM_CUDA_GRAPHS=0"):
        generate(decoder, Sampling(seed=1))


def test_attention_takes_what_sdpa_lays_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs SDPA's result has the strides of (B, L, heads, D)."""
    model, attend = causal_lm(), torch.nn.functional.scaled_dot_product_attention
    layers = DecoderLayers(model.model)
    q, k, v = (torch.randn(2, 5, heads, layers.head_dim) for heads in (layers.heads, layers.kv_heads, layers.kv_heads))
    assert layers.heads > layers.kv_heads > 1
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    by_products = layers.attention(q, k, v, layers.additive(seen, q.dtype))
    monkeypatch.setattr("ups_rm.layers.decoder.SCORES_AT_ONCE", 0)
    mask = layers.additive(seen, q.dtype)
    for lay_out in (lambda out: out, lambda out: out.transpose(1, 2).contiguous().transpose(1, 2)):
        other = lambda *given, lay_out=lay_out, **named: lay_out(attend(*given, **named))  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other)
        torch.testing.assert_close(layers.attention(q, k, v, mask), by_products, atol=1e-5, rtol=0)


def test_padding_is_zero_and_nan_stays_in_its_row() -> None:
    grid = Grid(torch.tensor([1, 2, 3]), 6, (torch.tensor([], dtype=torch.long),) * 2)
    x = torch.tensor([[1.0], [float("nan")], [3.0]], requires_grad=True)
    padded = grid.pad(x)
    assert padded[:, 0].nan_to_num(7).tolist() == [0, 1, 7, 3, 0, 0]
    assert grid.pack(padded)[:, 0].nan_to_num(7).tolist() == [1, 7, 3]
    (grid.pad(x)[:, 0].nan_to_num() * torch.arange(6)).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1, 0, 3]
