"""rm_card.json: what the numbers of a reward model mean, and golden answers that show it is still the same model.

The card travels in the RM folder. `RMCard.read` checks its form, `verify_folder` compares it with the folder's config
and tokenizer (no model needed), `verify_logits` with what the loaded model answers. Every mismatch is an RMError that
names the field. `make_card` writes one for a folder that has none.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RMError
from ups_rm.reward.card_digests import digests_of, verify_digests
from ups_rm.reward.native import heads_of, hidden_dim_text, read_config
from ups_rm.reward.render import RenderPolicy, render, template_sha256
from ups_rm.types import Conversation

if TYPE_CHECKING:
    from ups_rm.reward.scorer import RewardScorer

CARD_FILE = "rm_card.json"
FORMAT = 2
OLD_FORMAT = 1  # without digests
LARGEST_LOGIT = 1e30
OUTPUT = "logit: one number per conversation, shape (batch, 1)"
SIGN = "higher = less safe: degree of unsafety of the last reply"
TRANSFORM = "safe_score = sigmoid(-logit)"
HELPFUL_SIGN = "higher = more helpful: compares replies to one prompt, 0 has no meaning"
OUTPUTS = {"unsafety": SIGN, "helpfulness": HELPFUL_SIGN}
"""What each head's logit means, in the order of the logits."""
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
    """A fixed conversation with the RM's token ids for it and the RM's logit, computed in the card's dtype.

    logit: of the first head. helpfulness: of the second, None (and not in the file) where there is none.
    """

    messages: Conversation
    input_ids: list[int]
    logit: float
    helpfulness: float | None = None


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
    outputs: what each output means, by its name and in the order of the logits; {} and not in the file where unsafety
        is all there is.
    helpfulness_head: what the second head's head.json said, its temperature too; {} and not in the file without one.
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
    outputs: dict[str, str] = field(default_factory=dict)
    helpfulness_head: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the logits."""
        return tuple(self.outputs) or ("unsafety",)

    def values(self) -> dict[str, Any]:
        """What the file holds but for the digests; the render policy's fields lie flat beside the others."""
        values = asdict(self)
        del values["digests"]
        for name in ("outputs", "helpfulness_head"):
            if not values[name]:
                del values[name]
        for golden in values["golden"]:
            if golden["helpfulness"] is None:
                del golden["helpfulness"]
        policy = values.pop("render")
        first = ("format", "output", "sign", "transform", "outputs")
        order = {name: values[name] for name in first if name in values}
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
    answers = scorer.answers(rendered, prompts=[str(messages[:-1]) for messages in conversations])
    golden = tuple(
        Golden(messages, ids.input_ids, *answer)
        for messages, ids, answer in zip(conversations, rendered, answers, strict=True)
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
        **meaning_of(scorer.heads),
    )


def meaning_of(heads: Sequence[str]) -> dict[str, Any]:
    """The card's fields `output`, `sign`, `transform` and `outputs` of an RM with these heads."""
    if tuple(heads) == ("unsafety",):
        return {"output": OUTPUT, "sign": SIGN, "transform": TRANSFORM, "outputs": {}}
    outputs = {name: OUTPUTS[name] for name in heads}
    if len(heads) == 1:
        return {"output": OUTPUT, "sign": HELPFUL_SIGN, "transform": "none", "outputs": outputs}
    output = f"logits: {len(heads)} numbers per conversation, shape (batch, {len(heads)}), in the order of outputs"
    return {"output": output, "sign": SIGN, "transform": TRANSFORM, "outputs": outputs}


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
        heads=heads_of(read_config(folder), folder),
    )
    card = make_card(scorer, folder, labels=labels or (old.labels if old else "unknown"))
    if old is not None:
        name = {"name": old.backbone["name"]} if "name" in old.backbone else {}
        card = replace(card, temperature=old.temperature, head=old.head, backbone=name | card.backbone)
        if len(card.heads) > 1:
            card = replace(card, helpfulness_head=old.helpfulness_head)
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
    _same(folder, "outputs", list(card.heads), list(heads_of(config, folder)))
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


