"""Seconds per step from stated FLOP/s and bandwidths: rollout, log-probabilities, update, communication, RM scoring.

A roofline with stated efficiencies, no simulation: every number it uses can be set on the command line, and
docs/planning.md says how far it is from published runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ups_rm.errors import PlanError
from ups_rm.planning.architecture import Architecture
from ups_rm.planning.memory import COMPUTE, GRADIENT


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says per GPU: dense bf16 FLOP/s; bytes/s of its memory, its NVLink, its network port."""

    name: str
    flops: float
    memory_bandwidth: float
    link: float
    network: float
    memory: float
    """GB (10^9 bytes)."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 2.04e12, 300e9, 25e9, 80),
        Gpu("h100", 989e12, 3.35e12, 450e9, 50e9, 80),
        Gpu("h200", 989e12, 4.8e12, 450e9, 50e9, 141),
        Gpu("h20", 148e12, 4.0e12, 450e9, 50e9, 96),
        Gpu("b200", 2250e12, 8.0e12, 900e9, 50e9, 180),
        Gpu("mi300x", 1307e12, 5.3e12, 448e9, 50e9, 192),
    )
}
"""Peaks as in verl's flops_counter.py, bandwidths from the makers' data sheets, one 400 Gb/s port (A100: 200 Gb/s)."""


@dataclass(frozen=True)
class Efficiency:
    """What software reaches of a data sheet. Each is a stated assumption with its source in docs/planning.md."""

    matmul: float = 0.75
    """Share of peak FLOP/s of large matrix products alone."""
    intensity: float = 110.0
    """FLOPs of training per byte that norms, activations and other element-wise work move through GPU memory."""
    bandwidth: float = 0.6
    """Share of the memory bandwidth in decoding."""
    links: float = 0.7
    """Share of the link bandwidth in collectives."""
    iteration: float = 0.010
    """Seconds of every decoding iteration that no bandwidth explains (launches, sampling), with CUDA graphs."""
    hop: float = 5e-6
    """Seconds of latency per GPU in the ring of a collective."""
    step: float = 2.0
    """Seconds per step outside the phases: starting them, waking the rollout engine."""
    driver: float = 2e9
    """Bytes/s that the one driver process moves between workers: TOKEN_BYTES per token and step."""


TOKEN_BYTES = 64
"""What the driver moves per token: ids, masks, positions (int64), log-probabilities and advantages (fp32)."""
EAGER = 0.035
"""`Efficiency.iteration` where vLLM runs without CUDA graphs (`enforce_eager`), as the published runs did."""


def reachable_flops(gpu: Gpu, efficiency: Efficiency) -> float:
    """FLOP/s of training: matrix products at their share of the peak, and the bytes that go with them.

    1 / (1/(matmul·P) + 1/(intensity·bandwidth)): a GPU with much compute per byte reaches a smaller share of its peak.
    """
    return 1 / (1 / (efficiency.matmul * gpu.flops) + 1 / (efficiency.intensity * gpu.memory_bandwidth))


@dataclass(frozen=True)
class Work:
    """One step's tokens."""

    prompts: int
    n: int
    prompt_tokens: float
    """Mean length of a prompt, in tokens of the policy."""
    response_tokens: float
    """Mean length of a reply."""
    max_response: int
    mini_batches: int = 1
    """Optimizer steps per rollout (`train_batch_size` / `ppo_mini_batch_size` x `ppo_epochs`)."""
    epochs: int = 1

    @property
    def sequences(self) -> int:
        return self.prompts * self.n

    @property
    def length(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step: what verl's `perf/total_num_tokens` counts."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Cluster:
    """What the step runs on."""

    gpus: int
    gpus_per_node: int
    gpu: Gpu
    tensor_parallel: int
    shard_group: int
    rm_gpus: int
    """GPUs with an RM worker."""
    rm_shared: bool
    """They are training GPUs too: scoring waits for nothing else but takes their time."""
    max_num_seqs: int = 256
    """Sequences that one rollout engine decodes at the same time, at most."""
    micro_batch: int = 8
    checkpointing: bool = True
    use_reference: bool = True
    old_log_prob: bool = True
    """A forward of its own for the old log-probabilities, as verl does."""


def ring_seconds(size: float, members: int, cluster: Cluster, efficiency: Efficiency) -> float:
    """An all-gather or reduce-scatter of `size` bytes (whole tensor) over `members` GPUs, in rings over all rails.

    (m-1)/m · size through the slowest pipe of a GPU: NVLink inside a node, and between nodes the node's ports together,
    over which each node takes in the tensor once. Plus a latency per member.
    """
    if members <= 1:
        return 0.0
    pipe = cluster.gpu.link
    if members > cluster.gpus_per_node:
        pipe = min(pipe, cluster.gpus_per_node * cluster.gpu.network)
    return (members - 1) / members * size / (efficiency.links * pipe) + (members - 1) * efficiency.hop


def longest_reply(sequences: float, mean: float, limit: int) -> float:
    """Expected longest of N replies of exponential length with this mean, cut at the limit: mean·(ln N + 0.577)."""
    return min(float(limit), mean * (math.log(max(sequences, 1.0)) + 0.5772))


def rollout_seconds(policy: Architecture, work: Work, cluster: Cluster, efficiency: Efficiency) -> dict[str, float]:
    """Seconds to decode a step's replies: prefill, decoding, and what the longest replies add at the end.

    Replies have exponential lengths with the stated mean, cut at the limit; engines (`gpus` / tensor_parallel) share
    them evenly. One iteration gives one token to each of up to max_num_seqs sequences. It takes the larger of its
    matrix products and of reading the weights and the keys and values of these sequences, plus a fixed overhead. Full
    iterations last while there are waiting replies; then the batch empties, and all wait for the longest of all.
    """
    engines = max(1, cluster.gpus // cluster.tensor_parallel)
    sequences = work.sequences / engines
    active = min(float(cluster.max_num_seqs), sequences)
    limit = work.max_response
    mean = min(work.response_tokens, 0.999 * limit)
    flops = cluster.tensor_parallel * reachable_flops(cluster.gpu, efficiency)
    bandwidth = cluster.tensor_parallel * efficiency.bandwidth * cluster.gpu.memory_bandwidth
    weights = COMPUTE * (policy.parameters - policy.embedding_parameters)
    cache = policy.kv_bytes_per_token() * (work.prompt_tokens + mean / 2)

    def iteration(rows: float) -> float:
        compute = rows * policy.forward_flops(1, work.length) / flops
        return max(compute, (weights + rows * cache) / bandwidth) + efficiency.iteration

    tail = longest_reply(work.sequences, mean, limit)
    tokens_in_tail = min(sequences, active) * mean
    full = max(0.0, sequences * mean - tokens_in_tail) / max(active, 1.0)
    shrink = [iteration(active * math.exp(-t / mean)) for t in range(int(tail))]
    prefill = policy.forward_flops(work.prompts * work.prompt_tokens / engines, work.prompt_tokens) / flops
    return {"prefill": prefill, "decoding": full * iteration(active), "longest replies": sum(shrink)}


def compute_seconds(policy: Architecture, work: Work, cluster: Cluster, efficiency: Efficiency) -> dict[str, float]:
    """Matrix work of the training engine: forwards for old log-probabilities and the reference, and the update.

    A backward is twice a forward; checkpointing adds one more (arXiv:2205.05198, section 5).
    """
    rate = cluster.gpus * reachable_flops(cluster.gpu, efficiency)
    forward = policy.forward_flops(work.tokens, work.length) / rate
    return {
        "old log-probs": forward if cluster.old_log_prob else 0.0,
        "reference": forward if cluster.use_reference else 0.0,
        "update": forward * (4 if cluster.checkpointing else 3) * work.epochs,
    }


def communication_seconds(
    policy: Architecture, work: Work, cluster: Cluster, efficiency: Efficiency
) -> dict[str, float]:
    """FSDP2's collectives of a step.

    Every micro batch gathers the bf16 weights layer by layer, twice for an update, and reduce-scatters fp32 gradients.
    Smaller shard groups also sum gradients between them. New weights go to the rollout engines once.
    """
    group, layers = cluster.shard_group, policy.layers + 2
    micro = max(1, math.ceil(work.sequences / cluster.gpus / cluster.micro_batch))
    size = policy.parameters / layers
    gather = layers * ring_seconds(COMPUTE * size, group, cluster, efficiency)
    scatter = layers * ring_seconds(GRADIENT * size, group, cluster, efficiency)
    groups = cluster.gpus // group
    between = replace(cluster, gpus_per_node=1) if group >= cluster.gpus_per_node else cluster
    # every GPU sums its shard with those of the other groups: reduce-scatter and all-gather
    sums = 2 * layers * ring_seconds(GRADIENT * size / group, groups, between, efficiency)
    steps = max(micro, work.mini_batches) * work.epochs
    return {
        "old log-probs": micro * gather if cluster.old_log_prob else 0.0,
        "reference": micro * gather if cluster.use_reference else 0.0,
        "update": steps * (2 * gather + scatter) + work.mini_batches * work.epochs * sums,
        "new weights to the rollout": gather,
    }


def rm_seconds(rm: Architecture, work: Work, cluster: Cluster, efficiency: Efficiency) -> float:
    """One forward of the RM over every conversation, shared evenly by its workers."""
    rate = cluster.rm_gpus * reachable_flops(cluster.gpu, efficiency)
    return rm.forward_flops(work.tokens, work.length) / rate


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by phase; and what communication adds where it is not hidden behind computing."""

    rollout: float
    old_log_probs: float
    reference: float
    update: float
    rm: float
    weights: float
    communication: float
    """Part of the three training phases above in which GPUs wait for collectives."""
    other: float

    @property
    def total(self) -> float:
        return self.rollout + self.old_log_probs + self.reference + self.update + self.rm + self.weights + self.other

    @property
    def bottleneck(self) -> str:
        """The largest of rollout, computing of the training engine, communication, RM scoring, driver."""
        computing = self.old_log_probs + self.reference + self.update - self.communication
        parts = {
            "rollout": self.rollout,
            "training compute": computing,
            "communication": self.communication + self.weights,
            "RM scoring": self.rm,
            "driver": self.other,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(policy: Architecture, rm: Architecture, work: Work, cluster: Cluster, efficiency: Efficiency) -> StepTime:
    """Seconds of one step. Collectives run behind the computing of their phase (FSDP2 prefetches), so a phase takes the
    longer of the two. RM workers of their own score replies as they come in, behind the rollout; shared ones after it.

    Raises:
        PlanError: tensor parallel or the shard group does not divide the GPUs.
    """
    for name, part in (("tensor_model_parallel_size", cluster.tensor_parallel), ("fsdp_size", cluster.shard_group)):
        if cluster.gpus % part:
            raise PlanError(f"{name} {part} does not divide {cluster.gpus} GPUs")
    rollout = sum(rollout_seconds(policy, work, cluster, efficiency).values())
    compute = compute_seconds(policy, work, cluster, efficiency)
    wires = communication_seconds(policy, work, cluster, efficiency)
    scoring = rm_seconds(rm, work, cluster, efficiency) if cluster.rm_gpus else 0.0
    phase = {name: max(seconds, wires[name]) for name, seconds in compute.items()}
    return StepTime(
        rollout=rollout,
        old_log_probs=phase["old log-probs"],
        reference=phase["reference"],
        update=phase["update"],
        rm=scoring if cluster.rm_shared else max(0.0, scoring - rollout),
        weights=wires["new weights to the rollout"],
        communication=sum(max(0.0, wires[name] - seconds) for name, seconds in compute.items()),
        other=efficiency.step + work.tokens * TOKEN_BYTES / efficiency.driver,
    )
