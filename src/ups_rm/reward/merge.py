"""Backbone + MLP head -> one RM folder that plain transformers loads, with its card.

The merge is strict: every backbone weight is there and used, nothing is left over, nothing is re-initialised, the byte
index is right, and the logits of the finished folder are bitwise those of the backbone followed by the head. It is
written beside its destination and renamed, so a failed merge leaves nothing half-done.

The head comes in one of the two forms of head_files.py; a second one, for helpfulness, may stand beside it. A
calibration temperature T in head.json is folded into the output layer (logit / T) and noted in the card.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ups_rm.durable import sync_tree, write_manifest
from ups_rm.errors import RMError
from ups_rm.model_files import check_model_folder, panics_as_errors, refused_pickle
from ups_rm.reward.card import GOLDEN_CONVERSATIONS, make_card
from ups_rm.reward.head_files import HELPFULNESS, Heads, HeadWeights, folded, read_heads
from ups_rm.reward.model_card import keep_curves, write_model_card
from ups_rm.reward.native import hidden_dim_text, load_model, load_tokenizer, quiet_transformers
from ups_rm.reward.render import RenderPolicy, chat_template_of, render, template_sha256
from ups_rm.reward.replacing import check_replaceable
from ups_rm.reward.scorer import RewardScorer, default_max_length, pad_batch

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 * 10**9
HEAD_SHARD = "myrm.safetensors"
INDEX = "model.safetensors.index.json"
LABELS = {"unsafety": "unsafe", "helpfulness": "helpful"}
"""Each head's name in config.json's id2label."""
MODEL_FILES = ("configuration_myrm.py", "modeling_myrm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_myrm.MyRMConfig",
    "AutoModelForTokenClassification": "modeling_myrm.MyRMForTokenClassification",
}
# Heads that checkpoints bring along and that an RM does not have.
DROPPABLE = re.compile(r"^(lm_head|score|classifier|v_head|embed_out)\.|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class MergeReport:
    """What a merge made: the folder, its tensors and bytes, and the backbone's weights that an RM has no use for.

    temperature: of the first head.
    """

    folder: Path
    tensors: int
    total_bytes: int
    dropped: tuple[str, ...]
    dtype: str
    temperature: float
    heads: tuple[str, ...] = ("unsafety",)


def merge(
    backbone: Path | str,
    head: Path | str,
    out: Path | str,
    *,
    helpfulness_head: Path | str | None = None,
    chat_template: str | None = None,
    end_token: str | None = None,
    truncation_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
    other_backbone: bool = False,
    overwrite: bool = False,
) -> MergeReport:
    """Write the RM folder `out`.

    How conversations are rendered comes from head.json where it says so (the head must be asked as it was trained),
    from the arguments next, and from the tokenizer's chat template otherwise.

    Args:
        backbone: folder or hub id of a decoder that AutoModel loads; its own lm_head or score is left out.
        head: folder or file of the head, ours or the original form; of a folder that `rm train --target both` made both
            heads are taken.
        helpfulness_head: of another folder, trained on the same backbone.
        chat_template: text of a template, where the backbone's tokenizer has none or the wrong one.
        other_backbone: allow a backbone that is not the one head.json names (another copy or number format of it).
        overwrite: replace an `out` that is an RM folder.

    Raises:
        RMError: anything missing, left over or unequal, by name; `out` exists and is not empty.
    """
    out = Path(out).expanduser()
    check_replaceable(out, overwrite=overwrite)
    heads = read_heads(head, helpfulness_head)
    weights = next(iter(heads.values()))
    tokenizer = load_backbone_tokenizer(backbone, chat_template)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as work:
        made = Path(work) / out.name
        made.mkdir()
        model, dropped = load_backbone(backbone)
        if not other_backbone:
            _check_identity(backbone, model.config, weights.info.get("backbone"))
        policy = render_policy(
            tokenizer,
            weights.info,
            model.config,
            end_token=end_token,
            truncation_side=truncation_side,
            max_length=max_length,
        )
        total, tensors = write_weights(made, model, heads)
        write_config(made, model, heads, tokenizer)
        expected = _backbone_then_heads(model, heads, tokenizer, policy)
        dtype, name = model.dtype, _backbone_name(backbone)
        del model  # an 8B backbone need not be in memory twice
        _verify_and_write_card(made, tokenizer, policy, heads, dtype, expected, name)
        keep_curves(made, Path(head).expanduser())
        write_model_card(made)
        write_manifest(made, "*.safetensors")  # the rest is the card's, or may be edited
        sync_tree(made)
        _put_in_place(made, out)
    number_format = str(dtype).removeprefix("torch.")
    return MergeReport(out, tensors, total, tuple(dropped), number_format, weights.temperature, tuple(heads))


def load_backbone(backbone: Path | str) -> tuple[Any, list[str]]:
    """The backbone as AutoModel gives it, in the number format it was stored in, and the names it leaves behind.

    Raises:
        RMError: it can't be loaded, a weight is missing (and would be re-initialised) or has no place in the model.
    """
    from transformers import AutoModel

    check_model_folder(backbone, RMError)
    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(
                str(backbone), dtype="auto", output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many classes
        reason = refused_pickle(error) or f"{type(error).__name__}: {error}"
        raise RMError(f"the backbone {backbone} can't be loaded: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise RMError(f"the backbone {backbone} lacks weights, they would be re-initialised: {missing[:8]}")
    unexpected = sorted(info["unexpected_keys"])
    if unknown := [name for name in unexpected if not DROPPABLE.search(name)]:
        raise RMError(f"the backbone {backbone} has weights that its config has no place for: {unknown[:8]}")
    if model.config.is_encoder_decoder or getattr(model.config, "quantization_config", None):
        raise RMError(f"the backbone {backbone} is quantized or an encoder-decoder; merge wants a plain decoder")
    return model.eval().requires_grad_(False), unexpected


def load_backbone_tokenizer(backbone: Path | str, chat_template: str | None) -> Any:
    """The backbone's tokenizer, with `chat_template` (text) if given.

    Raises:
        RMError: it can't be loaded, or has no chat template and none is given.
    """
    from transformers import AutoTokenizer

    check_model_folder(backbone, RMError)
    try:
        with panics_as_errors(), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(backbone), trust_remote_code=False)
    except Exception as error:  # transformers raises many classes
        raise RMError(f"the tokenizer of {backbone} can't be loaded: {type(error).__name__}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    chat_template_of(tokenizer)
    return tokenizer


def render_policy(
    tokenizer: Any,
    info: dict[str, Any],
    config: Any,
    *,
    end_token: str | None = None,
    truncation_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
) -> RenderPolicy:
    """How the RM renders: head.json's fields (flat or under "render"), then the arguments, then the chat template.

    Raises:
        RMError: head.json and an argument differ, or head.json was made with another chat template.
    """
    limit = default_max_length(config.to_dict(), tokenizer)
    policy = RenderPolicy.infer(tokenizer, max_length=max_length or limit, truncation_side=truncation_side or "left")
    if end_token is not None:
        policy = replace(policy, end_token=end_token)
    nested = info.get("render")
    told = nested if isinstance(nested, dict) else info
    trained = {f.name: told[f.name] for f in fields(RenderPolicy) if f.name in told}
    given = {"end_token": end_token, "truncation_side": truncation_side, "max_length": max_length}
    for name, value in given.items():
        if value is not None and name in trained and trained[name] != value:
            raise RMError(f"{name} is {value!r}, but the head was trained with {trained[name]!r} (head.json)")
    template = told.get("chat_template_sha256", info.get("chat_template_sha256"))
    if template is not None and template != template_sha256(tokenizer):
        raise RMError(
            "chat_template_sha256 in head.json is not that of the backbone's tokenizer: the head was trained on "
            "conversations rendered with another template\n  fix: --chat-template FILE with that one"
        )
    return replace(policy, **trained)


def _check_identity(backbone: Path | str, config: Any, trained_on: Any) -> None:
    """head.json's `backbone` (name@hash, see features.backbone_identity) against the one given."""
    from ups_rm.reward.features import backbone_identity

    if not isinstance(trained_on, str) or "@" not in trained_on:
        return
    given = backbone_identity(backbone, config)
    (name, digest), (given_name, given_digest) = trained_on.rsplit("@", 1), given.rsplit("@", 1)
    if len(digest) == len(given_digest) and digest != given_digest:
        raise RMError(
            f"the head was trained on {name} ({digest}), the backbone given is {given_name} ({given_digest}): its "
            "states would mean something else\n  fix: the backbone of the features; --other-backbone if it is a copy"
        )


