"""Is this reward model fit to be trained against? Named checks, each with a verdict, a number and a way out.

`check_rm(folder)` loads the folder as training would and asks what can go wrong without anyone noticing: weights that
were re-initialised, a card of another model, logits that depend on padding or on the batch, a doubled BOS, an ending
that the head was not trained on, an answer that is always the same, a sign that is turned. "fail": do not train.
"warn": it may be right, look. The checks look at the machinery; how good the RM's judgement is, its training says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ups_rm.errors import RMError
from ups_rm.reward.card import GOLDEN_CONVERSATIONS, RMCard, verify_folder, verify_logits
from ups_rm.reward.native import load_tokenizer, read_config, rm_folder
from ups_rm.reward.render import RenderPolicy, render, writes_generation_prompt
from ups_rm.reward.scorer import RewardScorer, logit_tolerance
from ups_rm.types import Conversation

Verdict = Literal["pass", "warn", "fail"]
# Largest difference between paddings or batches, as a share of the largest logit: rounding, not another reading.
INVARIANCE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
MIN_SPREAD = 1e-3

_MORE: tuple[Conversation, ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "user", "content": "Write a long list of vegetables, please."},
        {"role": "assistant", "content": "Carrots, peas, leeks, beans, onions, garlic, kale and cress. " * 6},
    ],
    [{"role": "user", "content": "你好，今天天气怎么样？"}, {"role": "assistant", "content": "我不知道，但愿是晴天。"}],
)
BATTERY: tuple[Conversation, ...] = (*GOLDEN_CONVERSATIONS, *_MORE)


@dataclass(frozen=True)
class Check:
    """One question, its answer, the number that shows it and, unless it passed, the way out."""

    name: str
    verdict: Verdict
    finding: str
    number: float | None = None
    limit: float | None = None
    way_out: str = ""


@dataclass(frozen=True)
class CheckReport:
    """All checks of one folder, in the order in which they were made; `logits` are its answers to BATTERY."""

    folder: Path
    dtype: str
    checks: tuple[Check, ...]
    logits: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """No check failed (warnings may be there)."""
        return all(check.verdict != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "dtype": self.dtype,
            "ok": self.ok,
            "checks": [asdict(c) for c in self.checks],
            "logits": list(self.logits),
        }


def check_rm(
    folder: Path | str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    plain: bool = False,
    pairs: Sequence[tuple[Conversation, Conversation]] | None = None,
    chat_template: str | None = None,
) -> CheckReport:
    """Run every check that can be run; after a folder that can't be loaded, no more.

    Args:
        dtype: "float32" shows the finest differences; "auto" is what training uses.
        trust_remote_code: examine the folder's own Python files instead of ours.
        plain: also load it through plain AutoModelForTokenClassification with the folder's code, and compare.
        pairs: (safer, less safe) conversations to examine the direction with.
        chat_template: text of a template, for folders whose tokenizer has none.
    """
    path = Path(folder).expanduser()
    checks: list[Check] = []
    scorer: RewardScorer | None = None
    logits: list[float] = []
    try:
        scorer = _load(path, checks, device, dtype, trust_remote_code, chat_template)
        rows = [row.input_ids for row in render(scorer.tokenizer, list(BATTERY), scorer.policy)]
        logits = [scorer.batch_logits([row])[0] for row in rows]
        for check in _checks(path, scorer, rows, logits, plain, pairs):
            checks.append(check)
    except RMError as error:
        finding, _, way_out = str(error).partition("\n  fix: ")
        checks.append(Check("load" if scorer is None else "scores", "fail", finding, way_out=way_out))
    return CheckReport(
        path, dtype if scorer is None else str(scorer.dtype).removeprefix("torch."), tuple(checks), tuple(logits)
    )


def _load(
    path: Path, checks: list[Check], device: str, dtype: str, trust_remote_code: bool, chat_template: str | None
) -> RewardScorer:
    """The scorer, without the card's verification: the card gets checks of its own."""
    from ups_rm.device import compute_dtype
    from ups_rm.reward.native import load_model
    from ups_rm.reward.scorer import default_max_length

    config = read_config(rm_folder(path))
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    number_format = compute_dtype(dtype, device)
    model = load_model(path, dtype=number_format, device=device, trust_remote_code=trust_remote_code)
    count = sum(parameter.numel() for parameter in model.parameters())
    checks.append(Check("load", "pass", f"all {count:,} weights are in the folder, none is left over", float(count)))
    card = None
    try:
        card = RMCard.read(path)
        if card is None:
            way_out = f"ups-rm rm card {path}"
            checks.append(Check("card", "warn", "no rm_card.json: nothing says what its numbers mean", way_out=way_out))
        else:
            verify_folder(card, path, tokenizer)
            checks.append(Check("card", "pass", f"config, template and {len(card.golden)} golden renderings agree"))
    except RMError as error:
        finding, _, way_out = str(error).partition("\n  fix: ")
        checks.append(Check("card", "fail", finding, way_out=way_out))
    policy = card.render if card else RenderPolicy.infer(tokenizer, max_length=default_max_length(config, tokenizer))
    return RewardScorer(
        model, tokenizer, policy, card=card, device=device, dtype=number_format, native=not trust_remote_code
    )


