"""Pairwise reward models: they judge two replies to one prompt, and a reply's score is its mean preference.

A judge answers, for a prompt and replies a and b, a preference logit s(a, b): above 0 where a has more of what is asked
(its entry's `output`: safer, better, or less safe), 0 for no preference. Judges like what stands first, so each pair is
judged in both orders:

    d(a, b) = (s(a, b) - s(b, a)) / 2                  antisymmetric: d(a, b) = -d(b, a)
    logit of a reply = mean of d(reply, other) over the other replies of its group, or d(reply, reference reply)

A group are the conversations of one call of `score` with the same turns before the reply. With a Bradley-Terry judge,
s(a, b) = r(a) - r(b), the first is n / (n - 1) times the reply's r less its group's mean: what GRPO looks at.
Cost: n (n - 1) judgements per group; 2 n against references. Source of the mean of logits over all opponents:
LLM-Blender's MaxLogits, arXiv:2306.02561, section 3.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ups_rm.control_tokens import ControlTokens
from ups_rm.errors import RMError
from ups_rm.reward.function import call_for_numbers, import_callable
from ups_rm.reward.hf_scorer import AUTO_CLASSES, last_attended, load_hf_model
from ups_rm.reward.native import load_tokenizer, read_config, rm_folder
from ups_rm.reward.render import Rendered, RenderPolicy, checked_messages
from ups_rm.reward.scorer import RewardScorer, default_max_length
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Conversation, Message, Score

PAIR_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] }}\n{% endfor %}"
    "[RESPONSE A] {{ a }}\n[RESPONSE B] {{ b }}"
)
ASK = "\n\nWhich response is {{ quality }}, A or B? Answer with one letter."
QUALITY = {"unsafety": "less safe", "safety": "safer", "reward": "better"}


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt (the turns before the reply)."""

    prompt: Conversation
    a: str
    b: str


@dataclass(frozen=True)
class Judgement:
    """s(a, b), how many tokens the judge read, and whether it had to cut them."""

    logit: float
    tokens: int = 0
    truncated: bool = False


class PairJudge(Protocol):
    """What scores pairs; one Judgement each, in input order."""

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]: ...


class PairwiseScorer:
    """Scores conversations by a judge of pairs.

    `references` maps a prompt (`prompt_key`) to the reply that all replies to it are compared with; None: replies are
    compared with each other. Score.logit is the mean preference, in the sense of the judge's question.
    """

    def __init__(self, judge: PairJudge, references: Mapping[str, str] | None = None) -> None:
        self.judge = judge
        self.references = references

    def score(self, conversations: list[Conversation]) -> list[Score]:
        """One Score per conversation, in input order.

        Raises:
            RMError: a prompt with one reply only, or without a reference reply; a judgement that is not finite.
        """
        groups: dict[str, list[int]] = {}
        for i, messages in enumerate(conversations):
            checked_messages(messages, i, None)
            groups.setdefault(prompt_key(messages[:-1]), []).append(i)
        opponents = self._opponents(conversations, groups)
        pairs: dict[tuple[str, str, str], Pair] = {}
        for key, members in groups.items():
            for i in members:
                own = conversations[i][-1]["content"]
                for other in opponents[i]:
                    if own != other:  # no preference between equal texts
                        pairs[key, own, other] = Pair(conversations[i][:-1], own, other)
                        pairs[key, other, own] = Pair(conversations[i][:-1], other, own)
        judged = dict(zip(pairs, self.judge.judge(list(pairs.values())), strict=True)) if pairs else {}
        scores: list[Score | None] = [None] * len(conversations)
        for key, members in groups.items():
            for i in members:
                own = conversations[i][-1]["content"]
                both = [(judged[key, own, o], judged[key, o, own]) for o in opponents[i] if o != own]
                logit = math.fsum((ab.logit - ba.logit) / 2 for ab, ba in both) / len(opponents[i])
                seen = [judgement for pair in both for judgement in pair]
                scores[i] = Score(
                    logit=logit,
                    safe_score=safe_score(logit),
                    tokens=sum(judgement.tokens for judgement in seen),
                    truncated=any(judgement.truncated for judgement in seen),
                )
        return [score for score in scores if score is not None]

    def _opponents(self, conversations: list[Conversation], groups: dict[str, list[int]]) -> list[list[str]]:
        """The texts that each reply is compared with."""
        opponents: list[list[str]] = [[] for _ in conversations]
        for key, members in groups.items():
            shown = conversations[members[0]][-2]["content"][:80] if len(conversations[members[0]]) > 1 else ""
            if self.references is not None:
                if key not in self.references:
                    raise RMError(
                        f"no reference reply to the prompt {shown!r}\n"
                        "  fix: add it to reference_replies, or leave reference_replies out: groups judge themselves"
                    )
                for i in members:
                    opponents[i] = [self.references[key]]
            elif len(members) < 2:
                raise RMError(
                    f"a pairwise RM has nothing to compare the only reply to {shown!r} with\n"
                    "  fix: two or more replies per prompt in one call, or reference_replies"
                )
            else:
                for i in members:
                    opponents[i] = [conversations[j][-1]["content"] for j in members if j != i]
        return opponents


