"""Bytes per GPU: training state sharded by FSDP2, activations, the rollout engine split by tensor parallelism, the RM.

Formulas are in docs/planning.md. What is counted is what the layers keep for the backward pass in transformers' own
Llama and Qwen2 code with flash or SDPA attention, so that tests can measure it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ups_rm.planning.architecture import Architecture

GIB = 1024**3
MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes per trained parameter: fp32 weights, fp32 gradients, AdamW's two fp32 moments (verl's `model_dtype: fp32`)."""
COMPUTE = 2
"""Bytes of a bf16 number, the compute type."""
LOGIT_COPIES = 3
"""Logits, their log-softmax, and the gradient of one of them, in the compute type, at the same time."""
RUNTIME = 3 * GIB
"""CUDA context, NCCL buffers, cuBLAS workspaces: an allowance, not a count."""


def activation_bytes_per_layer(model: Architecture, width: int = COMPUTE) -> int:
    """What one decoder layer keeps per token for its backward pass, without checkpointing.

    2·H·(4 + 2·width): two RMSNorms, each an fp32 copy of its input, the normalised input, and its output.
    width·(2·A·D + 2·K·D): query, key, value and the attention's output; the scores are never kept (flash attention).
    width·4·I: gate, its activation, up, their product.
    4·A + 8: log-sum-exp per head and the norms' factors, fp32.
    Qwen3 adds (A·D + K·D)·(4 + width) + 4·(A + K) for the norms of query and key.

    Args:
        width: bytes per number of the compute type.

    Source: counted in transformers' modeling_qwen2.py and modeling_llama.py, after arXiv:2205.05198, section 4.1.
    """
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    kept = 2 * model.hidden * (4 + 2 * width) + width * (2 * query + 2 * key + 4 * model.inner) + 4 * model.heads + 8
    if model.qk_norm:
        kept += (query + key) * (4 + width) + 4 * (model.heads + model.kv_heads)
    return kept


def activation_bytes(model: Architecture, tokens: int, *, checkpointing: bool, width: int = COMPUTE) -> int:
    """What a forward of `tokens` tokens keeps for its backward, the input of the LM head included, the logits not.

    With checkpointing: every layer's input (width·H) and, while one layer is computed again, that layer's own. The last
    norm is outside the layers: H·(4 + 2·width), its output being the LM head's input.
    """
    layer, last = activation_bytes_per_layer(model, width), model.hidden * (4 + 2 * width)
    if checkpointing:
        return tokens * (model.layers * width * model.hidden + layer + last)
    return tokens * (model.layers * layer + last)


def logit_bytes(model: Architecture, tokens: int, *, copies: int = LOGIT_COPIES, width: int = COMPUTE) -> int:
    """Logits of a micro batch and what is computed of them: copies·width·V per token."""
    return copies * tokens * model.vocab * width


def optimizer_bytes(model: Architecture) -> int:
    """AdamW's state of the whole model in fp32: two moments per parameter and a step counter per tensor."""
    return MOMENTS * model.parameters + 4 * model.tensors


@dataclass(frozen=True)
class Layout:
    """Where things are. All lengths in tokens, all sizes in bytes."""

    gpus: int
    """GPUs that train and roll out: `trainer.nnodes` x `trainer.n_gpus_per_node`."""
    gpus_per_node: int
    gpu_memory: int
    shard_group: int
    """GPUs that share one copy of the training state (FSDP2; all of them unless `fsdp_size` says otherwise)."""
    tensor_parallel: int
    rollout_share: float
    """`rollout.gpu_memory_utilization`: the rollout engine's part of the GPU, weights and cache together."""
    length: int
    """Longest prompt + response."""
    micro_batch: int
    """Sequences per GPU in one forward and backward."""
    logprob_micro_batch: int
    checkpointing: bool
    token_budget: int = 0
    """Tokens of a micro batch where it is cut by tokens (`actor.use_dynamic_bsz`); 0: by sequences."""
    sequence_parallel: int = 1
    """GPUs that share one sequence (Ulysses)."""
    width: int = COMPUTE
    """Bytes of a number in compute, gathered weights, rollout."""
    reshard: bool = True
    """Gathered weights are given up after the forward."""
    free_cache: bool = True
    """The rollout engine gives its memory back between rollouts."""
    rollout_batch_tokens: int = 8192
    """Tokens that one iteration of the rollout engine computes at most."""
    param_offload: bool = False
    optimizer_offload: bool = False
    lora_rank: int = 0
    rm_shared: bool = True
    """The RM is on a training GPU, beside everything else; else it has its own."""
    rm_batch_tokens: int = 16384

    def tokens(self, micro_batch: int) -> int:
        """Of a micro batch on one GPU, all sequences as long as the recipe allows."""
        return (self.token_budget or micro_batch * self.length) // self.sequence_parallel


def training_state(policy: Architecture, layout: Layout) -> dict[str, int]:
    """Parameters, gradients and optimizer of the actor per GPU: all are sharded (ZeRO stage 3, arXiv:1910.02054)."""
    shard = layout.shard_group
    trained = policy.lora_parameters(layout.lora_rank) if layout.lora_rank else policy.parameters
    frozen = policy.parameters if layout.lora_rank else 0
    return {
        "parameters (fp32)": MASTER * (trained + frozen) // shard,
        "gradients (fp32)": GRADIENT * trained // shard,
        "optimizer (AdamW)": (MOMENTS * trained if layout.lora_rank else optimizer_bytes(policy)) // shard,
    }


