"""python -m benchmarks NAME [--pairs N] [--json FILE]: ours beside a peer's in the same run.

NAME is a module of this folder with `run(pairs) -> list[Result]` (`grpo_step` has cases and a trace, see --help), or
`all`. The table goes to the terminal, the figures to FILE. `rm_quality` has a command line of its own, and needs data:
`python -m benchmarks rm_quality --help`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.result import Result
from ups_rm.device import rest_idle_threads

BENCHMARKS = ("grpo_step", "kernels", "rollout", "rm_scoring", "rm_features", "prepare", "prepare_curve",
              "step_curve", "trl_settings", "memory", "rm_serve", "checkpoint")  # fmt: skip
COMMANDS = ("rm_quality",)
"""Modules with `main(arguments) -> int` instead: other questions than how fast we are."""


def show(one: Result) -> str:
    """A result as a line of text."""
    peer = f", {one.peer_name}: {one.peer:.4g}" if one.peer is not None else ""
    ratio = f", ratio {one.ratio:.3f}" if one.ratio is not None else ""
    required = f" (required {one.required})" if one.required is not None else ""
    floor = f", floor {one.floor:.4g}, {one.floor_share:.0%} of it" if one.floor_share is not None else ""
    return f"{one.name}: {one.ours:.4g} {one.unit}{peer}{ratio}{required}{floor}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one or all and show them; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        return int(importlib.import_module(f"benchmarks.{given[0]}").main(given[1:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=(*BENCHMARKS, *COMMANDS, "all"))
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs after warm-up")
    parser.add_argument("--json", type=Path, help="where the figures go")
    step = parser.add_argument_group("grpo_step")
    step.add_argument("--only", default="", help="cases whose name has this text")
    step.add_argument("--profile", type=Path, help="a trace of one of our steps, for chrome://tracing")
    options = parser.parse_args(given)
    rest_idle_threads()  # for both sides: on shared cores they stall without it
    results: list[Result] = []
    for name in BENCHMARKS if options.name == "all" else (options.name,):
        extra = {"only": options.only, "profile": options.profile} if name == "grpo_step" else {}
        found = importlib.import_module(f"benchmarks.{name}").run(options.pairs, **extra)
        print("\n".join(show(one) for one in found), flush=True)
        results += found
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
