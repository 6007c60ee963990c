"""Hidden states of a frozen backbone for every reply: what the head of a reward model is trained on.

Rows in (ups_rm.data.rows), one safetensors file out (feature_set.py). Each distinct (prompt, response) is rendered as
the RM will render it, goes through the backbone once, in batches of like length and with the replies to one prompt side
by side (shared_prompt.py), and leaves its final hidden state, pooled as modeling_myrm.py pools it: that of the last
attended token, or the mean over all of them. Finished states are saved in `<out>.parts/` every few seconds: a process
that was killed goes on where it stopped.

Not done here: training (head.py), adapters (lora.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from ups_rm.console import console, progress_bar
from ups_rm.data.rows import Reject, Row, text_hash
from ups_rm.data.schema import HARM_CATEGORIES
from ups_rm.device import compute_dtype, torch_device
from ups_rm.durable import file_damage, publishing, remove_file, sweep, write_text
from ups_rm.errors import RMError
from ups_rm.model_files import check_model_folder
from ups_rm.reward.batching import ENOUGH_TOKENS, token_batches
from ups_rm.reward.feature_set import UNKNOWN, FeatureInfo, FeatureSet, read_info
from ups_rm.reward.merge import load_backbone, load_backbone_tokenizer, render_policy
from ups_rm.reward.native import compute_context, lower_to_bf16
from ups_rm.reward.render import RenderPolicy, render, template_sha256
from ups_rm.reward.shared_prompt import Row as SharedRow
from ups_rm.reward.shared_prompt import can_share, pooled_rows, shared_rows, texts_of, together_and_apart
from ups_rm.types import Message

DEFAULT_BATCH_TOKENS = 4096
SAVE_SECONDS = 15.0
_RENDER_AT_ONCE = 512


@dataclass
class Texts:
    """The distinct (prompt, response) texts of some rows, with their labels, and the rows that point to them."""

    prompts: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    labels: dict[str, Tensor] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def conversation(self, index: int) -> list[Message]:
        return [
            Message(role="user", content=self.prompts[index]),
            Message(role="assistant", content=self.responses[index]),
        ]


@dataclass(frozen=True)
class FeatureReport:
    """What an extraction did: texts in the file, how many of them were there from an earlier start, speed."""

    path: Path
    texts: int
    rows: int
    resumed: int
    truncated: int
    tokens_per_second: float
    seconds: float


def collect_texts(rows: Iterable[Row]) -> Texts:
    """Deduplicated texts and label tensors of `rows` (named as in FeatureSet).

    Raises:
        RMError: no rows.
    """
    texts = Texts()
    index: dict[tuple[int, int], int] = {}
    files: dict[str, int] = {}
    prompts: dict[str, str] = {}
    known: list[list[int]] = []  # per text: labels, of them unsafe, severities, their sum, category bits
    benign: list[int] = []
    table: list[list[int]] = []
    for row_id, row in enumerate(rows):
        prompt = prompts.setdefault(row.prompt, row.prompt)  # one string for all its rows
        places: list[int] = []
        for i, response in enumerate(row.responses):
            place = index.setdefault((text_hash(prompt), text_hash(response)), len(texts.prompts))
            if place == len(texts.prompts):
                texts.prompts.append(prompt)
                texts.responses.append(response)
                known.append([0, 0, 0, 0, 0])
                benign.append(int((row.prompt_source or "").endswith("benign")))
            counts = known[place]
            if row.safe[i] is not None:
                counts[0] += 1
                counts[1] += not row.safe[i]
            if (severity := row.severity[i]) is not None:
                counts[2] += 1
                counts[3] += severity
            for name in row.categories[i] or ():
                if name in HARM_CATEGORIES:
                    counts[4] |= 1 << HARM_CATEGORIES.index(name)
            places.append(place)
        flags = [UNKNOWN if safe is None else int(not safe) for safe in row.safe]
        severities = [UNKNOWN if one is None else one for one in row.severity]
        ids = [UNKNOWN if one is None else one for one in (row.safer_response_id, row.better_response_id)]
        table.append([*places, *flags, *severities, *ids, row_id, files.setdefault(row.file, len(files)), row.line])
    if not table:
        raise RMError("no rows to make features of")
    columns, counts_by_text = torch.tensor(table), torch.tensor(known)
    texts.files = tuple(files)
    texts.labels = {
        "unsafe": counts_by_text[:, 1] / counts_by_text[:, 0],  # 0/0 = NaN: unknown
        "severity": counts_by_text[:, 3] / counts_by_text[:, 2],
        "category_bits": counts_by_text[:, 4],
        "prompt_id": torch.tensor([text_hash(prompt) >> 1 for prompt in texts.prompts]),
        "benign": torch.tensor(benign, dtype=torch.uint8),
        "row_texts": columns[:, :2],
        "row_unsafe": columns[:, 2:4].to(torch.int8),
        "row_severity": columns[:, 4:6].to(torch.int8),
        "row_safer": columns[:, 6].to(torch.int8),
        "row_better": columns[:, 7].to(torch.int8),
        "row_id": columns[:, 8],
        "row_file": columns[:, 9],
        "row_line": columns[:, 10],
    }
    return texts


def render_texts(tokenizer: Any, texts: Texts, policy: RenderPolicy) -> tuple[list[Tensor], Tensor]:
    """Token ids of every text as int32 tensors (a Python list would take 9 times the memory), and which were cut."""
    ids: list[Tensor] = []
    truncated: list[bool] = []
    for start in range(0, len(texts.prompts), _RENDER_AT_ONCE):
        stop = min(start + _RENDER_AT_ONCE, len(texts.prompts))
        for row in render(tokenizer, [texts.conversation(i) for i in range(start, stop)], policy):
            ids.append(torch.tensor(row.input_ids, dtype=torch.int32))
            truncated.append(row.truncated)
    return ids, torch.tensor(truncated, dtype=torch.uint8)


def pad_batch(rows: Sequence[Tensor], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Right-padded token ids and mask, both (B, T). Padding is id 0: it is never read."""
    input_ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids.to(device), mask.to(device)


