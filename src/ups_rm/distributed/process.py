"""What every process of a verl run imports first (verl's own hook, VERL_USE_EXTERNAL_MODULES).

Most of these processes (rollout servers, reward loop, FSDP workers) never ask for a trainer. So ours, which brings
verl's trainers with it, is registered only where verl's own are imported: seconds less for each of the others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

from ups_rm.distributed.launch import LAUNCHER

TRAINERS = "verl.trainer.ppo.v1"
"""Where verl's trainers and their registry are."""
OURS = "ups_rm.distributed.verl_trainer"
"""What `trainer.v1.trainer_mode=ups_rm` and the estimator `ups_rm` are known by."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Follower(MetaPathFinder):
    """On `sys.meta_path`: once the module `first` was imported, `then` is imported as well."""

    def __init__(self, first: str, then: str) -> None:
        self.first, self.then = first, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.first else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            import_module(self.then)

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def follow(first: str, then: str) -> None:
    """Import the module `then` as soon as `first` is imported; now, if it is already."""
    if first in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, Follower(first, then))


def complete_trl() -> None:
    """Give TRL the class that verl 0.9.1 imports wherever TRL is installed, and that TRL has dropped.

    verl touches it for value models only; without it no policy loads beside a current TRL.
    """
    if find_spec("trl") is None:
        return
    import trl

    if not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
        trl.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})


def end_with_launcher() -> None:
    """In verl's driver: have the kernel end it with the command that started it, even if that is killed outright.

    Ray's own processes end with the driver.
    """
    launcher = os.environ.get(LAUNCHER, "")
    if not sys.platform.startswith("linux") or launcher != str(os.getppid()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher != str(os.getppid()):  # it died meanwhile
        sys.exit(1)


complete_trl()
follow(TRAINERS, then=OURS)
end_with_launcher()
