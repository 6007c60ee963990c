"""Labelled hidden states on disk and in memory: one safetensors file per backbone and source.

Distinct (prompt, response) texts come first, rows point to them by index. No text is in the file: a prompt is known by
a hash, so that files of several sources can be joined and still be split by prompt. A text that occurs in several rows
has the mean of its labels (a reply labelled both safe and unsafe has unsafe = 0.5).

N texts, M rows, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_rm.durable import check_file, publishing
from ups_rm.errors import RMError
from ups_rm.reward.render import RenderPolicy

FORMAT = "ups-rm-features-1"
UNKNOWN = -1


@dataclass(frozen=True)
class FeatureInfo:
    """What the hidden states are of: everything that a head must be asked with, and where the rows came from."""

    backbone: str
    fingerprint: str
    hidden_size: int
    dtype: str
    render: RenderPolicy
    chat_template_sha256: str
    categories: tuple[str, ...]
    sources: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    rejected: int = 0
    pooling: str = "last"

    @classmethod
    def from_json(cls, text: str) -> FeatureInfo:
        values: dict[str, Any] = json.loads(text)
        values["render"] = RenderPolicy(**values["render"])
        for name in ("categories", "sources", "files"):
            values[name] = tuple(values[name])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class FeatureSet:
    """Hidden states with labels. Shapes (N, ...) per text, (M, ...) per row.

    hidden: final hidden state, pooled as `info.pooling` says. (N, H) float32.
    unsafe: share of labels that say unsafe, in [0, 1]; NaN where no row has a label. (N,) float32.
    severity: mean severity 0..3; NaN where unknown. (N,) float32.
    category_bits: bit i is set if any row flags category `info.categories[i]`. (N,) int64.
    prompt_id: hash of the prompt, the same in every file. (N,) int64.
    benign: 1 where the prompt's source ends in "benign". (N,) uint8.
    tokens, truncated: length in RM tokens; whether it was cut to the limit. (N,).
    row_texts: indices of response_0 and response_1. (M, 2) int64.
    row_unsafe, row_severity: labels as the row has them, -1 for null. (M, 2) int8.
    row_safer, row_better: response ids, -1 for null. (M,) int8.
    row_id: the row's place in reading order, rejected lines not counted. (M,) int64.
    row_file, row_line: index into `info.files`, line from 1. (M,) int64.
    """

    hidden: Tensor
    unsafe: Tensor
    severity: Tensor
    category_bits: Tensor
    prompt_id: Tensor
    benign: Tensor
    tokens: Tensor
    truncated: Tensor
    row_texts: Tensor
    row_unsafe: Tensor
    row_severity: Tensor
    row_safer: Tensor
    row_better: Tensor
    row_id: Tensor
    row_file: Tensor
    row_line: Tensor
    info: FeatureInfo = field(compare=False)

    @property
    def texts(self) -> int:
        return len(self.unsafe)

    @property
    def rows(self) -> int:
        return len(self.row_texts)

    @property
    def row_prompt(self) -> Tensor:
        """Prompt id of each row. Shape (M,)."""
        return self.prompt_id[self.row_texts[:, 0]]

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self) if f.name != "info"}

    def write(self, path: Path) -> None:
        """Writes the file as a whole, and its manifest."""
        from safetensors.torch import save_file

        with publishing(path) as temporary:
            save_file(self.tensors(), temporary, metadata={"format": FORMAT, "info": self.info.to_json()})

    @classmethod
    def read(cls, path: Path | str) -> FeatureSet:
        """The features in a file that `rm features` wrote.

        Raises:
            RMError: no such file, other bytes than were written, or another kind of file.
        """
        from safetensors.torch import load_file

        check_file(Path(path), RMError, "the command that made it makes it anew (ups-rm rm features)")
        info = read_info(path)
        tensors = load_file(path)
        names = {f.name for f in fields(cls)} - {"info"}
        if missing := sorted(names - set(tensors)):
            raise RMError(f"{path} lacks {', '.join(missing)}: not a whole file of features; make it anew")
        return cls(**{name: tensors[name] for name in names}, info=info)


def read_info(path: Path | str) -> FeatureInfo:
    """The description in a features file, without its tensors.

    Raises:
        RMError: no such file, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise RMError(f"no features at {path}\n  fix: make them with `ups-rm rm features`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise RMError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RMError(
            f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: it holds no features of ours"
        )
    return FeatureInfo.from_json(metadata["info"])


