"""A saved MLP head, in either of its two forms, as checked tensors.

Ours: a folder with `head.safetensors` (`layers.{i}.weight|bias`, `output_layer.weight|bias`) and `head.json`
(hidden_dims, temperature, and what it was trained on). The original: `best_model.pth`, a state dict with these names,
beside a `config.yaml` with `hidden_dim` (256, "256,64" or [256, 64]).

A folder of `rm train --target both` has the head for safety so, and in its folder `helpfulness` the other one, whose
head.json says `"output": "helpfulness"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RMError
from ups_rm.model_files import refused_pickle
from ups_rm.reward.native import hidden_dim_text

if TYPE_CHECKING:
    import torch


HELPFULNESS = "helpfulness"
"""The name of the second head: in head.json, in config.json's `heads`, and of its folder beside the first one."""


@dataclass(frozen=True)
class HeadWeights:
    """An MLP head as read from disk: float32 tensors, widths of its hidden layers, and what its description says."""

    tensors: dict[str, torch.Tensor]
    hidden_dims: list[int]
    temperature: float = 1.0
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its logit says: unsafety or helpfulness."""
        return HELPFULNESS if self.info.get("output") == HELPFULNESS else "unsafety"


Heads = Mapping[str, HeadWeights]
"""The heads of one RM folder by name, in the order of its logits."""


def read_heads(head: Path | str, helpfulness: Path | str | None = None) -> dict[str, HeadWeights]:
    """The head in `head`, and that for helpfulness: from `helpfulness`, or the folder of that name in `head`.

    Raises:
        RMError: as `read_head`; two heads of one kind, or that can't be asked about the same hidden state.
    """
    first = read_head(head)
    folder = Path(head).expanduser()
    beside = (folder.parent if folder.is_file() else folder) / HELPFULNESS
    if helpfulness is None and (first.name == HELPFULNESS or not beside.is_dir()):
        return {first.name: first}
    place = Path(helpfulness).expanduser() if helpfulness is not None else beside
    second = read_head(place)
    if (first.name, second.name) != ("unsafety", HELPFULNESS):
        raise RMError(
            f"{head} is a head for {first.name}, {place} one for {second.name}: an RM folder has one for unsafety, "
            "then one for helpfulness\n  fix: --head of `rm train` (--target safety), --helpfulness-head of "
            "`rm train --target helpfulness`"
        )
    for what, one, other in (
        ("hidden_dims", first.hidden_dims, second.hidden_dims),
        *((name, first.info.get(name), second.info.get(name)) for name in ("backbone", "pooling", "render")),
    ):
        if one != other:
            raise RMError(
                f"the heads in {head} and {place} differ in {what}: {one!r} and {other!r}; one forward pass can't "
                "serve both\n  fix: train both on one features file: ups-rm rm train --target both"
            )
    return {first.name: first, second.name: second}


def read_head(head: Path | str) -> HeadWeights:
    """The head in `head`: a folder, or one of the files in it.

    Raises:
        RMError: no head there; names or shapes that are not those of `hidden_dims`; values that are not finite.
    """
    folder = Path(head).expanduser()
    folder = folder.parent if folder.is_file() else folder
    if (folder / "head.safetensors").is_file():
        weights = _read_our_head(folder)
    elif (folder / "best_model.pth").is_file():
        weights = _read_original_head(folder)
    else:
        raise RMError(
            f"no head at {folder}: expected head.safetensors and head.json (from `ups-rm rm train`), "
            "or best_model.pth and config.yaml with hidden_dim"
        )
    _check_head(folder, weights)
    return weights


def _read_our_head(folder: Path) -> HeadWeights:
    from safetensors.torch import load_file

    info = _read_json(folder / "head.json")
    if "hidden_dims" not in info:
        raise RMError(f"{folder}/head.json: field hidden_dims is missing")
    dims = _dims(info.pop("hidden_dims"), folder / "head.json", "hidden_dims")
    temperature = info.pop("temperature", 1.0)
    temperature = 1.0 if temperature is None else temperature
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise RMError(f"{folder}/head.json: temperature is {temperature!r}, expected a number above 0")
    tensors = {name: tensor.float().clone() for name, tensor in load_file(folder / "head.safetensors").items()}
    return HeadWeights(tensors, dims, float(temperature), info)


def _read_original_head(folder: Path) -> HeadWeights:
    import torch
    import yaml

    settings_file = folder / "config.yaml"
    if not settings_file.is_file():
        raise RMError(f"{folder} has best_model.pth but no config.yaml, which must hold hidden_dim (e.g. '256,64')")
    try:
        settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RMError(f"{settings_file} is not YAML: {error}") from error
    if not isinstance(settings, dict) or "hidden_dim" not in settings:
        raise RMError(f"{settings_file}: field hidden_dim is missing")
    dims = _dims(settings["hidden_dim"], settings_file, "hidden_dim")
    try:
        state = torch.load(folder / "best_model.pth", map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own errors
        reason = refused_pickle(error) or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise RMError(f"{folder}/best_model.pth can't be read as weights only: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RMError(f"{folder}/best_model.pth is not a state dict of tensors")
    # what the head was trained on, without the paths of somebody's machine
    told = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool)) and "/" not in str(v)}
    labels = str(settings.get("data_name", "unknown"))
    return HeadWeights(
        {k: v.float().clone() for k, v in state.items()}, dims, 1.0, {"labels": labels, "original_config": told}
    )


def _check_head(folder: Path, weights: HeadWeights) -> None:
    import torch

    layers = [f"layers.{i}" for i in range(len(weights.hidden_dims))] + ["output_layer"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    missing, unexpected = sorted(expected - set(weights.tensors)), sorted(set(weights.tensors) - expected)
    if missing or unexpected:
        raise RMError(
            f"the head in {folder} does not fit hidden_dims {weights.hidden_dims}: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'}"
        )
    width = weights.tensors[f"{layers[0]}.weight"].shape[-1]
    for layer, out in zip(layers, [*weights.hidden_dims, 1], strict=True):
        for name, shape in ((f"{layer}.weight", (out, width)), (f"{layer}.bias", (out,))):
            tensor = weights.tensors[name]
            if tuple(tensor.shape) != shape:
                raise RMError(f"{folder}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if not torch.isfinite(tensor).all():
                raise RMError(f"{folder}: {name} has values that are not finite")
        width = out


def folded(weights: HeadWeights) -> dict[str, torch.Tensor]:
    """The head's tensors with the temperature folded into the output layer: logit / T. Fresh, aligned memory."""
    return {
        name: tensor / weights.temperature if name.startswith("output_layer.") else tensor.clone()
        for name, tensor in weights.tensors.items()
    }


def _dims(value: Any, file: Path, name: str) -> list[int]:
    try:
        return [int(width) for width in hidden_dim_text(value).split(",") if width]
    except RMError:
        raise RMError(f"{file}: {name} is {value!r}, expected widths such as '256,64'") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RMError(f"{path} is missing: it describes the head beside it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RMError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RMError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
