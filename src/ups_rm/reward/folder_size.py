"""Does config.json describe a model of about the size of the folder's weights? Asked before anything is built.

A slip in config.json (`"num_hidden_layers": 320000`) would otherwise build layers, or draw weights that the files don't
have, until memory or patience ends. What fits less exactly is told weight by weight after loading (native.py).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ups_rm.errors import RMError

if TYPE_CHECKING:
    from ups_rm.reward.myrm.configuration_myrm import MyRMConfig

FACTOR = 10
SPARE = 2**24
"""Weights that are nothing to worry about, in numbers."""
_LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")


def check_size(folder: Path, config: MyRMConfig) -> None:
    """Nothing where the folder has no safetensors: that is told when they are loaded.

    Raises:
        RMError: config.json describes more than FACTOR times the layers or weights that the files hold.
    """
    import torch

    from ups_rm.reward.myrm.modeling_myrm import MyRMForTokenClassification

    stored = _stored_shapes(folder)
    if not stored:
        return
    layers = 1 + max((int(found[1]) for name in stored for found in [_LAYER.search(f".{name}")] if found), default=0)
    text_config = config.backbone_config().get_text_config()
    described = getattr(text_config, "num_hidden_layers", 0)
    if isinstance(described, int) and described > FACTOR * layers:
        raise RMError(
            f"{folder}/config.json: num_hidden_layers is {described}, the weights have {layers}\n"
            "  fix: the config.json that the weights were saved with"
        )
    with torch.device("meta"):  # shapes without memory
        wanted = sum(weight.numel() for weight in MyRMForTokenClassification(config).parameters())
    held = sum(map(math.prod, stored.values()))
    if wanted > FACTOR * held + SPARE:
        raise RMError(
            f"{folder}/config.json describes a model of {wanted:,} weights, the files hold {held:,}\n"
            "  fix: the config.json that the weights were saved with; look at vocab_size, hidden_size, "
            "intermediate_size, head_dim, hidden_dim_str"
        )


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor in the folder's safetensors, of which only the heads are read."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                shapes[name] = tensors.get_slice(name).get_shape()
    return shapes
