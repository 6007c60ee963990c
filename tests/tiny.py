"""Tiny models made on the spot, for tests: a policy, a backbone with a different tokenizer, a reward model.

`from tiny import tiny_policy, tiny_backbone, tiny_rm` works in every test (tests/ is on the path of pytest). Each maker
writes a Hugging Face folder in well under a second and returns its path; the same seed gives the same weights.
The backbone's weights are drawn wider than usual (std 0.25) so that hidden states depend on the whole conversation:
with the usual 0.02 all replies ending in the same token get almost one logit, and no padding mistake could be seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CORPUS = [
    "How do I bake bread at home? Mix flour, water, salt and yeast, and wait.",
    "I am sorry, but I can't help with that. It could hurt someone.",
    "Tell me about the planets, the sun and the moon.",
    "What is a good way to learn the piano? Practise a little every day.",
    "system user assistant You are a helpful assistant.",
]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _byte_bpe(special_tokens: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on CORPUS: any text can be encoded and decoded back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen's: no BOS, replies end with <|im_end|>, which is also EOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 340),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def llama3_tokenizer(
    *, pad_token: str | None = None, chat_template: str | None = LLAMA3_TEMPLATE
) -> PreTrainedTokenizerFast:
    """As Llama 3's: template *and* post-processor both write BOS; <|eot_id|> ends a turn; no pad token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core = _byte_bpe(special, 330)
    bos = core.token_to_id("<|begin_of_text|>")
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", bos)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token=pad_token
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_policy(folder: Path | str, *, seed: int = 0) -> Path:
    """A 2-layer Qwen2 causal LM (hidden 64) with its own tokenizer and a ChatML template."""
    tokenizer = qwen_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return _save(Qwen2ForCausalLM, config, tokenizer, folder, seed)


def tiny_backbone(
    folder: Path | str, *, seed: int = 1, architecture: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """A 2-layer Llama (or "qwen2", "qwen3") causal LM (hidden 32), Llama-3-like tokenizer and template."""
    tokenizer = tokenizer or llama3_tokenizer()
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(model_class, config, tokenizer, folder, seed)


def tiny_head(
    folder: Path | str,
    *,
    hidden_size: int = 32,
    hidden_dims: tuple[int, ...] = (16, 8),
    temperature: float = 1.0,
    seed: int = 2,
    pooling: str | None = None,
    output: str | None = None,
) -> Path:
    """A random MLP head in our format: head.safetensors and head.json (which says nothing of pooling if None).

    output: "helpfulness" for the second head of a folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head_tensors(hidden_size=hidden_size, hidden_dims=hidden_dims, seed=seed), folder / "head.safetensors")
    (folder / "head.json").write_text(
        json.dumps(
            {"hidden_dims": list(hidden_dims), "loss": "bce", "seed": seed, "temperature": temperature}
            | ({} if pooling is None else {"pooling": pooling})
            | ({} if output is None else {"output": output})
        )
    )
    return folder


def head_tensors(
    *, hidden_size: int = 32, hidden_dims: tuple[int, ...] = (16, 8), seed: int = 2
) -> dict[str, torch.Tensor]:
    """Weights `layers.{i}.*` (out, in) and `output_layer.*` (1, in) of a random head."""
    generator = torch.Generator().manual_seed(seed)
    tensors, width = {}, hidden_size
    for i, out in enumerate(hidden_dims):
        tensors[f"layers.{i}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        tensors[f"layers.{i}.bias"] = torch.randn(out, generator=generator) * 0.1
        width = out
    tensors["output_layer.weight"] = torch.randn(1, width, generator=generator)
    tensors["output_layer.bias"] = torch.randn(1, generator=generator) * 0.1
    return tensors


def tiny_rm(
    folder: Path | str,
    *,
    seed: int = 1,
    architecture: str = "llama",
    hidden_dims: tuple[int, ...] = (16, 8),
    tokenizer: PreTrainedTokenizerFast | None = None,
    pooling: str | None = None,
    heads: tuple[str, ...] = ("unsafety",),
    manifest: bool = False,
) -> Path:
    """A whole RM folder with its card: `tiny_backbone` and `tiny_head` merged by the real merge; the parts stay.

    heads: ("unsafety", "helpfulness") and ("helpfulness",) are the other two kinds of folder.
    manifest: keep it; without one, tests may change weights and see what finds that out.
    """
    from ups_rm.reward.merge import merge

    folder = Path(folder)
    parts = folder.parent / f"{folder.name}-parts"
    backbone = tiny_backbone(parts / "backbone", seed=seed, architecture=architecture, tokenizer=tokenizer)
    shape: dict[str, Any] = {"hidden_dims": hidden_dims, "pooling": pooling}
    helpful = tiny_head(parts / "helpful", seed=seed + 7, output="helpfulness", **shape) if len(heads) > 1 else None
    first = None if heads[0] == "unsafety" else heads[0]
    merge(backbone, tiny_head(parts / "head", seed=seed + 1, output=first, **shape), folder, helpfulness_head=helpful)
    if not manifest:
        (folder / "manifest.json").unlink()
    return folder


def _save(model_class: type, config: object, tokenizer: PreTrainedTokenizerFast, folder: Path | str, seed: int) -> Path:
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_hf_rm(
    folder: Path | str,
    *,
    kind: str = "sequence",
    architecture: str = "llama",
    labels: int = 1,
    seed: int = 3,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A plain transformers RM, 2 layers (Llama, "qwen2"): `sequence` or `token` classifier, `causal` LM as judge."""
    import transformers

    tokenizer = tokenizer or llama3_tokenizer()
    family = {"llama": "Llama", "qwen2": "Qwen2"}[architecture]
    task = {"sequence": "SequenceClassification", "token": "TokenClassification", "causal": "CausalLM"}[kind]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
    )
    return _save(getattr(transformers, f"{family}For{task}"), config, tokenizer, folder, seed)


def tiny_encoder_rm(folder: Path | str, *, seed: int = 4, type_vocab_size: int = 1) -> Path:
    """A 2-layer RoBERTa-like sequence classifier with one logit; its tokenizer joins pairs and has no template."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    core = _byte_bpe(["<s>", "<pad>", "</s>", "<unk>"], 340)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>", sep_token="</s>",
        model_max_length=200,
    )  # fmt: skip
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=210,
        initializer_range=0.25,
        type_vocab_size=type_vocab_size,
        pad_token_id=1,
        num_labels=1,
    )
    return _save(RobertaForSequenceClassification, config, tokenizer, folder, seed)