def extract_features(
    backbone: Path | str,
    rows: Iterable[Row],
    out: Path | str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    chat_template: str | None = None,
    end_token: str | None = None,
    truncation_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
    pooling: str = "last",
    sources: Sequence[str] = (),
    rejects: Sequence[Reject] = (),
    overwrite: bool = False,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = True,
) -> FeatureReport:
    """Write the features of `rows` to `out`, a safetensors file.

    Args:
        backbone: folder or hub id of any decoder that AutoModel loads.
        device: "auto" is a GPU if there is one. dtype: "auto" is bfloat16 where the hardware computes in it.
        max_batch_tokens: upper bound of a batch, padding included.
        chat_template, end_token, truncation_side, max_length: how texts are rendered, if not as the tokenizer says.
        pooling: which hidden states the head is given: last or mean (MyRMConfig).
        sources, rejects: noted in the file (where rows came from) and counted (lines that were left out).
        overwrite: replace an `out` that holds other features. The same features are never computed twice.
        save_seconds: how often finished states are put on disk.

    Raises:
        RMError: no rows; a backbone that can't be loaded; `out` holds other features; a state that is not finite.
    """
    from ups_rm.reward.myrm.configuration_myrm import POOLINGS

    if pooling not in POOLINGS:
        raise RMError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
    start, out = perf_counter(), Path(out)
    texts = collect_texts(rows)
    place = str(torch_device(device))
    number_format = compute_dtype(dtype, place)
    tokenizer = load_backbone_tokenizer(backbone, chat_template)
    config = backbone_config(backbone)
    limits: dict[str, Any] = {"end_token": end_token, "truncation_side": truncation_side, "max_length": max_length}
    policy = render_policy(tokenizer, {}, config, **limits)
    ids, truncated = render_texts(tokenizer, texts, policy)
    info = FeatureInfo(
        backbone=backbone_identity(backbone, config),
        fingerprint="",
        hidden_size=config.get_text_config().hidden_size,
        pooling=pooling,
        dtype=str(number_format).removeprefix("torch."),
        render=policy,
        chat_template_sha256=template_sha256(tokenizer),
        categories=HARM_CATEGORIES,
        sources=tuple(sources),
        files=texts.files,
        rejected=len(rejects),
    )
    info = FeatureInfo(**{**vars(info), "fingerprint": _fingerprint(info, ids, texts.labels)})
    if out.exists() and (wrong := file_damage(out)) is not None:
        console.print(f"{out} is damaged: {wrong}; it is made anew", soft_wrap=True, markup=False)
    elif out.exists():
        if read_info(out).fingerprint == info.fingerprint:
            return FeatureReport(
                out, len(ids), len(texts.labels["row_id"]), len(ids), int(truncated.sum()), 0.0, perf_counter() - start
            )
        if not overwrite:
            raise RMError(
                f"{out} holds features of other rows or settings\n  fix: another file, or --force to replace it"
            )
    parts = Parts(out.with_name(out.name + ".parts"), info, len(ids))
    resumed = int(parts.done.sum())
    if resumed:
        console.print(f"{resumed} of {len(ids)} texts are there from an earlier start; going on")
    speed = _fill(parts, backbone, ids, texts.prompts, place, number_format, max_batch_tokens, save_seconds, progress)
    FeatureSet(
        hidden=parts.hidden,
        tokens=torch.tensor([len(row) for row in ids], dtype=torch.int32),
        truncated=truncated,
        info=info,
        **texts.labels,
    ).write(out)
    parts.remove()
    rows_read = len(texts.labels["row_id"])
    return FeatureReport(out, len(ids), rows_read, resumed, int(truncated.sum()), speed, perf_counter() - start)


