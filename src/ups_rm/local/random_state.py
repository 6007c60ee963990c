"""The global random generators of Python, NumPy and torch.

The engine itself draws from none of them: every draw of its own is a function of the seed, the step and the row. They
are kept for what else runs in the process, such as a reward function that draws.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Start all of them from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every CUDA device too


def random_states() -> dict[str, Any]:
    """Their states, as plain lists and tensors that `torch.load(weights_only=True)` takes."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [str(name), [int(key) for key in keys], *(float(value) for value in rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from what `random_states` gave; CUDA's only where there are as many devices."""
    version = random.getstate()[0]
    random.setstate((version, tuple(states["python"]), states["python_gauss"]))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