def gathered_bytes(policy: Architecture, layout: Layout) -> int:
    """Whole weights that FSDP2 holds at one time: two layers in bf16 (this one, the next prefetched) and the LM head.

    All of them where they are not given up after the forward. In the backward pass a layer's gradient in fp32 stands
    beside them until it is reduced.
    """
    head = policy.vocab * policy.hidden
    weights = 2 * policy.layer_parameters + head if layout.reshard else policy.parameters
    return layout.width * weights + GRADIENT * max(policy.layer_parameters, head)


def rollout_weights(policy: Architecture, tensor_parallel: int, width: int = COMPUTE) -> int:
    """Weights of the rollout engine on each of its GPUs: matrices are split, norms are not.

    With more GPUs than key/value heads each head is on several of them.
    """
    norms = policy.hidden * (2 * policy.layers + 1)
    key_value = 2 * policy.layers * policy.hidden * policy.kv_heads * policy.head_dim
    split = policy.parameters - norms - key_value
    kv_parts = min(tensor_parallel, policy.kv_heads)
    return width * (split // tensor_parallel + key_value // kv_parts + norms)


def kv_bytes_per_token(policy: Architecture, tensor_parallel: int, width: int = COMPUTE) -> int:
    """KV cache of one token on each GPU of a rollout engine."""
    return policy.kv_bytes_per_token(width) // min(tensor_parallel, policy.kv_heads)


def rollout_workspace(policy: Architecture, layout: Layout) -> int:
    """What a vLLM iteration needs beside weights and cache: a layer's values of its tokens, fp32 logits of 256 rows."""
    layer = layout.rollout_batch_tokens * layout.width * (4 * policy.hidden + 3 * policy.inner)
    return layer + 2 * 256 * policy.vocab * 4


@dataclass(frozen=True)
class Cache:
    """Room for keys and values in one rollout engine."""

    bytes_per_gpu: int
    tokens: int
    """Tokens that the engine's GPUs hold together."""
    sequences: int
    """Sequences of full length that fit; shorter ones fit more often."""


def kv_cache(policy: Architecture, layout: Layout) -> Cache:
    """What is left of the rollout engine's share after weights and workspace; zero or less: it does not start."""
    budget = int(layout.rollout_share * layout.gpu_memory)
    weights = rollout_weights(policy, layout.tensor_parallel, layout.width)
    room = budget - weights - rollout_workspace(policy, layout)
    tokens = max(0, room) // kv_bytes_per_token(policy, layout.tensor_parallel, layout.width)
    return Cache(room, tokens, tokens // layout.length)


def rm_bytes(rm: Architecture, batch_tokens: int) -> int:
    """An RM worker: bf16 weights, the head in fp32, and the working set of one forward (no backward is kept)."""
    body, head = rm.parameters - rm.head_parameters, rm.head_parameters
    working = batch_tokens * (COMPUTE * (3 * rm.inner + 4 * rm.hidden) + 4 * rm.hidden)
    return COMPUTE * body + 4 * head + working


def phases(policy: Architecture, rm: Architecture, layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes per GPU of each phase of a step, by what holds them. Phases follow each other, so the largest counts.

    Rollout: the engine takes its share whole; the training state stays unless it is offloaded. Update and log-probs:
    the engine sleeps and has given its memory back (`rollout.free_cache_engine`). The reference is the same model
    without gradients; under FSDP2 verl keeps it in host memory and brings it layer by layer, so it costs no more than
    the gathered weights.
    """
    state = training_state(policy, layout)
    resident = {
        name: size
        for name, size in state.items()
        if not (layout.param_offload and name.startswith("parameters"))
        and not (layout.optimizer_offload and name.startswith("optimizer"))
        and not name.startswith("gradients")
    }
    scorer = {"reward model": rm_bytes(rm, layout.rm_batch_tokens)} if layout.rm_shared else {}
    engine = {"rollout engine (weights, KV cache)": int(layout.rollout_share * layout.gpu_memory)}
    kept = {} if layout.free_cache else engine
    update, logprob, width = layout.tokens(layout.micro_batch), layout.tokens(layout.logprob_micro_batch), layout.width
    forward_layer = width * (3 * policy.inner + 6 * policy.hidden)
    return {
        "rollout": {
            **resident,
            **scorer,
            **engine,
            "runtime": RUNTIME,
        },
        "log-probs and reference": {
            **resident,
            **scorer,
            **kept,
            "parameters (fp32)": state["parameters (fp32)"],
            "gathered weights": gathered_bytes(policy, layout),
            "working set of a layer": logprob * forward_layer,
            "logits": logit_bytes(policy, logprob, copies=2, width=width),
            "runtime": RUNTIME,
        },
        "update": {
            **state,
            **scorer,
            **kept,
            "gathered weights": gathered_bytes(policy, layout),
            "activations": activation_bytes(policy, update, checkpointing=layout.checkpointing, width=width),
            "logits": logit_bytes(policy, update, width=width),
            "runtime": RUNTIME,
        },
    }


def host_bytes(policy: Architecture, layout: Layout) -> dict[str, int]:
    """Host memory per node: the reference (always there under FSDP2) and what is offloaded, in fp32."""
    state, local = training_state(policy, layout), layout.gpus_per_node
    held = {"reference (fp32)": 0 if layout.lora_rank else MASTER * policy.parameters * local // layout.shard_group}
    if layout.param_offload:
        held["parameters"] = local * state["parameters (fp32)"]
    if layout.optimizer_offload:
        held["optimizer"] = local * state["optimizer (AdamW)"]
    return held