def _fill(
    parts: Parts,
    backbone: Path | str,
    ids: Sequence[Tensor],
    prompts: Sequence[str],
    device: str,
    dtype: torch.dtype,
    max_batch_tokens: int,
    save_seconds: float,
    progress: bool,
) -> float:
    """Computes the states that are not there yet. Returns real (unpadded) tokens per second."""
    todo = (~parts.done).nonzero()[:, 0].tolist()
    if not todo:
        return 0.0
    model = load_decoder(backbone, dtype, device)
    enough = ENOUGH_TOKENS if torch.device(device).type == "cpu" else max_batch_tokens // 2
    waiting = [ids[i] for i in todo]
    groups = [prompts[i] for i in todo] if can_share(model) else range(len(todo))
    rows = shared_rows(waiting, groups, max_batch_tokens)
    plan = token_batches([row.length for row in rows], max_batch_tokens, enough_tokens=enough)
    tokens, start = 0, perf_counter()
    saved = start
    with progress_bar("features", len(todo), unit="texts", enabled=progress) as advance:
        for batch in plan:
            some = [rows[i] for i in batch]
            texts = texts_of(some)
            parts.add([todo[i] for i in texts], hidden_states(model, some, waiting, dtype, device, parts.pooling))
            tokens += sum(len(waiting[i]) for i in texts)
            advance(len(texts), f"{tokens / (perf_counter() - start):,.0f} tok/s")
            if perf_counter() - saved >= save_seconds:
                parts.save()
                saved = perf_counter()
    parts.save()
    return tokens / (perf_counter() - start)


@torch.inference_mode()
def hidden_states(
    model: Any,
    rows: Sequence[SharedRow],
    ids: Sequence[Tensor],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    pooling: str = "last",
) -> Tensor:
    """What the head is given of each text of some rows, in their order, float32, on the CPU. Shape (B, H).

    Args:
        model: from `load_decoder`, with the same dtype and device.
        rows, ids: as `shared_rows` made them, and the token ids it was given.

    Raises:
        RMError: a state that is not finite.
    """
    from ups_rm.reward.myrm.modeling_myrm import pooled_hidden

    together, apart = together_and_apart(rows, model) if can_share(model) else ([], rows)
    states: dict[int, Tensor] = {}
    with compute_context(dtype, device):
        if together:
            states |= zip(texts_of(together), pooled_rows(model, together, ids, pooling, device), strict=True)
        if apart:
            texts = texts_of(apart)
            padded = pad_batch([ids[i] for i in texts], device)
            states |= zip(texts, pooled_hidden(model, *padded, pooling=pooling)[0], strict=True)
    hidden = torch.stack([states[i] for i in texts_of(rows)])
    if not torch.isfinite(hidden).all():
        raise RMError(f"the backbone's hidden states are not finite in {dtype}\n  fix: --dtype float32")
    return hidden.cpu()