def pooling_of(weights: HeadWeights) -> str:
    """What the head was trained on, "last" for heads that don't say.

    Raises:
        RMError: head.json names a pooling that there is not.
    """
    from ups_rm.reward.myrm.configuration_myrm import POOLINGS

    pooling = weights.info.get("pooling", "last")
    if pooling not in POOLINGS:
        raise RMError(f"head.json: pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
    return str(pooling)


def write_weights(made: Path, model: Any, heads: Heads, *, shard_bytes: int = SHARD_BYTES) -> tuple[int, int]:
    """Shards of the backbone (`model.*`), the heads' own shard (`myscore.*`, `myhelpful.*`) and the byte index.

    Every shard is read back and compared bit by bit.

    Returns:
        Bytes and number of all tensors.
    """
    from ups_rm.reward.myrm.modeling_myrm import HEAD_MODULES

    hidden_size = model.config.get_text_config().hidden_size
    for weights in heads.values():
        width = weights.tensors["layers.0.weight" if weights.hidden_dims else "output_layer.weight"].shape[1]
        if width != hidden_size:
            raise RMError(
                f"the head takes {width} numbers, the backbone gives {hidden_size}: they do not belong together"
            )
    shards = list(_shards({f"model.{k}": v for k, v in model.state_dict().items()}, shard_bytes))
    named = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    named[HEAD_SHARD] = {
        f"{HEAD_MODULES[name]}.{k}": v for name, weights in heads.items() for k, v in folded(weights).items()
    }
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in named.items():
        _save_and_compare(made / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total, len(weight_map)


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += bytes_here
    yield shard


def _save_and_compare(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    with safe_open(file, framework="pt") as written:
        for name, tensor in tensors.items():
            if not torch.equal(written.get_tensor(name).view(torch.uint8), tensor.cpu().view(torch.uint8)):
                raise RMError(f"{file.name}: {name} reads back different from what was written (disk full or broken?)")


def write_config(made: Path, model: Any, heads: Heads, tokenizer: Any) -> None:
    """config.json, the two Python files and the tokenizer; the tokenizer in the folder must give the same ids."""
    from ups_rm.reward import myrm
    from ups_rm.reward.myrm.configuration_myrm import LABEL_FIELDS, OWN_FIELDS, MyRMConfig

    backbone = {k: v for k, v in model.config.to_dict().items() if k not in OWN_FIELDS + LABEL_FIELDS}
    weights = next(iter(heads.values()))
    text = hidden_dim_text(weights.hidden_dims)
    named = [LABELS[name] for name in heads]
    labels: dict[str, Any] = {"id2label": dict(enumerate(named)), "label2id": {name: i for i, name in enumerate(named)}}
    told = None if list(heads) == ["unsafety"] else list(heads)  # folders for safety alone say nothing of heads
    config = MyRMConfig(text, model.config.model_type, pooling_of(weights), told, **labels, **backbone)
    config.architectures = ["MyRMForTokenClassification"]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = model.dtype
    config.save_pretrained(made)
    for name in MODEL_FILES:
        shutil.copyfile(Path(next(iter(myrm.__path__))) / name, made / name)
    tokenizer.save_pretrained(made)


def _backbone_then_heads(model: Any, heads: Heads, tokenizer: Any, policy: RenderPolicy) -> list[torch.Tensor]:
    """Logits by hand, plain torch: each golden conversation alone, then all in one padded batch. Shapes (B, heads)."""
    import torch
    import torch.nn.functional as F

    rows = [row.input_ids for row in render(tokenizer, list(GOLDEN_CONVERSATIONS), policy)]
    first, tensors = next(iter(heads.values())), [folded(weights) for weights in heads.values()]

    def of_head(x: torch.Tensor, head: dict[str, torch.Tensor]) -> torch.Tensor:
        for i in range(len(first.hidden_dims)):
            x = F.leaky_relu(F.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"]))
        return F.linear(x, head["output_layer.weight"], head["output_layer.bias"])

    def answer(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if pooling_of(first) == "mean":
            x = (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            x = hidden[torch.arange(len(hidden)), mask.sum(1) - 1].float()
        return torch.cat([of_head(x, head) for head in tensors], dim=1)

    with torch.inference_mode():
        alone = [
            answer(model(torch.tensor([row])).last_hidden_state, torch.ones(1, len(row), dtype=torch.long))
            for row in rows
        ]
        input_ids, mask = pad_batch(rows)
        together = answer(model(input_ids, attention_mask=mask).last_hidden_state, mask)
    return [*alone, together]


def _verify_and_write_card(
    made: Path,
    tokenizer: Any,
    policy: RenderPolicy,
    heads: Heads,
    dtype: torch.dtype,
    expected: list[torch.Tensor],
    backbone_name: str,
) -> None:
    """Load the folder as any user does and compare: token ids, then logits bit by bit; then write the card."""
    import torch

    reloaded = load_tokenizer(made)
    conversations = list(GOLDEN_CONVERSATIONS)
    rows = [row.input_ids for row in render(tokenizer, conversations, policy)]
    if rows != [row.input_ids for row in render(reloaded, conversations, policy)]:
        raise RMError("the tokenizer saved in the RM folder gives other token ids than the backbone's own")
    model = load_model(made, dtype=dtype)
    batches = [([row]) for row in rows] + [rows]
    with torch.inference_mode():
        for batch, logits in zip(batches, expected, strict=True):
            input_ids, mask = pad_batch(batch)
            found = model(input_ids=input_ids, attention_mask=mask).logits
            if not torch.equal(found, logits):
                difference = (found - logits).abs().max().item()
                raise RMError(f"the merged logits are not those of backbone and head: they differ by {difference:.3g}")
    scorer = RewardScorer(model, reloaded, policy, dtype=dtype, heads=tuple(heads))
    first, told = next(iter(heads.values())), {name: _told(weights) for name, weights in heads.items()}
    of_first = told[first.name]
    labels = str(of_first.get("labels") or of_first.get("loss") or "unknown")
    card = make_card(scorer, made, labels=labels, temperature=first.temperature, head=of_first)
    if len(heads) > 1:
        second = {"temperature": heads[HELPFULNESS].temperature} | told[HELPFULNESS]
        card = replace(card, helpfulness_head=second)
    replace(card, backbone={"name": backbone_name} | card.backbone).write(made)


def _told(weights: HeadWeights) -> dict[str, Any]:
    """What head.json says of the training alone; how conversations are rendered stands elsewhere in the card."""
    elsewhere = {f.name for f in fields(RenderPolicy)} | {"render", "chat_template_sha256", "pooling", "output"}
    return {k: v for k, v in weights.info.items() if k not in elsewhere}


def _put_in_place(made: Path, out: Path) -> None:
    """Rename into place; an existing folder is moved aside first and removed last."""
    mode = (made / "config.json").stat().st_mode  # safetensors writes files that only their owner can read
    for file in made.iterdir():
        file.chmod(mode)
    if out.exists():
        out.replace(made.parent / f"{out.name}.old")
    made.replace(out)


def _backbone_name(backbone: Path | str) -> str:
    """A hub id as it is; of a folder only its name: paths of this machine stay here."""
    path = Path(backbone).expanduser()
    return path.resolve().name if path.exists() else str(backbone)
