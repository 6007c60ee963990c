"""A decode step recorded once as a CUDA graph and replayed for every token.

A step launches some hundred small kernels, which on a GPU take longer to launch than to run. A graph wants shapes and
addresses that stay, so each step computes the whole grid of the cache (`group_cache`), rows that have ended included,
and is recorded anew only when the grid shrinks. Never run on a GPU yet; UPS_RM_CUDA_GRAPHS=0 goes without.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ups_rm.errors import RunError
from ups_rm.local.group_cache import GroupCache

Replay = Callable[[], Tensor]


def cuda_graph(run: Replay) -> Replay:
    """`run`, recorded: what is returned replays it and gives the same tensor each time, overwritten."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries take their workspaces at the first call, which a graph may not hold
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def recorder(device: torch.device) -> Callable[[Replay], Replay] | None:
    """How steps on that device are recorded; None where they are not."""
    return cuda_graph if device.type == "cuda" and os.environ.get("UPS_RM_CUDA_GRAPHS") != "0" else None


class GraphedSteps:
    """The decode steps of one rollout.

    Args:
        decode: token and position of every row of the grid (C,) each and the reply position (1,), to hidden (C, H).
        cache: what `decode` writes to and attends to; its grid may shrink between steps.
        record: see `cuda_graph`. What it runs is right at once, so running it more often changes nothing.
    """

    def __init__(
        self, decode: Callable[[Tensor, Tensor, Tensor], Tensor], cache: GroupCache, record: Callable[[Replay], Replay]
    ) -> None:
        self.decode, self.cache, self.record = decode, cache, record
        self.keys: Tensor | None = None

    def __call__(self, token: Tensor, position: Tensor, t: int) -> Tensor:
        """Token and position of the live rows (b,), the reply position -> hidden (b, H).

        Raises:
            RunError: the step can't be recorded, for another reason than memory.
        """
        cells, anew = self.cache.cells, self.keys is not self.cache.keys
        if anew:  # the first step, or the grid has shrunk: other shapes and addresses
            self.keys = self.cache.keys
            self.token = token.new_zeros(self.cache.groups * self.cache.columns)
            self.position = torch.zeros_like(self.token)
            self.t = token.new_zeros(1)
        self.token[cells], self.position[cells] = token, position
        self.t.fill_(t)
        if anew:
            try:
                self.replay = self.record(lambda: self.decode(self.token, self.position, self.t))
            except torch.OutOfMemoryError:  # told as such, with its own way out
                raise
            except RuntimeError as error:
                raise RunError(
                    f"a decode step can't be recorded as a CUDA graph: {error}\n  fix: UPS_RM_CUDA_GRAPHS=0"
                ) from error
        return self.replay()[cells]