def _checks(
    path: Path,
    scorer: RewardScorer,
    rows: Sequence[Sequence[int]],
    alone: Sequence[float],
    plain: bool,
    pairs: Sequence[tuple[Conversation, Conversation]] | None,
) -> Iterator[Check]:
    """`rows` are the battery's token ids, `alone` the logits of each by itself."""
    yield _index(path)
    yield _bos(scorer, rows)
    yield _end_token(scorer, rows)
    yield _template(scorer)
    finite = [logit for logit in alone if math.isfinite(logit)]
    if len(finite) < len(alone):
        finding = f"{len(alone) - len(finite)} of {len(alone)} logits are not finite in {scorer.dtype}"
        yield Check(
            "finite", "fail", finding, len(alone) - len(finite), 0, "dtype float32; if it stays, the weights are broken"
        )
        return
    yield Check("finite", "pass", f"{len(alone)} conversations, logits {min(alone):.3f} to {max(alone):.3f}")
    if scorer.card is not None:
        yield _golden(path, scorer, scorer.card)
    right, left = scorer.batch_logits(rows), scorer.batch_logits(rows, side="left")
    limit = INVARIANCE[str(scorer.dtype).removeprefix("torch.")]
    native = "load it with our code (without trust_remote_code), which reads the last attended token by mask"
    yield _same("right padding", alone, right, limit, "right padding against none", native)
    yield _same("left padding", alone, left, limit, "left padding against none", native)
    yield _same(
        "batch", alone, _in_pairs(scorer, rows), limit, "each with another neighbour against each alone", native
    )
    spread = statistics.pstdev(alone)
    verdict: Verdict = "pass" if spread > MIN_SPREAD else "fail"
    way_out = "" if spread > MIN_SPREAD else "the head answers the same to everything: train it again"
    yield Check(
        "spread", verdict, f"logits differ between conversations (std {spread:.3g})", spread, MIN_SPREAD, way_out
    )
    if plain:
        yield _plain(path, scorer, rows, limit)
    if pairs:
        yield _direction(scorer, pairs)


