"""What this machine is: Python, GPUs, memory, disk, ports, packages. Only looks; nothing is judged or changed here.

Every probe answers on any machine. A fact that can't be had is None, with the reason in `Facts.unseen`.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from ups_rm.recipe import RewardModelModel

RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard", 10001: "Ray's clients"}
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version,compute_cap")
SMI_FORMAT = "--format=csv,noheader,nounits"
HEALTH_S = 5.0
"""Within which a reward service must say that it lives."""


@dataclass(frozen=True)
class GpuFact:
    """One GPU as nvidia-smi shows it."""

    name: str
    memory: int
    """Bytes."""
    used: int
    """Bytes that other programs have taken."""
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class TorchFact:
    """The installed torch, as it sees the machine."""

    version: str
    cuda: str | None
    """CUDA version that it was built with; None: a CPU build."""
    cuda_works: bool
    nccl: str | None
    """NCCL version that it carries; None: none."""


@dataclass(frozen=True)
class Clash:
    """A requirement of an installed package that the environment does not meet."""

    wanted_by: str
    requirement: str
    installed: str | None
    """None: not installed."""


@dataclass(frozen=True)
class ServiceFact:
    """What a reward service answered."""

    health: str
    """To `GET /health`, which needs no token: "HTTP 200", or why nothing came."""
    problem: str
    """Why it did not score one conversation; "": it did."""


@dataclass(frozen=True)
class Facts:
    """All that was seen. Sizes in bytes."""

    python: tuple[int, int, int]
    system: str
    """As in "Linux x86_64"."""
    cpus: int
    memory: int | None
    """Host memory that is available."""
    gpus: list[GpuFact] | None
    """None: nvidia-smi could not be asked."""
    torch: TorchFact | None
    packages: dict[str, str]
    """Installed distributions by normalised name."""
    clashes: list[Clash]
    shared_memory: int | None
    """Free space of /dev/shm."""
    disk: dict[str, int]
    """Free space by path."""
    ports_in_use: list[int]
    """Of RAY_PORTS."""
    open_files: int
    """Soft limit of this process."""
    infiniband: list[str]
    """Network adapters for RDMA."""
    services: dict[str, ServiceFact] = field(default_factory=dict)
    """Reward services by address."""
    unseen: dict[str, str] = field(default_factory=dict)
    """What could not be looked at, and why."""


def look(
    folders: Iterable[Path], wanted: Iterable[str] = ("ups-rm",), services: Iterable[RewardModelModel] = ()
) -> Facts:
    """Look at this machine.

    Args:
        folders: where free disk space matters (the nearest existing parent is asked).
        wanted: packages whose requirements have to be met, with extras, e.g. "verl[vllm]".
        services: reward models behind a `url`, which are asked for one score.
    """
    unseen: dict[str, str] = {}
    packages = {
        str(canonicalize_name(name)): distribution.version
        for distribution in metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    return Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_available_memory(unseen),
        gpus=_gpus(unseen),
        torch=_torch(unseen),
        packages=packages,
        clashes=[clash for name in wanted for clash in find_clashes(name)],
        shared_memory=_free(Path("/dev/shm"), unseen),
        disk={str(folder): shutil.disk_usage(_existing(folder)).free for folder in folders},
        ports_in_use=[port for port in RAY_PORTS if not _port_is_free(port)],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        services={service.url: _service(service) for service in services},
        infiniband=sorted(entry.name for entry in _entries(Path("/sys/class/infiniband"))),
        unseen=unseen,
    )


def find_clashes(wanted: str) -> list[Clash]:
    """Requirements of a package (extras as in "verl[vllm]") that are not installed, or installed in another version.

    Read from the installed metadata of the package itself, so it stays true for other versions of it. An extra that
    refers to the package's other extras ("verl[verl-core]") is followed; dependencies' own requirements are not.
    """
    asked = Requirement(wanted)
    try:
        lines = metadata.requires(asked.name) or []
    except metadata.PackageNotFoundError:
        return [Clash("UPS-RM", wanted, None)]
    found: list[Clash] = []
    extras, done = {"", *asked.extras}, set[str]()
    while extras - done:
        extra = min(extras - done)
        done.add(extra)
        for requirement in map(Requirement, lines):
            if requirement.marker is None and extra:
                continue  # said once, with the empty extra
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if canonicalize_name(requirement.name) == canonicalize_name(asked.name):
                extras |= requirement.extras
                continue
            installed = _installed(requirement.name)
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                requirement.marker = None
                clash = Clash(wanted, str(requirement), installed)
                found += [clash] if clash not in found else []
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _service(service: RewardModelModel) -> ServiceFact:
    """Whether a reward service lives, and whether it scores for who has the recipe's token."""
    from ups_rm.errors import UpsRmError
    from ups_rm.reward.client import health
    from ups_rm.reward.open import ask_service

    alive = health(service.url, HEALTH_S)
    if alive != "HTTP 200":
        return ServiceFact(alive, "it was not asked for a score")
    try:
        ask_service(service)
    except UpsRmError as error:
        return ServiceFact(alive, str(error))
    return ServiceFact(alive, "")


def _gpus(unseen: dict[str, str]) -> list[GpuFact] | None:
    try:
        done = subprocess.run([*NVIDIA_SMI, SMI_FORMAT], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        unseen["GPUs"] = "nvidia-smi is not there: no NVIDIA driver, or a container without it"
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        unseen["GPUs"] = f"nvidia-smi does not answer: {error}"
        return None
    if done.returncode != 0:
        unseen["GPUs"] = f"nvidia-smi failed: {(done.stderr or done.stdout).strip().splitlines()[:1]}"
        return None
    found = []
    for line in done.stdout.splitlines():
        name, total, used, driver, capability = (part.strip() for part in line.split(","))
        found.append(GpuFact(name, int(total) << 20, int(used) << 20, driver, capability))
    return found


def _torch(unseen: dict[str, str]) -> TorchFact | None:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library that does not load
        unseen["torch"] = f"torch does not load: {error}"
        return None
    cuda = torch.version.cuda
    nccl = None
    if cuda is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return TorchFact(torch.__version__, cuda, torch.cuda.is_available(), nccl)


def _available_memory(unseen: dict[str, str]) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        unseen["memory"] = "/proc/meminfo is not there"
        return None


def _free(path: Path, unseen: dict[str, str]) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        unseen["shared memory"] = f"{path} can't be asked: {error}"
        return None


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
