"""`ups-rm ... --engine verl` on a CPU: the recipe settings and the environment that the shims need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT = 600.0
"""Seconds: a bound for a run that hangs; two steps take about 50 on two idle cores."""


def settings(workers: int = 1, *more: str) -> list[str]:
    """Recipe overrides: fp32 on `workers` CPU processes, generation by `verl_cpu.rollout`; more of verl's own."""
    quiet = [
        f"+ray_kwargs.ray_init.num_gpus={workers}",  # a logical resource: verl places its workers by GPU
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        "actor_rollout_ref.model.external_lib=verl_cpu.rollout",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.ref.use_torch_compile=False",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        *more,
    ]
    return [
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={workers}",
        "actor_rollout_ref.rollout.name=cpu_hf",
        "actor_rollout_ref.rollout.free_cache_engine=false",
        "actor_rollout_ref.model.use_remove_padding=false",
        f"ray_kwargs.ray_init.num_cpus={8 + 4 * workers}",
        "verl.external_modules=[verl_cpu.platform,verl_cpu.tokens]",
        f"verl.time_limit={TIMEOUT - 30}",
        f"verl.overrides=[{','.join(quiet)}]",
    ]


def environment(dump: Path | None, hold: int | None) -> dict[str, str]:
    """What the shims read; `dump`: where sampled token ids go, `hold`: the weights with which a rollout stops."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        "VERL_PLATFORM": "cpu",
        "VERL_CPU_DUMP": str(dump or os.devnull),
        "VERL_CPU_TOKENS": str(tokens_file(dump) if dump else os.devnull),
        "VERL_CPU_HOLD": str(hold),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def tokens_file(dump: Path) -> Path:
    """Where `verl_cpu.tokens` keeps what verl computed of the replies in `dump`."""
    return dump.with_suffix(".tokens")


def ups_rm(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `ups-rm ARGUMENTS`; see `start`."""
    return start([sys.executable, "-m", "ups_rm", *arguments], **settings)


def grpo_script(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `ENGINE=verl bash scripts/run_grpo_pku_saferlhf.sh ARGUMENTS` in this environment; see `start`."""
    chosen = {"ENGINE": "verl", "UPS_RM_VENV": sys.prefix}
    return start(["bash", TESTS.parent / "scripts/run_grpo_pku_saferlhf.sh", *arguments], **settings, **chosen)


def start(
    words: Sequence[str | Path],
    *,
    dump: Path | None = None,
    hold: int | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; stdout and stderr together. On a timeout it may clean up.

    Args:
        meanwhile: called with the running process, in a thread; to return when the process has ended.
        variables: of the environment, besides those of the shims.
    """
    command, env = [*map(str, words)], environment(dump, hold) | variables
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(meanwhile, process) if meanwhile else None
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            raise
        if beside is not None:
            beside.result()
    return subprocess.CompletedProcess(command, process.returncode, output)


def processes_of(run_folder: Path) -> list[psutil.Process]:
    """All that was started for a run, by what verl's processes have in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VERL_FILE_LOGGER_PATH", "").startswith(f"{run_folder}/"):
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return found