def join(sets: Sequence[FeatureSet]) -> FeatureSet:
    """Several feature sets as one; rows keep their order, set after set.

    Raises:
        RMError: they come from different backbones, templates or number formats.
    """
    first = sets[0]
    if len(sets) == 1:
        return first
    for other in sets[1:]:
        for name in ("backbone", "pooling", "hidden_size", "dtype", "render", "chat_template_sha256", "categories"):
            ours, theirs = getattr(first.info, name), getattr(other.info, name)
            if ours != theirs:
                raise RMError(f"features that differ in {name} can't be joined: {ours!r} and {theirs!r}")
    values = {f.name: [getattr(one, f.name) for one in sets] for f in fields(FeatureSet) if f.name != "info"}
    texts = rows = files = 0
    for i, one in enumerate(sets):
        values["row_texts"][i] = one.row_texts + texts
        values["row_id"][i] = one.row_id + rows
        values["row_file"][i] = one.row_file + files
        texts, rows, files = texts + one.texts, rows + one.rows, files + len(one.info.files)
    info = replace(
        first.info,
        fingerprint="+".join(one.info.fingerprint for one in sets),
        sources=tuple(source for one in sets for source in one.info.sources),
        files=tuple(file for one in sets for file in one.info.files),
        rejected=sum(one.info.rejected for one in sets),
    )
    return FeatureSet(**{name: torch.cat(parts) for name, parts in values.items()}, info=info)


def better_pairs(features: FeatureSet, prompts: Tensor) -> Tensor:
    """Text indices (other, better) of the rows with these prompts that carry `better_response_id`, in row order.

    Left out: rows whose two replies are one text, and those that we made ourselves (data/degenerate.py). Shape (J, 2).
    """
    from ups_rm.data.degenerate import DEGENERATE

    made = torch.tensor([i for i, file in enumerate(features.info.files) if file == DEGENERATE], dtype=torch.long)
    known = (features.row_better != UNKNOWN) & ~torch.isin(features.row_file, made)
    rows = (known & torch.isin(features.row_prompt, prompts)).nonzero()[:, 0]
    better = features.row_better[rows].long()
    pairs = torch.stack([features.row_texts[rows, 1 - better], features.row_texts[rows, better]], dim=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def ordered_pairs(features: FeatureSet, *, by_flags: bool = False) -> tuple[Tensor, int]:
    """Text indices (safer, less safe) of the rows that say which is which.

    Args:
        by_flags: only rows whose safety flags differ. Otherwise `safer_response_id` counts too where there is one, and
            rows whose id contradicts their flags are left out.

    Returns:
        Pairs, shape (K, 2) int64, in row order, without pairs of one text with itself; the number of contradictions.
    """
    unsafe, safer = features.row_unsafe.long(), features.row_safer.long()
    flags_differ = (unsafe[:, 0] != unsafe[:, 1]) & (unsafe != UNKNOWN).all(dim=1)
    safe_by_flags = (unsafe[:, 0] == 1).long()  # response_0 unsafe -> response_1 is the safe one
    known = flags_differ if by_flags else flags_differ | (safer != UNKNOWN)
    contradicts = flags_differ & (safer != UNKNOWN) & (safer != safe_by_flags)
    if not by_flags:
        known &= ~contradicts
    chosen = torch.where(flags_differ, safe_by_flags, safer.clamp(min=0))
    rows = torch.arange(features.rows)
    pairs = torch.stack([features.row_texts[rows, chosen], features.row_texts[rows, 1 - chosen]], dim=1)
    return pairs[known & (pairs[:, 0] != pairs[:, 1])], int(contradicts.sum())
