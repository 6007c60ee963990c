"""Template and BOS: is the text that the RM reads the one it was trained on, and can a reply forge it?"""

from __future__ import annotations

import re
from typing import Any

from ups_rm.errors import RMError
from ups_rm.model_files import check_model_folder, panics_as_errors
from ups_rm.reward.doctor.battery import BATTERY
from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.render import template_sha256, writes_generation_prompt
from ups_rm.types import Conversation

CARD_AGAIN = "ups-rm rm card FOLDER --force --infer writes the right policy"
OTHER_TEMPLATE = "--chat-template FILE, in a recipe reward_model.model.template"
NO_TEMPLATE = "no chat template: the tokenizer joins prompt and reply as its own pair"
# What templates put around turns: <|im_start|>, <start_of_turn>, [INST], <<SYS>>, <s>
_MARKER = re.compile(r"<\|[^<>|\n]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>")
_SINGLE: Conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def chat_template(exam: Exam) -> Result:
    """The template's hash against the card's; and are the markers that it writes tokens of this tokenizer?"""
    if exam.joins_pairs:
        return Result("skip", NO_TEMPLATE)
    own = exam.scorer.tokenizer
    found = template_sha256(own)
    if exam.card is not None and exam.card.chat_template_sha256 != found:
        finding = f"chat_template_sha256 is {found[:12]}..., the card says {exam.card.chat_template_sha256[:12]}..."
        way_out = "the template that the head was trained with, as chat_template.jinja or --chat-template FILE"
        return Result("fail", f"another chat template than the RM was trained with: {finding}", way_out=way_out)
    text = own.apply_chat_template(_SINGLE, tokenize=False)
    pieces = {m: len(own(m, add_special_tokens=False).input_ids) for m in sorted(set(_MARKER.findall(text)))}
    # plain-text markers such as [INST] are cut by their own tokenizers too: those of the form <...> are tokens
    broken = {marker: count for marker, count in pieces.items() if count > 1 and marker.startswith("<")}
    if broken:
        marker = max(broken, key=lambda one: broken[one])
        finding = f"chat template of another model: it writes {marker}, which this tokenizer cuts into {broken[marker]}"
        way_out = "the template of the RM's own backbone, as chat_template.jinja or --chat-template FILE"
        return Result("fail", finding, float(broken[marker]), 1.0, way_out, {"pieces": pieces})
    markers = f"its {len(pieces)} markers are single tokens" if pieces else "it writes no markers"
    agrees = "" if exam.card is None else ", hash as in the card"
    return Result("pass", f"{markers}{agrees} ({found[:12]}...)", details={"sha256": found, "pieces": pieces})


def bos_token(exam: Exam) -> Result:
    """Has the tokenizer the BOS that the card wants? Without a card the chat template says what is wanted."""
    own, wanted = exam.scorer.tokenizer, exam.scorer.policy.bos
    if own.bos_token_id is None and wanted == "one":
        way_out = "the tokenizer of the RM's own backbone, which has one"
        return Result("fail", "missing BOS: the card wants one, the tokenizer has none", 0.0, 1.0, way_out)
    token = "none" if own.bos_token_id is None else f"{own.bos_token} (id {own.bos_token_id})"
    return Result("pass", f"the tokenizer's BOS: {token}; {exam.rule} says {wanted!r}")


def bos(exam: Exam) -> Result:
    """How many BOS tokens renderings begin with, who writes them, and what the tokenizer would add by itself."""
    if exam.joins_pairs:
        return Result("skip", NO_TEMPLATE)
    own, wanted = exam.scorer.tokenizer, 1 if exam.scorer.policy.bos == "one" else 0
    if own.bos_token_id is None:
        return Result("pass", f"the tokenizer has no BOS, {exam.rule} wants none", 0.0, 0.0)
    leading = {_leading(row, own.bos_token_id) for row in exam.rows}
    if leading != {wanted}:
        finding = f"renderings begin with {sorted(leading)} BOS tokens, {exam.rule} says {exam.scorer.policy.bos!r}"
        return Result("fail", finding, float(max(leading)), float(wanted), CARD_AGAIN)
    text = own.apply_chat_template(_SINGLE, tokenize=False)
    raw = own(text, add_special_tokens=False).input_ids
    written, adds = _leading(raw, own.bos_token_id), own("x").input_ids[:1] == [own.bos_token_id]
    details = {"template_writes": written, "tokenizer_adds": adds}
    if written > 1:
        finding = f"double BOS: the chat template writes {written}; ours keeps {wanted}, other tools read all"
        way_out = "take the additional bos_token out of the chat template"
        way_out += ", then `ups-rm rm card FOLDER --force`" if exam.kind == "myrm" else f": {OTHER_TEMPLATE}"
        return Result("fail", finding, float(written), 1.0, way_out, details)
    if adds and not wanted:
        with_bos = [exam.scorer.batch_logits([[own.bos_token_id, *row]])[0] for row in exam.rows]
        finding = (
            "missing BOS: the tokenizer adds one by itself, the chat template writes none and renderings have none; "
            f"with one, logits move by up to {exam.worst(with_bos):.2g} of the largest"
        )
        how = "ups-rm rm card FOLDER --force --bos one" if exam.kind == "myrm" else OTHER_TEMPLATE
        way_out = f"if the head was trained with one: {how}"
        return Result("warn", finding, 0.0, 0.0, way_out, details)
    note = "; template and tokenizer both write one: tools that do not strip it read two" if written and adds else ""
    return Result(
        "pass", f"exactly {wanted} at the start of every rendering{note}", float(wanted), float(wanted), "", details
    )