def verify_answers(card: RMCard, folder: Path, answers: Sequence[Sequence[float]], tolerance: float) -> float:
    """The golden logits of every head against `answers` of the loaded model (one of each head per conversation).

    Args:
        tolerance: largest difference allowed, as a share of the largest golden logit (of 1, if that is smaller).

    Returns:
        The largest such difference.

    Raises:
        RMError: it is over the tolerance.
    """
    over_all = 0.0
    for column, name in enumerate(("logit", "helpfulness")[: len(card.heads)]):
        worst, at = 0.0, 0
        expected = [float(getattr(golden, name)) for golden in card.golden]
        scale = max([1.0, *map(abs, expected)])
        for i, (golden, answer) in enumerate(zip(expected, answers, strict=True)):
            difference = abs(golden - answer[column]) / scale
            if not difference <= worst:  # NaN counts as worst
                worst, at = difference, i
        if not worst <= tolerance:
            raise RMError(
                f"{folder}/{CARD_FILE}: golden[{at}].{name} is {expected[at]:.4f}, the model answers "
                f"{answers[at][column]:.4f} (difference {worst:.2g} > {tolerance:.2g}): weights, code or number format "
                f"have changed{WAY_OUT}"
            )
        over_all = max(over_all, worst)
    return over_all


def _same(folder: Path, name: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise RMError(f"{folder}/{CARD_FILE}: {name} is {expected!r}, the folder has {found!r}{WAY_OUT}")


def _parse(values: Any, path: Path) -> RMCard:
    if not isinstance(values, dict):
        raise RMError(f"{path} holds a {type(values).__name__}, expected an object")
    policy_names = [f.name for f in fields(RenderPolicy)]
    known = {f.name for f in fields(RMCard)} - {"render"} | set(policy_names)
    heads = _heads_told(values, path)
    if values.get("format") == OLD_FORMAT:
        if "digests" in values:
            raise RMError(f"{path}: format is {OLD_FORMAT}, but the card has digests as those of format {FORMAT} have")
        known -= {"digests"}
        values.setdefault("pooling", "last")  # cards of before it was a choice
    if unknown := sorted(set(values) - known):
        raise RMError(f"{path}: {unknown[0]} is not a field of a card (known: {', '.join(sorted(known))})")
    if missing := sorted(known - set(values) - {"outputs", "helpfulness_head"}):
        raise RMError(f"{path}: field {missing[0]} is missing{WAY_OUT}")
    meant = {"format": FORMAT} | meaning_of(heads)
    del meant["outputs"]
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
    golden = tuple(_golden(entry, f"{path}: golden[{i}]", heads) for i, entry in enumerate(values["golden"]))
    return replace(RMCard(render=policy, **values), golden=golden)


def _heads_told(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Names of the outputs, whose meanings are checked; ("unsafety",) for cards that don't name them.

    Raises:
        RMError: an output that is unknown, gone, or means something else.
    """
    outputs, digests = values.get("outputs", {}), values.get("digests")
    if not isinstance(outputs, dict):
        raise RMError(f"{path}: outputs is a {type(outputs).__name__}{WAY_OUT}")
    for name in OUTPUTS:
        if isinstance(digests, dict) and f"outputs.{name}" in digests and name not in outputs:
            raise RMError(f"{path}: field outputs.{name} is missing{WAY_OUT}")
    for name, meaning in outputs.items():
        if meaning != OUTPUTS.get(name):
            raise RMError(
                f"{path}: outputs.{name} is {meaning!r}, this version understands {OUTPUTS.get(name, 'no such')!r} only"
            )
    return tuple(name for name in OUTPUTS if name in outputs) or ("unsafety",)


def _golden(entry: Any, where: str, heads: Sequence[str]) -> Golden:
    names = [f.name for f in fields(Golden)][: 2 + len(heads)]
    if not isinstance(entry, dict):
        raise RMError(f"{where} is a {type(entry).__name__}, expected an object{WAY_OUT}")
    if missing := [name for name in names if name not in entry]:
        raise RMError(f"{where}.{missing[0]} is missing{WAY_OUT}")
    if unknown := sorted(set(entry) - set(names)):
        raise RMError(f"{where}.{unknown[0]} is not a field of a golden answer{WAY_OUT}")
    messages, ids, *logits = (entry[name] for name in names)
    if not isinstance(messages, list):
        raise RMError(f"{where}.messages is a {type(messages).__name__}{WAY_OUT}")
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise RMError(f"{where}.input_ids is not a list of integers{WAY_OUT}")
    for name, logit in zip(names[2:], logits, strict=True):
        if type(logit) not in (int, float):
            raise RMError(f"{where}.{name} is a {type(logit).__name__}{WAY_OUT}")
        if not abs(logit) < LARGEST_LOGIT:  # nan too; JSON also holds integers that no float does
            raise RMError(f"{where}.{name} is not finite, or has no meaning as a logit{WAY_OUT}")
    return Golden(messages, ids, *logits)
