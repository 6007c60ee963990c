"""What every process of a verl run imports first (verl's own hook, VERL_USE_EXTERNAL_MODULES)."""

from __future__ import annotations

from importlib.util import find_spec


def complete_trl() -> None:
    """Give TRL the class that verl 0.9.1 imports wherever TRL is installed, and that TRL has dropped.

    verl touches it for value models only; without it no policy loads beside a current TRL.
    """
    if find_spec("trl") is None:
        return
    import trl

    if not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
        trl.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})


complete_trl()