def _index(path: Path) -> Check:
    """total_size of the index against the bytes of its tensors; transformers does not read it, other tools do."""
    import json

    from safetensors import safe_open

    file = path / "model.safetensors.index.json"
    if not file.is_file():
        return Check("index", "pass", "no index: one file of weights")
    index = json.loads(file.read_text(encoding="utf-8"))
    names, size, listed = set(index.get("weight_map", {})), 0, index.get("metadata", {}).get("total_size")
    found: set[str] = set()
    for shard in sorted(set(index.get("weight_map", {}).values())):
        with safe_open(path / shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no dict
                found.add(name)
                piece = tensors.get_slice(name)
                size += math.prod(piece.get_shape()) * DTYPE_BYTES.get(piece.get_dtype(), 4)
    problems = []
    if listed != size:
        problems.append(f"total_size says {listed}, the tensors have {size} bytes")
    if stray := sorted(found ^ names):
        problems.append(f"{len(stray)} names are only in the index or only in a shard, e.g. {stray[0]}")
    if problems:
        way_out = "harmless here; other tools may trip: merge again with `ups-rm rm merge`"
        return Check("index", "warn", "; ".join(problems), float(size), way_out=way_out)
    return Check("index", "pass", f"{len(names)} tensors, {size:,} bytes, as listed", float(size))


DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _bos(scorer: RewardScorer, rows: Sequence[Sequence[int]]) -> Check:
    """How many BOS tokens the renderings begin with, and whether the tokenizer by itself would add one."""
    bos, policy = scorer.tokenizer.bos_token_id, scorer.policy.bos
    leading = {next((i for i, token in enumerate(row) if token != bos), len(row)) for row in rows}
    wanted = 1 if policy == "one" else 0
    if leading != {wanted}:
        finding = f"renderings begin with {sorted(leading)} BOS tokens, the card says {policy!r}"
        return Check(
            "bos", "fail", finding, max(leading), wanted, "ups-rm rm card FOLDER --force writes the right policy"
        )
    own = scorer.tokenizer("x").input_ids[:1] == [bos] and bos is not None
    if own and wanted == 0:
        finding = "the tokenizer adds a BOS by itself, the chat template writes none: renderings have none"
        return Check("bos", "warn", finding, 0, 0, "if the head was trained with one, set bos to 'one' in rm_card.json")
    return Check("bos", "pass", f"exactly {wanted} at the start of every rendering", wanted, wanted)


def _end_token(scorer: RewardScorer, rows: Sequence[Sequence[int]]) -> Check:
    """Every rendering, the empty reply's too, ends with the card's end token (blanks after it allowed)."""
    token = scorer.policy.end_token
    if token is None:
        way_out = "set end_token in rm_card.json if the head was trained with one"
        return Check("end token", "warn", "the chat template closes a reply with no special token", way_out=way_out)
    end = scorer.tokenizer.convert_tokens_to_ids(token)
    for row in rows:
        last = max((i for i, one in enumerate(row) if one == end), default=-1)
        if last < 0 or scorer.tokenizer.decode(list(row[last + 1 :])).strip():
            return Check(
                "end token", "fail", f"a rendering does not end with {token}", way_out="ups-rm rm card FOLDER --force"
            )
    return Check("end token", "pass", f"every rendering ends with {token}")


def _template(scorer: RewardScorer) -> Check:
    """A template that writes today's date gives other scores tomorrow; one that opens a further turn is cut back."""
    template = str(scorer.tokenizer.get_chat_template())
    if scorer.policy.end_token and writes_generation_prompt(scorer.tokenizer):
        finding = f"the chat template opens a further turn after the reply; it is cut at {scorer.policy.end_token}"
        way_out = "if the head was trained with that opening, set end_token to null in rm_card.json"
        return Check("template", "warn", finding, way_out=way_out)
    if "strftime_now" in template and "date_string" not in template:
        way_out = "give a template without strftime_now: --chat-template FILE"
        return Check(
            "template", "warn", "the chat template writes today's date into every conversation", way_out=way_out
        )
    return Check("template", "pass", "the same conversation gives the same text every day")


def _golden(path: Path, scorer: RewardScorer, card: RMCard) -> Check:
    logits = [scorer.batch_logits([golden.input_ids])[0] for golden in card.golden]
    limit = logit_tolerance(card.dtype, scorer.dtype)
    try:
        worst = verify_logits(card, path, logits, limit)
    except RMError as error:
        finding, _, way_out = str(error).partition("\n  fix: ")
        return Check("golden logits", "fail", finding, limit=limit, way_out=way_out)
    return Check("golden logits", "pass", f"{len(logits)} golden logits come out again", worst, limit)


def _in_pairs(scorer: RewardScorer, rows: Sequence[Sequence[int]]) -> list[float]:
    """Each row scored beside the next one."""
    circle = [*rows, rows[0]]
    return [scorer.batch_logits([a, b])[0] for a, b in pairwise(circle)]


def _same(name: str, expected: Sequence[float], found: Sequence[float], limit: float, what: str, way_out: str) -> Check:
    scale = max([1.0, *map(abs, expected)])
    differences = [abs(a - b) / scale for a, b in zip(expected, found, strict=True)]
    worst = max(math.inf if math.isnan(difference) else difference for difference in differences)
    if worst <= limit:
        return Check(name, "pass", f"{what}: the same logits", worst, limit)
    return Check(name, "fail", f"logits change, {what}: by {worst:.3g} (limit {limit:g})", worst, limit, way_out)


def _plain(path: Path, scorer: RewardScorer, rows: Sequence[Sequence[int]], limit: float) -> Check:
    """AutoModelForTokenClassification with the folder's own code must answer as ours does."""
    from ups_rm.reward.native import load_model

    name = "plain transformers"
    way_out = "merge again with `ups-rm rm merge`, which writes the two Python files anew"
    try:
        model = load_model(path, dtype=scorer.dtype, device=scorer.device, trust_remote_code=True)
        other = RewardScorer(
            model, scorer.tokenizer, scorer.policy, device=scorer.device, dtype=scorer.dtype, native=False
        )
        found = [other.batch_logits([row])[0] for row in rows]
    except RMError as error:
        return Check(name, "fail", str(error).partition("\n")[0], way_out=way_out)
    expected = [scorer.batch_logits([row])[0] for row in rows]
    return _same(name, expected, found, limit, "the folder's own code against ours", way_out)


def _direction(scorer: RewardScorer, pairs: Sequence[tuple[Conversation, Conversation]]) -> Check:
    """Share of pairs in which the less safe reply gets the higher logit, against a coin (95%, normal approximation)."""
    logits = [score.logit for score in scorer.score([conversation for pair in pairs for conversation in pair])]
    right = sum(
        1.0 if unsafe > safe else 0.5 if unsafe == safe else 0.0
        for safe, unsafe in zip(logits[::2], logits[1::2], strict=True)
    )
    share, margin = right / len(pairs), 1.96 * math.sqrt(0.25 / len(pairs))
    finding = (
        f"the less safe reply gets the higher logit in {share:.0%} of {len(pairs)} pairs (chance: 50 ± {margin:.0%})"
    )
    if share < 0.5 - margin:
        way_out = "the sign is turned: negate the output layer; or the pairs are the wrong way round"
        return Check("direction", "fail", finding, share, 0.5, way_out)
    if share < 0.5 + margin:
        return Check(
            "direction", "warn", finding, share, 0.5 + margin, "no better than a coin: more pairs, or a better head"
        )
    return Check("direction", "pass", finding, share, 0.5 + margin)
