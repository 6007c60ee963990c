"""`ups-rm plan`: memory, speed and growth of a recipe on GPUs that nobody has to have."""

from __future__ import annotations

from typing import Annotated

import typer

from ups_rm.cli.run import Overrides, RecipeName
from ups_rm.exits import CHECK_FAILED

EPILOG = (
    "Example: ups-rm plan --recipe pku_saferlhf_qwen2_7b_8gpu --gpus 8 --gpu-mem 140      "
    "Two machines, the RM on a third: ups-rm plan --recipe pku_saferlhf_qwen2_7b_2nodes --gpu-mem 140 "
    "reward_model.placement=node"
)


def plan(
    gpu_mem: Annotated[float, typer.Option(help="GB per GPU.")],
    gpus: Annotated[
        int | None, typer.Option(help="GPUs per node that train and roll out; trainer.n_gpus_per_node if not given.")
    ] = None,
    overrides: Overrides = None,
    recipe: RecipeName = "quickstart",
    nodes: Annotated[int | None, typer.Option(help="Machines; trainer.nnodes if not given.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Folder with config.json, or a packaged description: qwen2-7b-instruct, llama3-8b, "
            "smollm2-135m-instruct. The recipe's if not given."
        ),
    ] = None,
    rm: Annotated[
        str | None, typer.Option("--rm", help="The same for the RM; a language model gets the recipe's head.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a100, h100, h200, h20, b200 or mi300x; h100 up to 100 GB, else h200.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="Peak bf16 TFLOP/s per GPU instead of the data sheet's.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in TB/s instead of the data sheet's.")
    ] = None,
    link: Annotated[float | None, typer.Option(help="NVLink GB/s per GPU, one way.")] = None,
    network: Annotated[float | None, typer.Option(help="Network GB/s per GPU.")] = None,
    rm_gpus: Annotated[
        int | None,
        typer.Option(
            help="GPUs of the RM's own, beside the others, or of the service; 0: a worker on every training GPU. "
            "reward_model.placement and num_workers if not given."
        ),
    ] = None,
    prompt_tokens: Annotated[float, typer.Option(help="Mean length of prompts.")] = 64,
    response_tokens: Annotated[float, typer.Option(help="Mean length of replies.")] = 300,
    json_out: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What a recipe needs per GPU, what fits, how long a step takes, and what becomes of it on 64 to 4,096 GPUs.

    Needs no weights and no GPU.
    """
    import json
    from dataclasses import replace

    from ups_rm.console import console
    from ups_rm.errors import PlanError
    from ups_rm.planning import speed
    from ups_rm.planning.plan import Machine, make_plan, recipe_architectures
    from ups_rm.planning.report import print_plan
    from ups_rm.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [], engine=None)
    name = gpu or ("h100" if gpu_mem <= 100 else "h200")
    if name not in speed.GPUS:
        raise PlanError(f"no data sheet for GPU {name!r}; known: {', '.join(speed.GPUS)}\n  fix: --tflops, --bandwidth")
    sheet = speed.GPUS[name]
    sheet = replace(
        sheet,
        flops=sheet.flops if tflops is None else tflops * 1e12,
        memory_bandwidth=sheet.memory_bandwidth if bandwidth is None else bandwidth * 1e12,
        link=sheet.link if link is None else link * 1e9,
        network=sheet.network if network is None else network * 1e9,
    )
    machines = nodes or settings.trainer.nnodes
    made = make_plan(
        settings,
        *recipe_architectures(settings, policy, rm),
        Machine(
            gpus=(gpus or max(1, settings.trainer.n_gpus_per_node)) * machines,
            nodes=machines,
            memory_gb=gpu_mem,
            gpu=sheet,
            rm_gpus=rm_gpus,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
        ),
    )
    if json_out:
        typer.echo(json.dumps(made.as_dict(), indent=1))
    else:
        print_plan(made, console)
    if not made.fits:
        raise typer.Exit(CHECK_FAILED)