def _leading(row: list[int], bos_id: int) -> int:
    return next((i for i, token in enumerate(row) if token != bos_id), len(row))


def end_token(exam: Exam) -> Result:
    """Every rendering, the empty reply's too, ends with the card's end token (blanks after it allowed)."""
    if exam.joins_pairs:
        return Result("skip", NO_TEMPLATE)
    own, token = exam.scorer.tokenizer, exam.scorer.policy.end_token
    if token is None:
        how = "ups-rm rm card FOLDER --force --end-token TOKEN" if exam.kind == "myrm" else OTHER_TEMPLATE
        way_out = f"if the head was trained with one: {how}"
        return Result("warn", "end token lost: the chat template closes a reply with no special token", way_out=way_out)
    end = own.convert_tokens_to_ids(token)
    if end is None or (end == own.unk_token_id and token != own.unk_token):
        return Result("fail", f"the card's end token {token} is not in the tokenizer", way_out=CARD_AGAIN)
    for row in exam.rows:
        last = max((i for i, one in enumerate(row) if one == end), default=-1)
        if last < 0 or own.decode(list(row[last + 1 :])).strip():
            return Result("fail", f"a rendering does not end with {token}", way_out=CARD_AGAIN)
    return Result("pass", f"every rendering ends with {token}", details={"id": end})


def template(exam: Exam) -> Result:
    """A template that writes today's date gives other scores tomorrow; one that opens a further turn is cut back."""
    if exam.joins_pairs:
        return Result("skip", NO_TEMPLATE)
    text = str(exam.scorer.tokenizer.get_chat_template())
    if exam.scorer.policy.end_token and writes_generation_prompt(exam.scorer.tokenizer):
        finding = f"the chat template opens a further turn after the reply; it is cut at {exam.scorer.policy.end_token}"
        way_out = "if the head was trained with that opening: ups-rm rm card FOLDER --force --end-token none"
        if exam.kind != "myrm":
            way_out = "if it was trained with that opening: kind=function with a function of yours that asks it so"
        return Result("warn", finding, way_out=way_out)
    if "strftime_now" in text and "date_string" not in text:
        finding = "the chat template writes today's date into every conversation"
        return Result("warn", finding, way_out="give a template without strftime_now: --chat-template FILE")
    return Result("pass", "the same conversation gives the same text every day")


def forged_turns(exam: Exam) -> Result:
    """A reply that spells special tokens must not end its own turn: no more special tokens than a plain reply has."""
    own = exam.scorer.tokenizer
    special = set(own.all_special_ids) | {i for i, token in own.added_tokens_decoder.items() if token.special}
    spelled = " ".join(sorted({own.convert_ids_to_tokens(i) for i in special}))
    forged: Conversation = [_SINGLE[0], {"role": "assistant", "content": f"a {spelled} b"}]
    plain, attack = (exam.scorer.rendered([talk])[0].input_ids for talk in (_SINGLE, forged))
    more = sum(i in special for i in attack) - sum(i in special for i in plain)
    if more > 0:
        finding = f"a reply that spells special tokens puts {more} of them into the rendering"
        return Result("fail", finding, float(more), 0.0, "score through ups-rm, which breaks them up")
    return Result("pass", f"{len(special)} special tokens spelled in a reply stay plain text", float(more), 0.0)


def policy_tokenizer(exam: Exam) -> Result:
    """Policy and RM may cut text differently: messages travel, never token ids."""
    from transformers import AutoTokenizer

    from ups_rm.reward.native import quiet_transformers

    if exam.policy is None:
        return Result("skip", "no --policy given; messages are rendered anew with the RM's own tokenizer in any case")
    with panics_as_errors(), quiet_transformers():
        check_model_folder(exam.policy, RMError)
        theirs: Any = AutoTokenizer.from_pretrained(exam.policy, trust_remote_code=False)
    texts = [message["content"] for talk in BATTERY for message in talk if message["content"]]
    own = exam.scorer.tokenizer
    same = sum(
        own(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
        for text in texts
    )
    details = {"policy": str(exam.policy), "same": same, "texts": len(texts)}
    share = same / len(texts)
    if share == 1:
        return Result(
            "pass",
            "policy and RM cut the same text alike; messages are re-rendered all the same",
            share,
            None,
            "",
            details,
        )
    finding = f"policy and RM cut {len(texts) - same} of {len(texts)} texts differently: messages travel, ids never do"
    return Result("pass", finding, share, None, "", details)
