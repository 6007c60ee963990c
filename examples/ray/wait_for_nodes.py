"""Wait until a Ray cluster has so many nodes with so many GPUs each, or say what is missing.

python examples/ray/wait_for_nodes.py --address 10.0.0.1:6379 --nodes 2 --gpus 8
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any


def missing(nodes: list[dict[str, Any]], wanted: int, gpus: float) -> str | None:
    """What `ray.nodes()` lacks; None: nothing.

    Args:
        nodes: as ray.nodes() lists them. wanted: nodes with at least `gpus` GPUs.
    """
    alive = [node for node in nodes if node["Alive"]]
    ready = [node for node in alive if node["Resources"].get("GPU", 0) >= gpus]
    if len(ready) >= wanted:
        return None
    shown = ", ".join(f"{node['NodeManagerHostname']}: {node['Resources'].get('GPU', 0):g} GPUs" for node in alive)
    return f"{len(ready)} of {wanted} nodes have {gpus:g} GPUs ({shown or 'no node is there'})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--address", default="auto")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=float, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    import ray

    ray.init(address=options.address, log_to_driver=False)
    end = time.monotonic() + options.seconds
    while (lack := missing(ray.nodes(), options.nodes, options.gpus)) is not None:
        if time.monotonic() > end:
            print(
                f"after {options.seconds:g} s {lack}; look at the output of `ray start` on the others", file=sys.stderr
            )
            return 1
        time.sleep(min(2.0, options.seconds))
    print(f"{options.nodes} nodes with {options.gpus:g} GPUs are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
