"""From facts to findings: what of the recipe this machine can do, what it can't, and what can't be seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ups_rm.errors import PlanError, RecipeError
from ups_rm.machine.facts import RAY_PORTS, Facts
from ups_rm.models import DEFAULT_MODEL, cache_folder

if TYPE_CHECKING:
    from ups_rm.planning.plan import Plan
    from ups_rm.recipe import Recipe, RewardModelModel

Verdict = Literal["ok", "warn", "fail", "unknown"]
GIB = 1024**3
MIN_DRIVER = {12: 525, 13: 580}
"""Oldest driver for a CUDA major version (NVIDIA's CUDA compatibility guide, minor version compatibility)."""
MIN_CAPABILITY = (8, 0)
"""bf16 and flash-attn 2 need Ampere."""
RAY_SHARED_MEMORY = 10 * GIB
"""Below that Ray's object store falls back to files in /tmp (its own warning), and NCCL may not start."""
RAY_OPEN_FILES = 65_536
"""Ray recommends it for its head; it opens connections to every worker."""
SETUP_GPU = "bash scripts/setup_gpu.sh"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    verdict: Verdict
    seen: str
    fix: str = ""
    """The way out, for warn and fail."""


def check_machine(facts: Facts, recipe: Recipe, engine: str) -> list[Finding]:
    """All findings, in the order of the table.

    Args:
        engine: `local` (one process, CPU or one GPU) or `verl` (Ray, FSDP2, vLLM on the recipe's GPUs).
    """
    found = [*_software(facts, recipe, engine), *_gpus(facts, recipe, engine)]
    plan = _plan(recipe, facts)
    if engine == "verl":
        found += [_recipe(recipe), _rm_place(facts, recipe)]
    found += _memory(facts, recipe, engine, plan)
    found += _machine(facts, recipe, engine, plan)
    found += _models(facts, recipe)
    return found


def _recipe(recipe: Recipe) -> Finding:
    """Whether verl can honour it, machine or not."""
    from ups_rm.distributed.translate import check_for_verl

    try:
        check_for_verl(recipe)
    except RecipeError as error:
        seen, _, fix = str(error).partition("\n  fix: ")
        return Finding("recipe", "fail", seen, fix or "another value")
    return Finding("recipe", "ok", "verl can honour every key")


def _software(facts: Facts, recipe: Recipe, engine: str) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    too_new = engine == "verl" and facts.python >= (3, 13)
    if facts.python < (3, 10) or too_new:
        yield Finding("Python", "fail", version, f"Python 3.10 to {'3.12' if engine == 'verl' else '3.14'}")
    else:
        yield Finding("Python", "ok", f"{version}, {facts.system}")
    setup = SETUP_GPU if engine == "verl" else "pip install -c constraints.txt -e ."
    for clash in facts.clashes:
        if clash.installed is not None:
            yield Finding(clash.wanted_by, "fail", f"{clash.requirement} wanted, {clash.installed} is installed", setup)
    missing = [clash.requirement for clash in facts.clashes if clash.installed is None]
    if missing:
        yield Finding("not installed", "fail", ", ".join(missing), setup)
    if not facts.clashes:
        names = ("torch", "transformers", *(("verl", "vllm", "ray") if engine == "verl" else ()))
        seen = ", ".join(f"{name} {facts.packages.get(name, 'not installed')}" for name in names)
        yield Finding("versions", "ok", f"no clash: {seen}")
    told = any("attn_implementation" in override for override in recipe.verl.overrides)
    if engine == "verl" and "flash-attn" not in facts.packages and not told:
        yield Finding(
            "flash-attn", "fail", "not installed; verl loads policies with flash_attention_2 unless told otherwise",
            f"{SETUP_GPU} builds it, or actor_rollout_ref.model.use_remove_padding=false and "
            "verl.overrides=['+actor_rollout_ref.model.override_config.attn_implementation=sdpa']",
        )  # fmt: skip


def _gpus(facts: Facts, recipe: Recipe, engine: str) -> Iterator[Finding]:
    wanted = max(1, recipe.trainer.n_gpus_per_node)
    if facts.gpus is None:
        verdict: Verdict = "fail" if engine == "verl" else "unknown"
        fix = "a machine with NVIDIA GPUs, or ENGINE=local" if engine == "verl" else ""
        yield Finding("GPUs", verdict, facts.unseen.get("GPUs", "none seen"), fix)
    else:
        names = ", ".join(sorted({f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" for gpu in facts.gpus}))
        enough = len(facts.gpus) >= (wanted if engine == "verl" else 1)
        fix = "" if enough else f"trainer.n_gpus_per_node={len(facts.gpus)}, or a machine with more"
        yield Finding("GPUs", "ok" if enough else "fail", f"{len(facts.gpus)} x {names}; {wanted} wanted", fix)
        weak = [gpu for gpu in facts.gpus if _numbers(gpu.compute_capability) < MIN_CAPABILITY]
        for gpu in weak[:1]:
            seen = f"{gpu.name} has compute capability {gpu.compute_capability}"
            yield Finding("bf16", "fail", seen, "GPUs from Ampere (8.0) on")
        busy = [gpu for gpu in facts.gpus if gpu.used > GIB]
        if busy:
            seen = f"{len(busy)} GPUs have {max(gpu.used for gpu in busy) / GIB:.1f} GiB taken by other programs"
            yield Finding("GPUs free", "warn", seen, "nvidia-smi shows which")
        yield from _driver(facts)
    if facts.torch is None:
        yield Finding("torch", "fail", facts.unseen.get("torch", "not installed"), SETUP_GPU)
    elif facts.torch.cuda is None and engine == "verl":
        yield Finding("CUDA", "fail", f"torch {facts.torch.version} is a CPU build", SETUP_GPU)
    elif facts.torch.cuda is None:
        yield Finding("CUDA", "ok", f"torch {facts.torch.version} is a CPU build: the local engine runs on the CPU")
    else:
        works = facts.torch.cuda_works
        seen = f"torch {facts.torch.version}, built for CUDA {facts.torch.cuda}, {'works' if works else 'sees no GPU'}"
        bad: Verdict = "fail" if engine == "verl" else "warn"
        fix = "" if works else "driver and CUDA_VISIBLE_DEVICES; in Docker: --gpus all"
        yield Finding("CUDA", "ok" if works else bad, seen, fix)
    yield _nccl(facts, recipe, engine)


def _driver(facts: Facts) -> Iterator[Finding]:
    versions = {gpu.driver for gpu in facts.gpus or []}
    for driver in sorted(versions):
        cuda = facts.torch.cuda if facts.torch else None
        if cuda is None:
            yield Finding("driver", "unknown", f"{driver}; no CUDA build of torch to compare it with")
            continue
        oldest = MIN_DRIVER.get(_numbers(cuda)[0])
        if oldest is None:
            yield Finding("driver", "unknown", f"{driver}; what CUDA {cuda} needs is not known here")
        elif _numbers(driver)[0] < oldest:
            yield Finding("driver", "fail", f"{driver}; CUDA {cuda} needs {oldest} or newer", "a newer NVIDIA driver")
        else:
            yield Finding("driver", "ok", f"{driver} (CUDA {cuda} needs {oldest})")


def _nccl(facts: Facts, recipe: Recipe, engine: str) -> Finding:
    nodes = recipe.trainer.nnodes
    if engine == "local":
        return Finding("NCCL", "ok", "not needed by the local engine")
    if facts.torch is None or facts.torch.nccl is None:
        return Finding("NCCL", "fail", "torch carries none", SETUP_GPU)
    seen = f"{facts.torch.nccl}; RDMA adapters: {', '.join(facts.infiniband) or 'none'}"
    if nodes > 1 and not facts.infiniband:
        fix = "a test of all nodes: docs/gpu.md; NCCL_SOCKET_IFNAME names the network to use"
        return Finding("NCCL", "warn", f"{seen}; {nodes} nodes would talk over TCP", fix)
    if nodes > 1:
        return Finding(
            "NCCL", "ok", f"{seen}; whether the {nodes} nodes reach each other can't be seen from one of them"
        )
    return Finding("NCCL", "ok", seen)


def _plan(recipe: Recipe, facts: Facts) -> Plan | str:
    """The recipe's plan on this machine's GPUs, or why there is none."""
    from ups_rm.planning.plan import Machine, make_plan, recipe_architectures
    from ups_rm.planning.speed import GPUS

    nodes, per_node = max(1, recipe.trainer.nnodes), max(1, recipe.trainer.n_gpus_per_node)
    smallest = min((gpu.memory for gpu in facts.gpus or []), default=0)
    machine = Machine(gpus=nodes * per_node, nodes=nodes, memory_gb=smallest / 1e9, gpu=GPUS["h200"])
    # a service takes no memory of these GPUs, so any RM will do in its place
    rm = recipe.reward_training.backbone if recipe.reward_model.placement == "http" else None
    try:
        return make_plan(recipe, *recipe_architectures(recipe, None, rm), machine)
    except PlanError as error:
        return str(error).splitlines()[0]


def _rm_place(facts: Facts, recipe: Recipe) -> Finding:
    """Whether there are GPUs where `reward_model.placement` puts the RM workers."""
    what, settings, nodes = "RM workers", recipe.reward_model, max(1, recipe.trainer.nnodes)
    workers, training = settings.num_workers, nodes * max(1, recipe.trainer.n_gpus_per_node)
    if settings.placement == "http":
        return Finding(what, "ok", f"{workers} requests at a time to a service; no device of these")
    if settings.placement == "node":
        seen = f"{workers} GPUs of nodes with the Ray resource {settings.node_resource!r} can't be seen from here"
        return Finding(what, "unknown", seen)
    if settings.placement == "shared":
        fits = workers <= training
        seen = f"{workers} on {training} training GPUs"
        return Finding(what, "ok" if fits else "fail", seen, "" if fits else f"reward_model.num_workers={training}")
    seen = f"{workers} GPUs of their own beside {training} that train"
    if nodes > 1 or facts.gpus is None:
        return Finding(what, "unknown", f"{seen}; not all can be seen from here")
    spare = len(facts.gpus) - training
    fix = f"trainer.n_gpus_per_node={max(1, len(facts.gpus) - workers)}, or reward_model.placement=shared"
    return Finding(what, "ok" if spare >= workers else "fail", f"{seen}; {len(facts.gpus)} are here",
                   "" if spare >= workers else fix)  # fmt: skip


def _memory(facts: Facts, recipe: Recipe, engine: str, plan: Plan | str) -> Iterator[Finding]:
    what = "GPU memory"
    if engine == "local":
        yield Finding(what, "unknown", "counted by `ups-rm train --dry-run` for the local engine")
    elif isinstance(plan, str):
        yield Finding(what, "unknown", plan, "ups-rm plan --policy CONFIG --rm CONFIG")
    elif not facts.gpus:
        need = max(sum(parts.values()) for name, parts in plan.phases.items() if name != "rollout")
        yield Finding(what, "unknown", f"no GPU to compare with; training needs {need / 1e9:.0f} GB per GPU")
    else:
        largest = max(plan.phases, key=lambda name: sum(plan.phases[name].values()))
        need = sum(plan.phases[largest].values())
        seen = f"{largest} needs {need / 1e9:.0f} GB of {plan.layout.gpu_memory / 1e9:.0f} GB"
        if plan.fits:
            yield Finding(what, "ok", seen)
        for problem in plan.problems:
            first, _, fix = problem.partition("\n  fix: ")
            yield Finding(what, "fail", first, fix)
    if not isinstance(plan, str) and engine == "verl":
        need = sum(plan.host_bytes.values())
        if facts.memory is None:
            yield Finding("host memory", "unknown", facts.unseen["memory"])
        else:
            verdict: Verdict = "ok" if facts.memory > need else "fail"
            seen = f"{facts.memory / 1e9:.0f} GB available, {need / 1e9:.0f} GB for the reference and what is offloaded"
            yield Finding("host memory", verdict, seen, "" if verdict == "ok" else "more memory, or less offload")


def _machine(facts: Facts, recipe: Recipe, engine: str, plan: Plan | str) -> Iterator[Finding]:
    for folder, free in facts.disk.items():
        yield _disk(folder, free, recipe, plan)
    if engine == "local":
        yield Finding("ports, shared memory, open files", "ok", "not needed by the local engine")
        return
    if facts.shared_memory is None:
        yield Finding("shared memory", "unknown", facts.unseen.get("shared memory", "not seen"))
    else:
        free = facts.shared_memory
        verdict: Verdict = "ok" if free >= RAY_SHARED_MEMORY else "warn" if free >= GIB else "fail"
        fix = "" if verdict == "ok" else "a larger /dev/shm; in Docker: --shm-size 32g or --ipc host"
        yield Finding("shared memory", verdict, f"{free / GIB:.1f} GiB free in /dev/shm", fix)
    yield from _ports(facts, recipe)
    files: Verdict = "ok" if facts.open_files >= RAY_OPEN_FILES or facts.open_files < 0 else "warn"
    fix = "" if files == "ok" else f"ulimit -n {RAY_OPEN_FILES}"
    yield Finding("open files", files, f"limit {facts.open_files:,}", fix)


def _ports(facts: Facts, recipe: Recipe) -> Iterator[Finding]:
    address = recipe.ray_kwargs.ray_init.address
    if address is not None:
        yield Finding("ports", "unknown", f"a Ray cluster at {address} is joined; `ray status` tells of it")
        return
    for port in facts.ports_in_use:
        seen = f"{port} ({RAY_PORTS[port]}) is taken: by your Ray cluster, or by another program"
        yield Finding("port", "warn", seen, "ray status tells; ray stop ends a cluster of yours that is left over")
    if not facts.ports_in_use:
        yield Finding("ports", "ok", f"{', '.join(map(str, RAY_PORTS))} are free")


def _disk(folder: str, free: int, recipe: Recipe, plan: Plan | str) -> Finding:
    """A checkpoint holds fp32 weights and two moments: 12 bytes per parameter, over all ranks together."""
    what = f"disk: {folder}"
    if isinstance(plan, str):
        return Finding(what, "unknown", f"{free / 1e9:.0f} GB free; the size of a checkpoint is not known: {plan}")
    trained = plan.policy.lora_parameters(plan.layout.lora_rank) if plan.layout.lora_rank else plan.policy.parameters
    one = 12 * trained + 2 * plan.policy.parameters  # and the exported policy, bf16
    keep = recipe.trainer.ckpt_to_keep
    seen = f"{free / 1e9:.0f} GB free, {one / 1e9:.0f} GB for a checkpoint and the trained policy"
    if free < one:
        return Finding(what, "fail", seen, "another trainer.default_local_dir")
    if recipe.trainer.save_freq > 0 and keep is None:
        return Finding(what, "warn", f"{seen}; all checkpoints are kept", "trainer.max_actor_ckpt_to_keep=2")
    return Finding(what, "ok", seen)


def _models(facts: Facts, recipe: Recipe) -> Iterator[Finding]:
    yield _model("policy", recipe.actor_rollout_ref.model.path)
    entries = recipe.reward_model.asked()
    if not recipe.reward_model.entries():
        yield Finding("reward model", "ok", "made by the run")
    for entry in entries:
        if entry.path:
            yield _model("reward model", entry.path)
        elif entry.url:
            yield _service(entry, facts)
        else:
            yield Finding("reward model", "unknown", f"{entry.callable} is not called here")
    for file in _prompt_files(recipe):
        there = Path(file).expanduser().is_file()
        fix = "" if there else "ups-rm data prepare"
        yield Finding("prompts", "ok" if there else "warn", f"{file} is {'there' if there else 'not there yet'}", fix)


def _service(entry: RewardModelModel, facts: Facts) -> Finding:
    what, fact = "reward service", facts.services.get(entry.url)
    if fact is None:
        return Finding(what, "unknown", f"{entry.url} was not asked")
    token = f"token: {entry.token_env or 'UPS_RM_TOKEN, if that is set'}"
    if not fact.problem:
        return Finding(what, "ok", f"{entry.url} is healthy and scored a conversation ({token})")
    if fact.health != "HTTP 200":
        seen = f"{entry.url} is not a healthy reward server: GET /health: {fact.health}"
        return Finding(what, "fail", seen, "ups-rm rm serve FOLDER there; reward_model.model.url=http://HOST:PORT")
    problem, _, fix = fact.problem.partition("\n  fix: ")
    fix = fix or "the log of `ups-rm rm serve`; docs/guides/rm-server.md"
    return Finding(what, "fail", f"{entry.url} is healthy, but ({token}): {problem}", fix)


def _model(what: str, name: str) -> Finding:
    """A folder with config.json and weights; a hub id is a warning, for nothing is downloaded here."""
    folder = cache_folder() / "models" / DEFAULT_MODEL if name == DEFAULT_MODEL else Path(name).expanduser()
    if (folder / "config.json").is_file():
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        if not weights:
            return Finding(what, "fail", f"{folder} has a config.json and no weights", "download it anew")
        return Finding(what, "ok", f"{folder}, {sum(file.stat().st_size for file in weights) / 1e9:.2f} GB of weights")
    if name == DEFAULT_MODEL:
        return Finding(what, "warn", f"{name} is not here yet", "ups-rm models fetch, or the run fetches it")
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Finding(what, "fail", f"no config.json at {folder}", "hf download OWNER/NAME --local-dir FOLDER")
    seen = f"{name} is no folder here: a hub id that the run downloads on every node"
    return Finding(what, "warn", seen, f"hf download {name} --local-dir FOLDER")


def _prompt_files(recipe: Recipe) -> list[str]:
    from ups_rm.recipe import as_list

    return [*as_list(recipe.data.train_files), *as_list(recipe.data.val_files)]


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
