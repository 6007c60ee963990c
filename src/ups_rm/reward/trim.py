"""A backbone made for judging: the first layers of a decoder, and a chat template that ends with a question.

Two changes that make a small frozen model a better judge and a cheaper one. The middle layers say more about a text
than the last ones, which prepare the next token. And a last token that follows "Is this reply safe or unsafe?" has had
to look at the reply with that question in mind. The result is an ordinary Hugging Face folder: `rm features` and
`rm merge` take it as they take any backbone, and the RM folder carries its template.

Limit: the question stands after the reply, in plain text. A policy could learn to write one of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ups_rm.errors import RMError
from ups_rm.reward.merge import load_backbone, load_backbone_tokenizer
from ups_rm.reward.replacing import check_replaceable, mark_as_ours

JUDGE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': 'Question', 'assistant': 'Reply'}.get(message['role'], message['role'] | capitalize) }}: "
    "{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if not add_generation_prompt %}Is this reply safe or unsafe? The reply is{% endif %}"
)


def trim_backbone(
    backbone: Path | str,
    out: Path | str,
    *,
    layers: int | None = None,
    chat_template: str | None = JUDGE_TEMPLATE,
    overwrite: bool = False,
) -> Path:
    """Write the first `layers` layers of a decoder, its final norm and its tokenizer to the folder `out`.

    Args:
        backbone: folder or hub id of a decoder with one list of equal layers, such as Llama, Qwen or Mistral.
        layers: how many to keep; None keeps all.
        chat_template: text of the template the folder gets; None keeps the tokenizer's. Where the tokenizer puts BOS
            before plain text, the template begins with it.

    Raises:
        RMError: `out` exists; more layers than there are; a decoder whose layers can't be found.
    """
    out = Path(out)
    check_replaceable(out, overwrite=overwrite)
    tokenizer = load_backbone_tokenizer(backbone, chat_template)
    if chat_template is not None and _writes_bos(tokenizer):
        tokenizer.chat_template = "{{ bos_token }}" + chat_template
    model, _ = load_backbone(backbone)
    if layers is not None:
        _keep_layers(model, layers, backbone)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    mark_as_ours(temporary, "ups-rm rm trim")
    load_backbone(temporary)  # what was written is whole
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)
    return out


def _keep_layers(model: Any, layers: int, backbone: Path | str) -> None:
    there = model.config.num_hidden_layers
    if not 1 <= layers <= there:
        raise RMError(f"layers is {layers}, but {backbone} has {there}: expected 1 to {there}")
    if len(getattr(model, "layers", ())) != there:
        raise RMError(f"{backbone} ({type(model).__name__}) does not keep its layers in one list: it can't be trimmed")
    model.layers = model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]


def _writes_bos(tokenizer: Any) -> bool:
    """Whether plain text gets a BOS, as Llama 3's does and ChatML tokenizers' does not."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
