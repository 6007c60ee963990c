"""python -m benchmarks NAME [--json FILE]: one benchmark, ours beside a peer's in the same run.

NAME is a module of this folder with `run() -> list[Result]`. The table goes to the terminal, the figures to FILE.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

BENCHMARKS = ("rm_serve",)


def main() -> None:
    """Run one and show it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    results = importlib.import_module(f"benchmarks.{options.name}").run()
    for one in results:
        peer = f", {one.peer_name}: {one.peer:.4g}" if one.peer is not None else ""
        ratio = f", ratio {one.ratio:.3f}" if one.ratio is not None else ""
        floor = f" (floor {one.floor})" if one.floor is not None else ""
        print(f"{one.name}: {one.ours:.4g} {one.unit}{peer}{ratio}{floor}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
