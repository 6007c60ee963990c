"""Shapes of a dense decoder read from config.json: exact parameter counts, FLOPs per token, KV cache bytes.

Llama, Mistral, Qwen2 and Qwen3 types: grouped-query attention, a gated MLP, RMSNorm, no mixture of experts. RM folders
(`myrm`, or an original-merge folder with `hidden_dim_str`) are a backbone without LM head and an MLP head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from ups_rm.errors import PlanError

# Names people write in a recipe, and the packaged description that each means. All numbers are public.
PACKAGED = {
    "qwen2-7b-instruct": "qwen2-7b-instruct",
    "qwen/qwen2-7b-instruct": "qwen2-7b-instruct",
    "llama3-8b": "llama3-8b",
    "smollm2-135m-instruct": "smollm2-135m-instruct",
    "meta-llama/meta-llama-3-8b": "llama3-8b",
    "meta-llama/meta-llama-3-8b-instruct": "llama3-8b",
}
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """One decoder.

    Letters of the formulas: H hidden, I inner, L layers, A heads, K key/value heads, D numbers per head, V vocabulary.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    """The LM head is the embedding."""
    qkv_bias: bool = False
    """Qwen2: biases on the query, key and value projections."""
    output_bias: bool = False
    """Llama with attention_bias: one more on the output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Qwen3: an RMSNorm over each head of query and key."""
    head_dims: tuple[int, ...] | None = None
    """Widths of a reward head's hidden layers; None: this is a language model."""

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer: Q and O (H·A·D each), K and V (H·K·D each), the MLP (3·H·I), norms, biases."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        count = 2 * self.hidden * query + 2 * self.hidden * key + 3 * self.hidden * self.inner + 2 * self.hidden
        count += (query + 2 * key) if self.qkv_bias else 0
        count += self.hidden if self.output_bias else 0
        count += (2 * self.inner + self.hidden) if self.mlp_bias else 0
        return count + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """The LM head (0 if tied), or the reward MLP with its biases."""
        if self.head_dims is None:
            return 0 if self.tied else self.vocab * self.hidden
        widths = (self.hidden, *self.head_dims, 1)
        return sum((left + 1) * right for left, right in pairwise(widths))

    @property
    def parameters(self) -> int:
        """All of them, as `sum(p.numel() for p in model.parameters())` counts."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden + self.head_parameters

    @property
    def tensors(self) -> int:
        """Number of parameter tensors: AdamW keeps a step counter for each."""
        layer = 9 + 3 * self.qkv_bias + self.output_bias + 3 * self.mlp_bias + 2 * self.qk_norm
        head = (0 if self.tied else 1) if self.head_dims is None else 2 * (len(self.head_dims) + 1)
        return 2 + self.layers * layer + head

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: matrices of the layers and the head, not the embedding table."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * query + 2 * self.hidden * key + 3 * self.hidden * self.inner
        return self.layers * layer + (self.vocab * self.hidden if self.head_dims is None else self.head_parameters)

    def forward_flops(self, tokens: float, length: float) -> float:
        """Of a forward over `tokens` tokens in sequences of `length`: 2 per weight and token, plus causal attention.

        Attention: QK^T and its product with V are 2·2·A·D FLOPs per pair of positions and layer; the causal half of
        the pairs counts, length/2 per token.
        """
        attention = 2 * self.layers * self.heads * self.head_dim * length
        return tokens * (2 * self.matmul_parameters + attention)

    def kv_bytes_per_token(self, width: int = 2) -> int:
        """Bytes of keys and values that one token keeps, over all layers; `width` bytes per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def lora_parameters(self, rank: int) -> int:
        """Of adapters of this rank on every linear layer but the LM head (`target_modules: all-linear`)."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.inner)
        return self.layers * rank * sides


def read_architecture(source: str | Path) -> Architecture:
    """The architecture of a folder with config.json, of a config.json itself, or of a packaged name.

    Packaged: Qwen2-7B-Instruct, LLaMA3-8B and the default model (public architecture numbers, no weights).

    Raises:
        PlanError: none of the three, or a config whose type is not a dense Llama-like decoder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise PlanError(f"{path} can't be read as JSON: {error}") from error
        return from_config(config, str(source))
    packaged = PACKAGED.get(str(source).lower())
    if packaged is None:
        raise PlanError(
            f"no config.json at {source}, and no packaged description of that name\n"
            f"  fix: a folder with config.json, or one of {', '.join(sorted(set(PACKAGED.values())))}"
        )
    text = (resources.files("ups_rm.planning") / "architectures" / f"{packaged}.json").read_text(encoding="utf-8")
    return from_config(json.loads(text), str(source))


def from_config(config: dict[str, Any], name: str = "config.json") -> Architecture:
    """The architecture that a parsed config.json describes.

    Raises:
        PlanError: another model type, mixture of experts, or a size that is missing.
    """
    kind = str(config.get("backbone_model_type") or config.get("model_type", ""))
    if kind not in KNOWN_TYPES:
        raise PlanError(f"{name}: model_type {kind!r} is not known here; known: {', '.join(KNOWN_TYPES)}")
    missing = [key for key in REQUIRED if not isinstance(config.get(key), int)]
    if missing:
        raise PlanError(f"{name}: {', '.join(missing)} missing in config.json")
    heads = config["num_attention_heads"]
    llama = kind in ("llama", "qwen3")
    head = config.get("hidden_dim_str")
    return Architecture(
        name=name,
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or (llama and bool(config.get("attention_bias", False))),
        output_bias=llama and bool(config.get("attention_bias", False)),
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        head_dims=None if head is None else _widths(str(head)),
    )


def reward_model(backbone: Architecture, hidden_dims: str = "256,64") -> Architecture:
    """The same decoder with an MLP head of these widths in place of its LM head."""
    return replace(backbone, head_dims=_widths(hidden_dims))


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(",") if width.strip())
