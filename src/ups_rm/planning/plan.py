"""A recipe, a policy, an RM and some GPUs -> memory per GPU, what fits, seconds per step, and how that grows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ups_rm.device import DTYPES
from ups_rm.errors import PlanError
from ups_rm.planning import memory, speed
from ups_rm.planning.architecture import Architecture, read_architecture, reward_model

if TYPE_CHECKING:
    from ups_rm.recipe import Recipe

SCALES = (64, 512, 4096)
"""GPUs that the growth tables go to."""
HEADROOM = 0.92
"""Share of the GPU that a plan may fill: the allocator needs the rest (fragmentation)."""


@dataclass(frozen=True)
class Machine:
    """The GPUs that the plan is for, and the lengths that no recipe knows."""

    gpus: int
    """Those that train and roll out, over all nodes. An RM that is not shared with them has its GPUs besides."""
    nodes: int
    memory_gb: float
    """GB of 10^9 bytes per GPU. Makers' 80 and 141 GB are a few per cent more, so this errs on the safe side."""
    gpu: speed.Gpu
    rm_gpus: int | None = None
    """GPUs of the RM's own, beside the others; 0: a worker on every training GPU; None: `reward_model.placement`."""
    prompt_tokens: float = 64.0
    response_tokens: float = 300.0
    efficiency: speed.Efficiency = field(default_factory=speed.Efficiency)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro batches that fit and divide a GPU's share, in sequences per GPU; 0: not even one."""

    with_checkpointing: int
    without_checkpointing: int
    log_probs: int


@dataclass(frozen=True)
class Engine:
    """A rollout engine at one degree of tensor parallelism."""

    tensor_parallel: int
    weights: int
    cache: memory.Cache


@dataclass(frozen=True)
class Scale:
    """One row of a growth table."""

    gpus: int
    prompts: int
    shard_group: int
    rm_workers: int
    time: speed.StepTime
    tokens_per_second: float
    gpu_hours_per_million_tokens: float
    rm_workers_for_a_tenth: int
    """RM workers with which scoring takes a tenth of the rest of the step."""
    divides: bool
    """verl needs the replies of a step (prompts x n) to be a multiple of the GPUs."""


