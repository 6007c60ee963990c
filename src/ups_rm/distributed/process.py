"""What every process of a verl run imports first (verl's own hook, VERL_USE_EXTERNAL_MODULES)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.util import find_spec

from ups_rm.distributed.launch import LAUNCHER

PR_SET_PDEATHSIG = 1  # of Linux's prctl


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
end_with_launcher()
