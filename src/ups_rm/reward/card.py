"""rm_card.json: what the numbers of a reward model mean, and golden answers that show it is still the same model.

The card travels in the RM folder. `RMCard.read` checks its form, `verify_folder` compares it with the folder's config
and tokenizer (no model needed), `verify_logits` with what the loaded model answers. Every mismatch is an RMError that
names the field. `make_card` writes one for a folder that has none.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RMError
from ups_rm.reward.card_digests import digests_of, verify_digests
from ups_rm.reward.native import hidden_dim_text, read_config
from ups_rm.reward.render import RenderPolicy, render, template_sha256
from ups_rm.types import Conversation

if TYPE_CHECKING:
    from ups_rm.reward.scorer import RewardScorer

CARD_FILE = "rm_card.json"
FORMAT = 2
OLD_FORMAT = 1  # without digests
OUTPUT = "logit: one number per conversation, shape (batch, 1)"
SIGN = "higher = less safe: degree of unsafety of the last reply"
TRANSFORM = "safe_score = sigmoid(-logit)"
WAY_OUT = "\n  fix: if the change is meant, write a new card with `ups-rm rm card FOLDER --force`"

# Fixed, harmless, and different in what can go wrong: length, digits, quotes, emoji, newlines, turns, an empty reply.
GOLDEN_CONVERSATIONS: tuple[Conversation, ...] = (
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
    ],
    [
        {"role": "user", "content": "How do I keep a tomato plant alive through a hot week?"},
        {
            "role": "assistant",
            "content": "Water it deeply in the morning, shade it at noon, and mulch the soil.\n\nPick what is ripe.",
        },
    ],
    [
        {"role": "user", "content": "In 1999 I paid $12,345.60 for a car. What is that in “today’s” money?"},
        {"role": "assistant", "content": "About twice as much, roughly $24,000 — prices have doubled since. 🙂"},
    ],
    [
        {"role": "user", "content": "My neighbour's dog barks all night."},
        {"role": "assistant", "content": "That sounds tiring. Have you talked to them?"},
        {"role": "user", "content": "Not yet."},
        {"role": "assistant", "content": "I can't help with that."},
    ],
    [
        {"role": "user", "content": "Say nothing."},
        {"role": "assistant", "content": ""},
    ],
)


@dataclass(frozen=True)
class Golden:
    """A fixed conversation with the RM's token ids for it and the RM's logit, computed in the card's dtype."""

    messages: Conversation
    input_ids: list[int]
    logit: float


@dataclass(frozen=True)
class RMCard:
    """What rm_card.json holds.

    render: BOS, end token, truncation side and limit (stored flat in the file).
    chat_template_sha256: of the template's text.
    hidden_dim_str: the head's widths.
    pooling: what the head is given of the hidden states (MyRMConfig); cards of before it was a choice mean "last".
    backbone: model_type, hidden_size, num_hidden_layers, vocab_size, and the name it was merged from.
    labels: what the head was trained on; "unknown" for folders that came without a card.
    dtype: in which the golden logits were computed.
    temperature: that was folded into the output layer (1.0: none).
    head: the rest of what head.json said: loss, seed, metrics.
    digests: of every field as it was written (card_digests.py); {} for cards of format 1.
    """

    render: RenderPolicy
    chat_template_sha256: str
    hidden_dim_str: str
    backbone: dict[str, Any]
    labels: str = "unknown"
    dtype: str = "float32"
    temperature: float = 1.0
    head: dict[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    pooling: str = "last"
    output: str = OUTPUT
    sign: str = SIGN
    transform: str = TRANSFORM
    format: int = FORMAT
    digests: dict[str, str] = field(default_factory=dict, compare=False)

    def values(self) -> dict[str, Any]:
        """What the file holds but for the digests; the render policy's fields lie flat beside the others."""
        values = asdict(self)
        del values["digests"]
        policy = values.pop("render")
        order = {name: values[name] for name in ("format", "output", "sign", "transform")}
        return order | policy | values

    def to_json(self) -> str:
        """The file's text, with a digest for every field in it; always in the newest format."""
        values = self.values() | {"format": FORMAT}
        text = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
        text += f',\n "digests": {json.dumps(digests_of(values), ensure_ascii=False)}\n}}\n'
        return re.sub(r"\[\n[\s\d,]+\]", lambda match: " ".join(match[0].split()), text)  # token ids on one line

    def write(self, folder: Path) -> Path:
        """rm_card.json in `folder`, put in place in one step."""
        path = folder / CARD_FILE
        temporary = folder / f".{CARD_FILE}.tmp"
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)
        return path

    @classmethod
    def read(cls, folder: Path | str) -> RMCard | None:
        """The folder's card, None if it has none.

        Raises:
            RMError: fields missing, unknown, or of the wrong type; an output, sign or transform that isn't ours.
        """
        path = Path(folder) / CARD_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise RMError(f"{path} is not JSON that can be read: {error}") from error
        return _parse(values, path)


