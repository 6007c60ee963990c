"""Reward models of plain transformers with one logit: sequence classifiers and token classifiers, as a RewardScorer.

transformers' decoders find a reply's last token by comparing ids with the pad id, which fails where pad is also EOS or
is missing. Here the last *attended* token is read by the mask, for every class that has its logits per token; encoders
(BERT, DeBERTa) pool by themselves and get the tokenizer's own padding id. Heads are computed in float32.

Loading is strict: a weight that is missing would be drawn at random, so it is an error by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ups_rm.control_tokens import ControlTokens
from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import RMError
from ups_rm.model_files import check_model_folder, refused_pickle
from ups_rm.reward.merge import DROPPABLE
from ups_rm.reward.native import load_tokenizer, quiet_transformers, read_config, rm_folder
from ups_rm.reward.render import Rendered, RenderPolicy, checked_messages
from ups_rm.reward.scorer import RewardScorer, default_max_length
from ups_rm.types import Conversation

if TYPE_CHECKING:
    import torch

AUTO_CLASSES = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
}


class OneLogit:
    """A transformers model as the scorer wants one: (input_ids, attention_mask) -> `.logits` of shape (B, 1)."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model = model
        self.kind = kind
        # decoders keep their linear head in `score`; encoders pool before theirs, which may be `classifier`
        self.head = getattr(model, "score", None) if kind == "sequence" else None
        self.is_encoder = kind == "sequence" and self.head is None
        if self.head is not None:
            self.head.float()

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if self.is_encoder:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.kind == "token":
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # (B, T, 1), ours: (B, 1)
            logits = logits if logits.dim() == 2 else last_attended(logits, attention_mask)
            return SimpleNamespace(logits=logits)
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.head(last_attended(hidden, attention_mask).float()))  # type: ignore[misc]


def last_attended(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What stands at the last position with mask 1. Shapes (B, T, H), (B, T) -> (B, H)."""
    import torch

    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


class PairEncodingScorer(RewardScorer):
    """For encoders without a chat template: the tokenizer's own pair of (all before the reply, the reply)."""

    def rendered(self, conversations: Sequence[Conversation], policy: RenderPolicy | None = None) -> list[Rendered]:
        """As RewardScorer.rendered; turns before the reply are joined by newlines.

        Raises:
            RMError: a malformed conversation; an encoder that tells the two parts apart by token types.
        """
        tokens, chosen = ControlTokens.of(self.tokenizer), policy or self.policy
        return [self._encode(checked_messages(one, i, tokens), chosen) for i, one in enumerate(conversations)]

    def _encode(self, messages: Conversation, policy: RenderPolicy) -> Rendered:
        before = "\n".join(message["content"] for message in messages[:-1])
        reply, limit = messages[-1]["content"], policy.max_length
        # lists: of a single text the tokenizer takes an empty second part for none at all
        encoded = self.tokenizer([before], [reply], return_token_type_ids=True, verbose=False)
        if any(encoded["token_type_ids"][0]) and getattr(self.model.model.config, "type_vocab_size", 0) > 1:
            raise RMError(
                "this encoder tells prompt and reply apart by token types, which the scorer does not pass on\n"
                "  fix: kind=function with a function of yours that asks it"
            )
        ids = list(encoded["input_ids"][0])
        if len(ids) <= limit:
            return Rendered(ids, False)
        self.tokenizer.truncation_side = policy.truncation_side
        cut = self.tokenizer([before], [reply], truncation="longest_first", max_length=limit, verbose=False)
        return Rendered(list(cut["input_ids"][0]), True)


def load_hf_model(
    folder: Path | str,
    kind: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The folder through AutoModelFor..., in eval mode.

    Args:
        kind: sequence, token or causal.

    Raises:
        RMError: it can't be read, or weights are missing, left over or of another shape (by name).
    """
    import transformers

    path = rm_folder(folder)
    check_model_folder(path, RMError, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet_transformers():
            model, info = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(
                path, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # transformers raises many classes
        if refused := refused_pickle(error):
            raise RMError(f"{path} can't be loaded: {refused}") from error
        raise RMError(
            f"{path} can't be loaded by {AUTO_CLASSES[kind]}: {type(error).__name__}: {error}\n"
            "  fix: the right kind; if the folder has Python files of its own: trust_remote_code"
        ) from error
    problems = {
        "missing": [str(key) for key in info["missing_keys"]],
        "unexpected": [str(key) for key in info["unexpected_keys"] if not DROPPABLE.search(str(key))],
        "of another shape": [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]],
    }
    told = [f"{what}: {', '.join(sorted(names)[:8])}" for what, names in problems.items() if names]
    if told:
        raise RMError(
            f"{path} is not a whole {AUTO_CLASSES[kind]}; weights {'; '.join(told)}\n"
            "  fix: the kind that the folder was saved as: with another one its head would be drawn at random"
        )
    return model.eval().requires_grad_(False).to(device)


def load_hf_scorer(
    folder: Path | str,
    kind: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    max_batch_tokens: int = 8192,
    chat_template: str | None = None,
) -> RewardScorer:
    """A sequence or token classifier with one logit as a scorer; its number's sign is as the model has it.

    Args:
        kind: sequence or token.
        chat_template: text of a template, for tokenizers without one. An encoder without any gets prompt and reply as
            its tokenizer's own pair.

    Raises:
        RMError: see `load_hf_model`; more than one label; no chat template.
    """
    path, device = rm_folder(folder), str(torch_device(device))
    number_format = compute_dtype(dtype, device)
    config = read_config(path)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    model = load_hf_model(path, kind, dtype=number_format, device=device, trust_remote_code=trust_remote_code)
    labels = getattr(model.config, "num_labels", 1)
    if labels != 1:
        names = ", ".join(map(str, model.config.id2label.values()))
        raise RMError(
            f"{path} has {labels} labels ({names}), a reward model has one\n"
            "  fix: kind=function with a function of yours that makes one number of them"
        )
    limit = default_max_length(config, tokenizer)
    wrapped = OneLogit(model, kind)
    made: type[RewardScorer] = RewardScorer
    if wrapped.is_encoder and not tokenizer.chat_template:
        made, policy = PairEncodingScorer, RenderPolicy("none", None, "left", limit)
    else:
        policy = RenderPolicy.infer(tokenizer, max_length=limit)
    return made(
        wrapped,
        tokenizer,
        policy,
        device=device,
        dtype=number_format,
        max_batch_tokens=max_batch_tokens,
        native=False,
        pad_id=(tokenizer.pad_token_id or 0) if wrapped.is_encoder else 0,
    )