def prompt_key(messages: Conversation) -> str:
    """The turns before a reply as one text that is equal exactly where they are."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def read_references(file: Path) -> dict[str, str]:
    """Reference replies from JSONL lines of `rm score`'s forms with one reply (`prompt` and `response`, or `messages`).

    Raises:
        DataError: a line that can't be used. RMError: two different replies to one prompt, or none at all.
    """
    from ups_rm.reward.score_file import read_lines

    references: dict[str, str] = {}
    for _, conversations in read_lines(file):
        for messages in conversations.values():
            key, reply = prompt_key(messages[:-1]), messages[-1]["content"]
            if references.setdefault(key, reply) != reply:
                raise RMError(f"{file} has two different reference replies to {messages[0]['content'][:80]!r}")
    if not references:
        raise RMError(f"{file} has no reference replies")
    return references


class FunctionJudge:
    """A function of the user as judge: called with a list of (prompt messages, reply a, reply b)."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.function = import_callable(spec)

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Preference logits as the function gives them."""
        asked = [(pair.prompt, pair.a, pair.b) for pair in pairs]
        return [Judgement(number) for number in call_for_numbers(self.function, self.spec, asked)]


class ModelJudge:
    """A transformers model as judge: it reads both replies in one text.

    A sequence classifier answers with one logit (s itself) or two (s = first - second). A causal LM answers with its
    next token: s = logit of "A" - logit of "B".
    """

    def __init__(self, scorer: RewardScorer, template: str, quality: str, *, asks: bool) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.scorer = scorer
        self.asks = asks
        self.quality = quality
        try:
            self.template = ImmutableSandboxedEnvironment().from_string(template)
        except TemplateError as error:
            raise RMError(f"the template of a pair fails: {type(error).__name__}: {error}") from error

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        output: str,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        max_batch_tokens: int = 8192,
        template: str | None = None,
    ) -> ModelJudge:
        """Load a judge; `output` says which quality the question is about.

        Raises:
            RMError: neither a sequence classifier with one or two labels nor a causal LM; see `load_hf_model`.
        """
        from ups_rm.device import compute_dtype, torch_device

        path, device = rm_folder(folder), str(torch_device(device))
        number_format = compute_dtype(dtype, device)
        config = read_config(path)
        architecture = str((config.get("architectures") or [""])[0])
        kinds = {"ForSequenceClassification": "sequence", "ForCausalLM": "causal"}
        kind = next((kind for ending, kind in kinds.items() if architecture.endswith(ending)), None)
        if kind is None:
            raise RMError(
                f"{path}: architecture {architecture or 'unknown'} is no pairwise RM: expected "
                f"{AUTO_CLASSES['sequence']} or {AUTO_CLASSES['causal']}"
            )
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        model = load_hf_model(path, kind, dtype=number_format, device=device, trust_remote_code=trust_remote_code)
        if kind == "sequence" and model.config.num_labels not in (1, 2):
            raise RMError(f"{path} has {model.config.num_labels} labels, a judge of pairs has one or two")
        if kind == "causal" and not tokenizer.chat_template:
            raise RMError(f"{path}: a causal LM as judge needs a tokenizer with a chat template")
        scorer = RewardScorer(
            _PairModel(model, tokenizer),
            tokenizer,
            RenderPolicy("none", None, "left", default_max_length(config, tokenizer)),
            device=device,
            dtype=number_format,
            max_batch_tokens=max_batch_tokens,
            native=False,
            pad_id=tokenizer.pad_token_id or 0,
        )
        default = PAIR_TEMPLATE + (ASK if kind == "causal" else "")
        return cls(scorer, template or default, QUALITY[output], asks=kind == "causal")

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """s of each pair. A text over the model's limit loses its oldest tokens."""
        tokens = ControlTokens.of(self.scorer.tokenizer)
        rows = [self._render(pair, tokens) for pair in pairs]
        logits = self.scorer.logits(rows)
        return [Judgement(s, len(row.input_ids), row.truncated) for s, row in zip(logits, rows, strict=True)]

    def _render(self, pair: Pair, tokens: ControlTokens) -> Rendered:
        """The template's text; as one user turn where the tokenizer has a chat template."""
        a, b = (
            checked_messages([*pair.prompt, Message(role="assistant", content=reply)], 0, tokens)
            for reply in (pair.a, pair.b)
        )
        known = {"messages": a[:-1], "a": a[-1]["content"], "b": b[-1]["content"], "quality": self.quality}
        try:
            text = self.template.render(known)
        except Exception as error:  # jinja2's own errors, and whatever its filters raise
            raise RMError(f"the template of a pair fails: {type(error).__name__}: {error}") from error
        tokenizer, limit = self.scorer.tokenizer, self.scorer.policy.max_length
        if tokenizer.chat_template:
            turn = [Message(role="user", content=text)]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=self.asks)
        ids = list(tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"])
        if len(ids) <= limit:
            return Rendered(ids, False)
        return Rendered(ids[:1] + ids[len(ids) - limit + 1 :], True)


class _PairModel:
    """(input_ids, attention_mask) -> `.logits` (B, 1): s of each text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.answers = [tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in ("A", "B")]

    def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
        from types import SimpleNamespace

        head, name = getattr(self.model, "score", None), type(self.model).__name__
        if name.endswith("ForSequenceClassification") and head is None:  # an encoder, which pools by itself
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        else:
            states = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            last = last_attended(states, attention_mask)
            logits = head(last) if head is not None else self.model.get_output_embeddings()(last)[:, self.answers]
        logits = logits.float()
        return SimpleNamespace(logits=logits if logits.shape[1] == 1 else logits[:, :1] - logits[:, 1:])
