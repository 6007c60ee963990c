"""python -m benchmarks NAME [--pairs N] [--json FILE] [--profile FILE]: ours beside a peer's in the same run.

NAME is a module of this folder with `run(pairs) -> list[Result]` (`grpo_step` also takes where its trace goes), or
`all`. The table goes to the terminal, the figures to FILE.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks.result import Result

BENCHMARKS = ("rm_serve",)


def show(one: Result) -> str:
    """A result as a line of text."""
    peer = f", {one.peer_name}: {one.peer:.4g}" if one.peer is not None else ""
    ratio = f", ratio {one.ratio:.3f}" if one.ratio is not None else ""
    required = f" (required {one.required})" if one.required is not None else ""
    floor = f", floor {one.floor:.4g}, {one.floor_share:.0%} of it" if one.floor_share is not None else ""
    return f"{one.name}: {one.ours:.4g} {one.unit}{peer}{ratio}{required}{floor}"


def main() -> None:
    """Run one or all and show them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=(*BENCHMARKS, "all"))
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs after warm-up")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(
        "--profile", type=Path, help="grpo_step only: a trace of one of our steps, for chrome://tracing"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on shared cores both sides stall without it
    results: list[Result] = []
    for name in BENCHMARKS if options.name == "all" else (options.name,):
        extra = {"profile": options.profile} if name == "grpo_step" and options.profile else {}
        found = importlib.import_module(f"benchmarks.{name}").run(options.pairs, **extra)
        print("\n".join(show(one) for one in found), flush=True)
        results += found
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