@dataclass(frozen=True)
class Plan:
    """All of it. Bytes are bytes, times are seconds."""

    policy: Architecture
    rm: Architecture
    machine: Machine
    layout: memory.Layout
    work: speed.Work
    phases: dict[str, dict[str, int]]
    host_bytes: dict[str, int]
    activations: dict[str, int]
    """Of the recipe's micro batch, with and without checkpointing."""
    engines: list[Engine]
    micro_batch: MicroBatch
    problems: list[str]
    rm_workers: int
    rm_place: str
    """Where they are, in words."""
    time: speed.StepTime
    tokens_per_second: float
    growing: list[Scale]
    """The batch grows with the GPUs."""
    fixed: list[Scale]
    """The batch stays the recipe's."""

    @property
    def fits(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For --json: the fields above, with totals and the bottleneck spelled out."""
        found = asdict(self)
        found["policy"]["parameters"], found["rm"]["parameters"] = self.policy.parameters, self.rm.parameters
        found["fits"] = self.fits
        for phase, parts in self.phases.items():
            found["phases"][phase]["total"] = sum(parts.values())
        rows = [(found["time"], self.time)]
        for name, scales in (("growing", self.growing), ("fixed", self.fixed)):
            rows += [(row["time"], scale.time) for row, scale in zip(found[name], scales, strict=True)]
        for row, time in rows:
            row["total"], row["bottleneck"] = time.total, time.bottleneck
        return found


def make_plan(recipe: Recipe, policy: Architecture, rm: Architecture, machine: Machine) -> Plan:
    """The plan of a recipe on a machine.

    Raises:
        PlanError: the GPUs can't be divided as asked (nodes, tensor parallel, shard group).
    """
    if recipe.actor_rollout_ref.rollout.enforce_eager:
        machine = replace(machine, efficiency=replace(machine.efficiency, iteration=speed.EAGER))
    layout, work = _layout(recipe, machine), _work(recipe, machine)
    cluster = _cluster(recipe, machine, layout)
    limit = int(HEADROOM * layout.gpu_memory)
    phases = memory.phases(policy, rm, layout)
    micro = MicroBatch(
        _largest(policy, rm, replace(layout, checkpointing=True), "update", limit, work),
        _largest(policy, rm, replace(layout, checkpointing=False), "update", limit, work),
        _largest(policy, rm, layout, "log-probs and reference", limit, work),
    )
    engines = []
    for degree in (1, 2, 4, 8):
        if layout.gpus_per_node % degree == 0:
            weights = memory.rollout_weights(policy, degree, layout.width)
            engines.append(Engine(degree, weights, memory.kv_cache(policy, replace(layout, tensor_parallel=degree))))
    kept = partial(memory.activation_bytes, policy, layout.tokens(layout.micro_batch), width=layout.width)
    time = speed.step_time(policy, rm, work, cluster, machine.efficiency)
    return Plan(
        policy=policy,
        rm=rm,
        machine=machine,
        layout=layout,
        work=work,
        phases=phases,
        host_bytes=memory.host_bytes(policy, layout),
        activations={
            "with checkpointing": kept(checkpointing=True),
            "without checkpointing": kept(checkpointing=False),
        },
        engines=engines,
        micro_batch=micro,
        problems=_problems(policy, layout, phases, limit, micro),
        rm_workers=cluster.rm_gpus,
        rm_place=_rm_place(recipe, machine),
        time=time,
        tokens_per_second=work.tokens / time.total,
        growing=_growth(policy, rm, work, cluster, machine, grow=True),
        fixed=_growth(policy, rm, work, cluster, machine, grow=False),
    )


def recipe_architectures(recipe: Recipe, policy: str | None, rm: str | None) -> tuple[Architecture, Architecture]:
    """Policy and RM of a recipe, or those given instead. A language model in the RM's place gets the recipe's head.

    Raises:
        PlanError: an architecture that can't be read, or a recipe with several RMs or one behind a URL or a function.
    """
    training, entries = recipe.reward_training, recipe.reward_model.asked()
    if rm is None and (len(entries) > 1 or (entries and not entries[0].path)):
        raise PlanError("the plan counts one RM in a folder, the recipe names others\n  fix: --rm FOLDER")
    judge = read_architecture(rm or (entries[0].path if entries else training.backbone))
    judge = judge if judge.head_dims is not None else reward_model(judge, training.hidden_dims)
    return read_architecture(policy or recipe.actor_rollout_ref.model.path), judge


def _layout(recipe: Recipe, machine: Machine) -> memory.Layout:
    if machine.gpus < 1 or machine.nodes < 1 or machine.gpus % machine.nodes:
        raise PlanError(f"{machine.gpus} GPUs can't be spread evenly over {machine.nodes} nodes")
    settings, actor, rollout = (
        recipe.actor_rollout_ref,
        recipe.actor_rollout_ref.actor,
        recipe.actor_rollout_ref.rollout,
    )
    fsdp, degree = actor.fsdp_config, rollout.tensor_model_parallel_size
    per_node = machine.gpus // machine.nodes
    group = machine.gpus if fsdp.fsdp_size < 1 else fsdp.fsdp_size
    if per_node % degree:
        raise PlanError(f"tensor_model_parallel_size {degree} does not divide the {per_node} GPUs of a node")
    if machine.gpus % group:
        raise PlanError(f"fsdp_size {group} does not divide {machine.gpus} GPUs")
    if machine.gpus % actor.ulysses_sequence_parallel_size:
        raise PlanError(
            f"ulysses_sequence_parallel_size {actor.ulysses_sequence_parallel_size} does not divide {machine.gpus} GPUs"
        )
    return memory.Layout(
        gpus=machine.gpus,
        gpus_per_node=per_node,
        gpu_memory=int(machine.memory_gb * 1e9),
        shard_group=group,
        tensor_parallel=degree,
        rollout_share=rollout.gpu_memory_utilization,
        length=recipe.data.max_prompt_length + recipe.data.max_response_length,
        micro_batch=actor.ppo_micro_batch_size_per_gpu,
        logprob_micro_batch=rollout.log_prob_micro_batch_size_per_gpu,
        checkpointing=settings.model.enable_gradient_checkpointing,
        token_budget=actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else 0,
        sequence_parallel=actor.ulysses_sequence_parallel_size,
        width=4 if DTYPES.get(fsdp.dtype) == "float32" else memory.COMPUTE,
        reshard=fsdp.reshard_after_forward,
        free_cache=rollout.free_cache_engine,
        rollout_batch_tokens=rollout.max_num_batched_tokens,
        param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload,
        lora_rank=settings.model.lora_rank,
        rm_shared=_rm_gpus(recipe, machine)[1],
        rm_batch_tokens=recipe.reward_model.max_batch_tokens,
    )


def _work(recipe: Recipe, machine: Machine) -> speed.Work:
    actor = recipe.actor_rollout_ref.actor
    return speed.Work(
        prompts=recipe.data.train_batch_size,
        n=recipe.actor_rollout_ref.rollout.n,
        prompt_tokens=min(machine.prompt_tokens, recipe.data.max_prompt_length),
        response_tokens=min(machine.response_tokens, recipe.data.max_response_length),
        max_response=recipe.data.max_response_length,
        mini_batches=max(1, recipe.data.train_batch_size // actor.ppo_mini_batch_size),
        epochs=actor.ppo_epochs,
    )


def _cluster(recipe: Recipe, machine: Machine, layout: memory.Layout) -> speed.Cluster:
    settings, (rm_gpus, rm_shared) = recipe.actor_rollout_ref, _rm_gpus(recipe, machine)
    return speed.Cluster(
        gpus=machine.gpus,
        gpus_per_node=layout.gpus_per_node,
        gpu=machine.gpu,
        tensor_parallel=layout.tensor_parallel,
        shard_group=layout.shard_group,
        rm_gpus=rm_gpus,
        rm_shared=rm_shared,
        max_num_seqs=settings.rollout.max_num_seqs,
        micro_batch=layout.micro_batch,
        checkpointing=layout.checkpointing,
        use_reference=recipe.algorithm.use_kl_in_reward or settings.actor.use_kl_loss,
    )


def _rm_gpus(recipe: Recipe, machine: Machine) -> tuple[int, bool]:
    """GPUs with an RM worker, and whether they are training GPUs. Of a service one is assumed.

    Raises:
        PlanError: more workers than training GPUs to share.
    """
    placement, workers = recipe.reward_model.placement, recipe.reward_model.num_workers
    if machine.rm_gpus is not None:
        return machine.rm_gpus or machine.gpus, machine.rm_gpus == 0
    if placement == "shared" and workers > machine.gpus:
        raise PlanError(
            f"reward_model.num_workers={workers}, but there are only {machine.gpus} training GPUs to share\n"
            f"  fix: reward_model.num_workers={machine.gpus}, or reward_model.placement=own"
        )
    return 1 if placement == "http" else workers, placement == "shared"


PLACES = {
    "shared": "on GPUs that also train",
    "own": "on GPUs of its own beside them",
    "node": "on GPUs of another node",
    "http": "behind a service",
}


def _rm_place(recipe: Recipe, machine: Machine) -> str:
    given, placement = machine.rm_gpus, recipe.reward_model.placement
    if given is None or (given and placement != "shared"):
        return PLACES[placement]
    return PLACES["own" if given else "shared"]


def _largest(
    policy: Architecture, rm: Architecture, layout: memory.Layout, phase: str, limit: int, work: speed.Work
) -> int:
    """The most sequences per GPU with which a phase stays under the limit, as verl cuts: into equal micro batches."""
    cuts = work.mini_batches if phase == "update" else 1
    share = max(1, work.sequences * layout.sequence_parallel // (cuts * layout.gpus))
    found = 0
    for size in (size for size in range(1, share + 1) if share % size == 0):
        tried = replace(layout, micro_batch=size, logprob_micro_batch=size)
        if sum(memory.phases(policy, rm, tried)[phase].values()) > limit:
            break
        found = size
    return found


def _problems(
    policy: Architecture, layout: memory.Layout, phases: dict[str, dict[str, int]], limit: int, micro: MicroBatch
) -> list[str]:
    """What does not fit, each with the way out."""
    found = []
    for phase, parts in phases.items():
        total = sum(parts.values())
        if total <= limit:
            continue
        best = micro.with_checkpointing if layout.checkpointing else micro.without_checkpointing
        ways = {
            "rollout": "a smaller rollout.gpu_memory_utilization, or optimizer_offload and param_offload",
            "update": f"actor.ppo_micro_batch_size_per_gpu={best}" if best else "checkpointing, offload, or more GPUs",
            "log-probs and reference": f"log_prob_micro_batch_size_per_gpu={micro.log_probs}"
            if micro.log_probs
            else "offload, or more GPUs",
        }
        found.append(
            f"{phase} needs {total / 1e9:.1f} GB of {layout.gpu_memory / 1e9:.0f} GB, {HEADROOM:.0%} may be used"
            f"\n  fix: {ways[phase]}"
        )
    cache = memory.kv_cache(policy, layout)
    if cache.sequences < 1:
        found.append(
            f"the rollout engine has {max(0, cache.tokens)} tokens of KV cache, one sequence needs {layout.length}"
            "\n  fix: a larger tensor_model_parallel_size or gpu_memory_utilization"
        )
    return found


def _growth(
    policy: Architecture, rm: Architecture, work: speed.Work, cluster: speed.Cluster, machine: Machine, *, grow: bool
) -> list[Scale]:
    """The plan's GPUs and SCALES, sharded over all of them and over one node.

    The same share of the training GPUs has an RM worker; GPUs of the RM's own stay as many.
    """
    rows = []
    for gpus in (machine.gpus, *(size for size in SCALES if size > machine.gpus)):
        prompts = work.prompts * gpus // machine.gpus if grow else work.prompts
        groups = {gpus} | ({cluster.gpus_per_node} if gpus % cluster.gpus_per_node == 0 else set())
        for group in sorted(groups, reverse=True):
            workers = cluster.rm_gpus * gpus // machine.gpus if cluster.rm_shared else cluster.rm_gpus
            grown = replace(cluster, gpus=gpus, shard_group=group, rm_gpus=workers)
            step = replace(work, prompts=prompts)
            time = speed.step_time(policy, rm, step, grown, machine.efficiency)
            alone = speed.rm_seconds(rm, step, replace(grown, rm_gpus=1), machine.efficiency)
            paid = gpus + (0 if cluster.rm_shared else grown.rm_gpus)
            rows.append(
                Scale(
                    gpus=gpus,
                    prompts=prompts,
                    shard_group=group,
                    rm_workers=grown.rm_gpus,
                    time=time,
                    tokens_per_second=step.tokens / time.total,
                    gpu_hours_per_million_tokens=paid * time.total / 3600 / step.tokens * 1e6,
                    rm_workers_for_a_tenth=-int(-alone // (0.1 * (time.total - time.rm))),
                    divides=step.sequences % gpus == 0,
                )
            )
    return rows