def make_card(
    scorer: RewardScorer,
    folder: Path,
    *,
    labels: str = "unknown",
    temperature: float = 1.0,
    head: dict[str, Any] | None = None,
) -> RMCard:
    """The card of a loaded RM: its config, its tokenizer, and what it answers to the golden conversations."""
    conversations = list(GOLDEN_CONVERSATIONS)
    rendered = render(scorer.tokenizer, conversations, scorer.policy)
    scores = scorer.score(conversations)
    golden = tuple(
        Golden(messages, ids.input_ids, score.logit)
        for messages, ids, score in zip(conversations, rendered, scores, strict=True)
    )
    config = read_config(folder)
    return RMCard(
        render=scorer.policy,
        chat_template_sha256=template_sha256(scorer.tokenizer),
        hidden_dim_str=hidden_dim_text(config.get("hidden_dim_str", "")),
        backbone=backbone_facts(config),
        labels=labels,
        dtype=str(scorer.dtype).removeprefix("torch."),
        temperature=temperature,
        head=head or {},
        golden=golden,
        pooling=config.get("pooling", "last"),
    )


def write_card(
    folder: Path,
    *,
    labels: str | None = None,
    policy: dict[str, Any] | None = None,
    chat_template: str | None = None,
    infer: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Path:
    """Write rm_card.json for `folder` as it is now.

    Of a card that is there, what only it knows is kept: labels, temperature, the head's training, the backbone's name;
    and how conversations are rendered, if the chat template still is the one that it was written for.

    Args:
        labels: what the head was trained on; None: as the old card says, else "unknown".
        policy: fields of RenderPolicy that differ from that (None: no difference; end_token "none": no end token).
        chat_template: text of a template; it is written into the folder as chat_template.jinja, so that it stays.
        infer: take the rendering from template and config anew, whatever the old card says.

    Raises:
        RMError: the folder can't be loaded, or has no chat template.
    """
    from ups_rm.device import compute_dtype, torch_device
    from ups_rm.reward.native import load_model, load_tokenizer
    from ups_rm.reward.scorer import RewardScorer, default_max_length

    device = str(torch_device(device))
    number_format = compute_dtype(dtype, device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    old = _old_card(folder)
    if old is not None and not infer and old.chat_template_sha256 == template_sha256(tokenizer):
        rendering = old.render
    else:
        rendering = RenderPolicy.infer(tokenizer, max_length=default_max_length(read_config(folder), tokenizer))
    given = {name: value for name, value in (policy or {}).items() if value is not None}
    if given.get("end_token") == "none":
        given["end_token"] = None
    model = load_model(folder, dtype=number_format, device=device, trust_remote_code=trust_remote_code)
    scorer = RewardScorer(
        model,
        tokenizer,
        replace(rendering, **given),
        device=device,
        dtype=number_format,
        native=not trust_remote_code,
    )
    card = make_card(scorer, folder, labels=labels or (old.labels if old else "unknown"))
    if old is not None:
        name = {"name": old.backbone["name"]} if "name" in old.backbone else {}
        card = replace(card, temperature=old.temperature, head=old.head, backbone=name | card.backbone)
    if chat_template is not None:
        temporary = folder / ".chat_template.jinja.tmp"
        temporary.write_text(chat_template, encoding="utf-8")
        temporary.replace(folder / "chat_template.jinja")
    return card.write(folder)


def _old_card(folder: Path) -> RMCard | None:
    """The folder's card, also where it does not fit the folder; None, with a warning, where it can't be read at all."""
    try:
        return RMCard.read(folder)
    except RMError as error:
        warnings.warn(f"nothing of the old card is kept: {error}", stacklevel=3)
        return None


def backbone_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json by which a backbone is known again."""
    model_type = config.get("backbone_model_type") or config.get("model_type", "unknown")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {"model_type": model_type} | {name: config[name] for name in names if name in config}


def verify_folder(card: RMCard, folder: Path, tokenizer: Any) -> None:
    """The card against config.json and the tokenizer (head, backbone, template, special tokens, golden token ids), and
    against what it was written as: whatever single field was changed since then is named.

    Raises:
        RMError: the first field that does not match, with both values.
    """
    config = read_config(folder)
    _same(folder, "hidden_dim_str", card.hidden_dim_str, hidden_dim_text(config.get("hidden_dim_str", "")))
    _same(folder, "pooling", card.pooling, config.get("pooling", "last"))
    found = backbone_facts(config)
    for name, value in card.backbone.items():
        if name in found:
            _same(folder, f"backbone.{name}", value, found[name])
    _same(folder, "chat_template_sha256", card.chat_template_sha256, template_sha256(tokenizer))
    if card.digests:
        verify_digests(card.values(), card.digests, f"{folder}/{CARD_FILE}")
    if card.render.bos == "one" and tokenizer.bos_token_id is None:
        raise RMError(f"{folder}/{CARD_FILE}: bos is 'one', but the folder's tokenizer has no BOS token{WAY_OUT}")
    rendered = render(tokenizer, [golden.messages for golden in card.golden], card.render)
    for i, (golden, now) in enumerate(zip(card.golden, rendered, strict=True)):
        if golden.input_ids != now.input_ids:
            at = next(
                (k for k, (a, b) in enumerate(zip(golden.input_ids, now.input_ids, strict=False)) if a != b),
                min(len(golden.input_ids), len(now.input_ids)),
            )
            raise RMError(
                f"{folder}/{CARD_FILE}: golden[{i}].input_ids differ from what the folder's tokenizer gives: "
                f"{len(golden.input_ids)} against {len(now.input_ids)} tokens, first at position {at} "
                f"({golden.input_ids[at : at + 3]} against {now.input_ids[at : at + 3]}){WAY_OUT}"
            )


def verify_logits(card: RMCard, folder: Path, logits: Sequence[float], tolerance: float) -> float:
    """The golden logits against `logits` of the loaded model.

    Args:
        tolerance: largest difference allowed, as a share of the largest golden logit (of 1, if that is smaller).

    Returns:
        The largest such difference.

    Raises:
        RMError: it is over the tolerance.
    """
    worst, at = 0.0, 0
    scale = max([1.0, *(abs(golden.logit) for golden in card.golden)])
    for i, (golden, logit) in enumerate(zip(card.golden, logits, strict=True)):
        difference = abs(golden.logit - logit) / scale
        if not difference <= worst:  # NaN counts as worst
            worst, at = difference, i
    if not worst <= tolerance:
        raise RMError(
            f"{folder}/{CARD_FILE}: golden[{at}].logit is {card.golden[at].logit:.4f}, the model answers "
            f"{logits[at]:.4f} (difference {worst:.2g} > {tolerance:.2g}): weights, code or number format have changed"
            f"{WAY_OUT}"
        )
    return worst


def _same(folder: Path, name: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise RMError(f"{folder}/{CARD_FILE}: {name} is {expected!r}, the folder has {found!r}{WAY_OUT}")


def _parse(values: Any, path: Path) -> RMCard:
    if not isinstance(values, dict):
        raise RMError(f"{path} holds a {type(values).__name__}, expected an object")
    policy_names = [f.name for f in fields(RenderPolicy)]
    known = {f.name for f in fields(RMCard)} - {"render"} | set(policy_names)
    if values.get("format") == OLD_FORMAT:
        if "digests" in values:
            raise RMError(f"{path}: format is {OLD_FORMAT}, but the card has digests as those of format {FORMAT} have")
        known -= {"digests"}
        values.setdefault("pooling", "last")  # cards of before it was a choice
    if unknown := sorted(set(values) - known):
        raise RMError(f"{path}: {unknown[0]} is not a field of a card (known: {', '.join(sorted(known))})")
    if missing := sorted(known - set(values)):
        raise RMError(f"{path}: field {missing[0]} is missing{WAY_OUT}")
    meant = {"format": FORMAT, "output": OUTPUT, "sign": SIGN, "transform": TRANSFORM}
    for name, expected in meant.items():
        if values[name] != expected and (name, values[name]) != ("format", OLD_FORMAT):
            raise RMError(
                f"{path}: {name} is {values[name]!r}, this version understands {expected!r} only\n"
                "  fix: an RM with another meaning must be turned before use: negate the output layer and write a card"
            )
    types: dict[str, type | tuple[type, ...]] = {
        "chat_template_sha256": str,
        "hidden_dim_str": str,
        "backbone": dict,
        "labels": str,
        "pooling": str,
        "dtype": str,
        "temperature": (int, float),
        "head": dict,
        "golden": list,
        **({"digests": dict} if "digests" in known else {}),
        "end_token": (str, type(None)),
    }
    for name, kind in types.items():
        if not isinstance(values[name], kind):
            raise RMError(f"{path}: {name} is a {type(values[name]).__name__}{WAY_OUT}")
    try:
        policy = RenderPolicy(**{name: values.pop(name) for name in policy_names})
    except RMError as error:
        raise RMError(f"{path}: {error}") from error
    golden = tuple(_golden(entry, f"{path}: golden[{i}]") for i, entry in enumerate(values["golden"]))
    if not all(math.isfinite(g.logit) for g in golden):
        raise RMError(f"{path}: golden has a logit that is not finite{WAY_OUT}")
    return replace(RMCard(render=policy, **values), golden=golden)


def _golden(entry: Any, where: str) -> Golden:
    names = [f.name for f in fields(Golden)]
    if not isinstance(entry, dict):
        raise RMError(f"{where} is a {type(entry).__name__}, expected an object{WAY_OUT}")
    if missing := [name for name in names if name not in entry]:
        raise RMError(f"{where}.{missing[0]} is missing{WAY_OUT}")
    if unknown := sorted(set(entry) - set(names)):
        raise RMError(f"{where}.{unknown[0]} is not a field of a golden answer{WAY_OUT}")
    messages, ids, logit = (entry[name] for name in names)
    if not isinstance(messages, list):
        raise RMError(f"{where}.messages is a {type(messages).__name__}{WAY_OUT}")
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise RMError(f"{where}.input_ids is not a list of integers{WAY_OUT}")
    if type(logit) not in (int, float):
        raise RMError(f"{where}.logit is a {type(logit).__name__}{WAY_OUT}")
    return Golden(messages, ids, logit)
