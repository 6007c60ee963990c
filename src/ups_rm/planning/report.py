"""Prints a plan: tables of memory, fit, time and growth, and the assumptions they stand on."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ups_rm.planning import memory
from ups_rm.planning.plan import HEADROOM, Plan, Scale
from ups_rm.planning.speed import reachable_flops


def print_plan(plan: Plan, console: Console) -> None:
    """All tables, what does not fit last."""
    layout, machine = plan.layout, plan.machine
    console.print(
        f"policy {plan.policy.name}: {plan.policy.parameters:,} parameters; RM {plan.rm.name}: {plan.rm.parameters:,}; "
        f"{layout.gpus} x {machine.gpu.name} with {machine.memory_gb:g} GB on {machine.nodes} node(s), "
        f"{plan.rm_workers} GPU(s) with an RM worker, {plan.rm_place}",
        soft_wrap=True,
    )
    console.print(_memory(plan))
    console.print(_activations(plan))
    console.print(_engines(plan))
    console.print(_time(plan))
    console.print(_growth("growth, batch in proportion to the GPUs (shares of the step's time)", plan.growing))
    console.print(_growth("growth, the recipe's batch on more GPUs", plan.fixed))
    if proposed := proposed_settings(plan):
        console.print(f"proposed micro batches: {proposed}", soft_wrap=True, markup=False)
    for line in _assumptions(plan):
        console.print(line, soft_wrap=True, markup=False)
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", soft_wrap=True, markup=False, style="bold red")
    if plan.fits:
        console.print("fits", style="bold green")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _memory(plan: Plan) -> Table:
    names = list(dict.fromkeys(name for parts in plan.phases.values() for name in parts))
    table = _table("GB per GPU, by phase", "", *plan.phases)
    for name in names:
        table.add_row(name, *(_gb(parts[name]) if name in parts else "" for parts in plan.phases.values()))
    table.add_section()
    table.add_row("total", *(_gb(sum(parts.values())) for parts in plan.phases.values()))
    table.add_row("may be used", *[_gb(HEADROOM * plan.layout.gpu_memory)] * len(plan.phases))
    for name, size in plan.host_bytes.items():
        table.add_row(f"host memory per node: {name}", _gb(size))
    return table


def _activations(plan: Plan) -> Table:
    recipe, best = plan.layout.micro_batch, plan.micro_batch
    table = _table("micro batches, sequences per GPU", "", "recipe's", "its activations, GB", "largest that fits")
    size = plan.activations
    table.add_row(
        "update with checkpointing", str(recipe), _gb(size["with checkpointing"]), str(best.with_checkpointing)
    )
    table.add_row("update without", str(recipe), _gb(size["without checkpointing"]), str(best.without_checkpointing))
    table.add_row("log-probs", str(plan.layout.logprob_micro_batch), "", str(best.log_probs))
    return table


def proposed_settings(plan: Plan) -> str:
    """The largest micro batches that fit, as settings of the recipe; "" where not even one sequence does."""
    best = plan.micro_batch
    update = best.with_checkpointing if plan.layout.checkpointing else best.without_checkpointing
    sizes = {
        "actor.ppo_micro_batch_size_per_gpu": update,
        "rollout.log_prob_micro_batch_size_per_gpu": best.log_probs,
        "ref.log_prob_micro_batch_size_per_gpu": best.log_probs,
    }
    return " ".join(f"actor_rollout_ref.{key}={size}" for key, size in sizes.items()) if all(sizes.values()) else ""


def _engines(plan: Plan) -> Table:
    table = _table(
        f"rollout engine in {plan.layout.rollout_share:.0%} of the GPU",
        "tensor parallel", "weights, GB", "KV cache, GB", "tokens", f"sequences of {plan.layout.length}",
    )  # fmt: skip
    for engine in plan.engines:
        chosen = " (recipe)" if engine.tensor_parallel == plan.layout.tensor_parallel else ""
        cache = engine.cache
        room = (_gb(cache.bytes_per_gpu), f"{cache.tokens:,}", f"{cache.sequences:,}")
        table.add_row(f"{engine.tensor_parallel}{chosen}", _gb(engine.weights), *room)
    return table


def _time(plan: Plan) -> Table:
    time = plan.time
    table = _table("seconds per step", "", "s", "share")
    rows = {
        "rollout": time.rollout,
        "old log-probs": time.old_log_probs,
        "reference": time.reference,
        "RM scoring" + ("" if plan.layout.rm_shared else ", not hidden by the rollout"): time.rm,
        "update": time.update,
        "weights to the rollout": time.weights,
        "driver": time.other,
    }
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / time.total:.0%}")
    table.add_section()
    table.add_row("step", f"{time.total:.1f}", "")
    table.add_row("tokens/s", f"{plan.tokens_per_second:,.0f}", "")
    table.add_row("tokens/s per GPU", f"{plan.tokens_per_second / plan.layout.gpus:,.0f}", "")
    return table


def _growth(title: str, rows: list[Scale]) -> Table:
    """links: waiting for collectives; for 10%: RM workers with which scoring takes a tenth of the rest of the step."""
    table = _table(
        title, "GPUs", "sharding", "prompts", "s/step", "tok/s/GPU", "GPUh/Mtok",
        "rollout", "train", "links", "RM", "RM GPUs", "for 10%", "bottleneck",
    )  # fmt: skip
    for row in rows:
        time = row.time
        training = time.old_log_probs + time.reference + time.update - time.communication
        shares = (time.rollout, training, time.communication + time.weights, time.rm)
        table.add_row(
            f"{row.gpus:,}", f"{row.shard_group:,}", f"{row.prompts:,}", f"{time.total:.1f}",
            f"{row.tokens_per_second / row.gpus:,.0f}", f"{row.gpu_hours_per_million_tokens:.2f}",
            *(f"{seconds / time.total:.0%}" for seconds in shares),
            f"{row.rm_workers:,}", f"{row.rm_workers_for_a_tenth:,}",
            time.bottleneck if row.divides else "few replies",
        )  # fmt: skip
    return table


def _assumptions(plan: Plan) -> list[str]:
    gpu, efficiency, work = plan.machine.gpu, plan.machine.efficiency, plan.work
    rate = reachable_flops(gpu, efficiency)
    return [
        f"assumed per GPU: {gpu.flops / 1e12:.0f} TFLOP/s bf16 ({rate / gpu.flops:.0%} reached in training), memory "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s ({efficiency.bandwidth:.0%} in decoding), NVLink {gpu.link / 1e9:.0f} "
        f"GB/s, network {gpu.network / 1e9:.0f} GB/s ({efficiency.links:.0%} of both)",
        f"assumed lengths: prompts {work.prompt_tokens:.0f} tokens, replies {work.response_tokens:.0f} on average "
        f"(limit {work.max_response}); memory is counted for the limits ({plan.layout.length})",
        f"assumed: {efficiency.iteration * 1e3:.0f} ms overhead per decoding iteration, {efficiency.step:g} s "
        f"per step, {memory.RUNTIME / 1e9:.1f} GB runtime",
        "formulas, sources, and how far published runs are off: docs/planning.md",
    ]