class Parts:
    """Finished hidden states in a folder beside the output, one file per save; survives a kill at any moment."""

    def __init__(self, folder: Path, info: FeatureInfo, texts: int) -> None:
        self.folder = folder
        self.pooling = info.pooling
        self.hidden = torch.zeros(texts, info.hidden_size)
        self.done = torch.zeros(texts, dtype=torch.bool)
        self._waiting: list[int] = []
        self._next = 0
        manifest = folder / "manifest.json"
        if _manifest_fingerprint(manifest) != info.fingerprint:
            shutil.rmtree(folder, ignore_errors=True)  # of other rows or settings, or nothing yet
            folder.mkdir(parents=True)
            write_text(manifest, json.dumps({"fingerprint": info.fingerprint, "texts": texts}))
        self._load()

    def _load(self) -> None:
        from safetensors.torch import load_file

        sweep(self.folder)
        for file in sorted(self.folder.glob("*.safetensors")):
            if file_damage(file) is not None:  # its texts are computed once more
                remove_file(file)
                continue
            part = load_file(file)
            self.hidden[part["index"]] = part["hidden"]
            self.done[part["index"]] = True
            self._next = int(file.stem) + 1

    def add(self, index: Sequence[int], hidden: Tensor) -> None:
        self.hidden[torch.tensor(index)] = hidden
        self.done[torch.tensor(index)] = True
        self._waiting += index

    def save(self) -> None:
        """Puts what was added since the last save on disk."""
        from safetensors.torch import save_file

        if not self._waiting:
            return
        index = torch.tensor(self._waiting)
        with publishing(self.folder / f"{self._next:06d}.safetensors") as temporary:
            save_file({"index": index, "hidden": self.hidden[index]}, temporary)
        self._next += 1
        self._waiting = []

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def load_decoder(backbone: Path | str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """The backbone without its head, to be run inside `compute_context(dtype, device)`, as the scorer runs it.

    Raises:
        RMError: it can't be loaded, or weights are missing and would be made up.
    """
    model = load_backbone(backbone)[0]
    if dtype == torch.bfloat16:
        lower_to_bf16(model)
    else:
        for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies, too
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def backbone_config(backbone: Path | str) -> Any:
    """The backbone's config as AutoConfig gives it. Raises RMError when there is none."""
    from transformers import AutoConfig

    check_model_folder(backbone, RMError)
    try:
        return AutoConfig.from_pretrained(str(backbone), trust_remote_code=False)
    except Exception as error:  # transformers raises many classes
        raise RMError(f"the backbone {backbone} can't be loaded: {type(error).__name__}: {error}") from error


def backbone_identity(backbone: Path | str, config: Any) -> str:
    """Name and short hash of a backbone, so that features of two backbones are never mixed.

    Of a folder, config and weight files count by size and by their first and last 64 KiB; of a hub id, its commit.
    """
    folder = Path(backbone).expanduser()
    if not folder.is_dir():
        return f"{backbone}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256()
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    for file in sorted([folder / "config.json", *weights]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**16))
            stream.seek(max(0, size - 2**16))
            digest.update(stream.read(2**16))
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def _fingerprint(info: FeatureInfo, ids: Sequence[Tensor], labels: dict[str, Tensor]) -> str:
    """Hash of everything that decides the file's content: backbone, rendering, number format, token ids, labels."""
    digest = hashlib.sha256(json.dumps(asdict(info), sort_keys=True).encode("utf-8"))
    for row in ids:
        digest.update(len(row).to_bytes(4, "little") + row.numpy().tobytes())
    for name in sorted(labels):
        digest.update(name.encode() + labels[name].numpy().tobytes())
    return digest.hexdigest()


def _manifest_fingerprint(manifest: Path) -> str | None:
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None
