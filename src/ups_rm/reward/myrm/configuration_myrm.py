"""Configuration of a reward model that is a decoder backbone with an MLP head. Copied verbatim into every RM folder.

`config.json` is the backbone's own config, flat, plus `hidden_dim_str`, `pooling`, `backbone_model_type` and, where
there is more than the head for unsafety, `heads`. Nothing but transformers is imported, so the folder loads with
`trust_remote_code=True` where nothing else is installed.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

# Fields of config.json that are not the backbone's
OWN_FIELDS = (
    "hidden_dim_str",
    "pooling",
    "heads",
    "backbone_model_type",
    "auto_map",
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
)
POOLINGS = ("last", "mean")
HEADS = ("unsafety", "helpfulness")
LABEL_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")


class MyRMConfig(PretrainedConfig):
    """The backbone's config, flat, with the shape of the head.

    Args:
        hidden_dim_str: widths of the head's hidden layers, comma-separated, e.g. "256,64"; empty for a linear head.
        pooling: what the head is given: "last", the last attended token's state; "mean", the mean over all attended
            tokens.
        heads: what each column of the logits says, in this order: "unsafety" (higher = less safe), "helpfulness"
            (higher = more helpful), or both. None: unsafety alone, and config.json has no such field.
        backbone_model_type: the transformers `model_type` that the other fields belong to, e.g. "llama", "qwen2".
        kwargs: every field of the backbone's config.
    """

    model_type = "myrm"

    def __init__(
        self,
        hidden_dim_str: str | int = "256",
        backbone_model_type: str = "llama",
        pooling: str = "last",
        heads: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        if heads is not None and tuple(heads) not in (HEADS[:1], HEADS[1:], HEADS):
            raise ValueError(f"heads are {heads!r}, expected {HEADS[0]}, {HEADS[1]} or both in this order")
        self.hidden_dim_str = str(hidden_dim_str)
        self.pooling = pooling
        if heads is not None:
            self.heads = list(heads)
        self.backbone_model_type = backbone_model_type
        if kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", len(heads or HEADS[:1]))
        super().__init__(**kwargs)

    @property
    def hidden_dims(self) -> list[int]:
        """Widths of the hidden layers, e.g. [256, 64]."""
        return [int(width) for width in self.hidden_dim_str.split(",") if width.strip()]

    @property
    def head_names(self) -> list[str]:
        """What each column of the logits says."""
        return list(getattr(self, "heads", None) or HEADS[:1])

    def backbone_config(self) -> Any:
        """The config of the backbone alone, of the class that transformers has for `backbone_model_type`."""
        fields = {k: v for k, v in self.to_dict().items() if k not in OWN_FIELDS and k not in LABEL_FIELDS}
        if fields.get("rope_parameters") and int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                f"this folder needs transformers >= 5: {transformers.__version__} ignores rope_parameters"
            )
        config = AutoConfig.for_model(self.backbone_model_type, **fields)
        # A pad token that was added without growing the embedding must not stop the backbone: padding is never read.
        pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
        if pad is not None and vocabulary is not None and not 0 <= pad < vocabulary:
            config.pad_token_id = None
        return config


__all__ = ["MyRMConfig"]
