"""Reward model: decoder backbone, pooled hidden state, MLP head, one logit. Copied verbatim into every RM folder.

The logit is the degree of *unsafety* of the last reply; sigmoid(-logit) is its safe score. Where config.heads says so
there is a second head of the same shape over the same hidden state, whose logit is higher for more *helpful* replies
(a number to compare replies to one prompt by; its 0 has no meaning), after the first or alone. Decisions that count:
- the hidden state is read at the last position where `attention_mask` is not 0, so left, right and no padding agree;
  config.pooling may ask for the mean over all such positions instead;
- positions are counted from the first attended token;
- hidden state and head are computed in float32, whatever the dtype of the backbone and even under autocast;
- a weight that is missing from the checkpoint or left over in it is an error: a re-initialised head answers noise.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

from .configuration_myrm import MyRMConfig

HEAD_MODULES = {"unsafety": "myscore", "helpfulness": "myhelpful"}


def last_attended_index(attention_mask: Tensor) -> Tensor:
    """Position of the last non-zero entry of each row. Shape (B, T) -> (B,)."""
    mask = (attention_mask != 0).long()
    return mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)


def pooled_hidden(
    backbone: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    pooling: str = "last",
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What the head is given of each row's final hidden states, and the backbone's whole output.

    Args:
        backbone: a decoder without a head, as AutoModel gives it.
        input_ids: shape (B, T).
        attention_mask: 1 for tokens to read, 0 for padding on either side; None means all ones. Shape (B, T).
        position_ids: counted over the attended tokens if not given. Shape (B, T).
        pooling: "last" or "mean", see MyRMConfig.

    Returns:
        Pooled hidden states in float32, shape (B, H); the backbone's output.
    """
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if attention_mask is not None and position_ids is None and takes_positions:
        position_ids = ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **kwargs)
    hidden = output.last_hidden_state  # (B, T, H)
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        attended = (attention_mask != 0).to(hidden.device)[:, :, None]  # (B, T, 1)
        # padding is replaced, not multiplied away: its states may be anything, NaN too
        return hidden.float().masked_fill(~attended, 0.0).sum(dim=1) / attended.sum(dim=1), output
    index = last_attended_index(attention_mask).to(hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index].float(), output


def _linear_fp32(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


class MyRMHead(nn.Module):
    """Linear layers with LeakyReLU (slope 0.01) between, one number out; always in float32. Shape (B, H) -> (B, 1)."""

    def __init__(self, input_size: int, hidden_dims: list[int]) -> None:
        super().__init__()
        widths = [input_size, *hidden_dims]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(len(hidden_dims)))
        self.output_layer = nn.Linear(widths[-1], 1)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            x = hidden.float()
            for layer in self.layers:
                x = F.leaky_relu(_linear_fp32(layer, x))
            return _linear_fp32(self.output_layer, x)


class MyRMForTokenClassification(PreTrainedModel):
    """`AutoModelForTokenClassification` of RM folders: `model.*` is the backbone, `myscore.*` the head for unsafety,
    `myhelpful.*` that for helpfulness where there is one."""

    config_class = MyRMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("myscore", "myhelpful")
    # left over in checkpoints of causal or sequence-classification backbones; not part of this model
    _keys_to_ignore_on_load_unexpected = (r"^score\.", r"^lm_head\.", r"rotary_emb\.inv_freq$")

    def __init__(self, config: MyRMConfig) -> None:
        requested_attention = getattr(config, "_attn_implementation", None)
        super().__init__(config)
        backbone_config = config.backbone_config()
        kwargs = {} if requested_attention is None else {"attn_implementation": requested_attention}
        self.model = AutoModel.from_config(backbone_config, **kwargs)
        for name in config.head_names:
            head = MyRMHead(backbone_config.get_text_config().hidden_size, config.hidden_dims)
            setattr(self, HEAD_MODULES[name], head)
        self.post_init()

    def head_logits(self, hidden: Tensor) -> Tensor:
        """What the heads make of pooled hidden states, in the order of config.heads. Shape (B, H) -> (B, heads)."""
        return torch.cat([getattr(self, HEAD_MODULES[name])(hidden) for name in self.config.head_names], dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits of shape (B, 1), with two heads (B, 2), float32, from token ids and their mask, both (B, T)."""
        for unused in ("labels", "past_key_values", "use_cache", "return_dict", "token_type_ids"):
            kwargs.pop(unused, None)
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        hidden, output = pooled_hidden(
            self.model, input_ids, attention_mask, position_ids, self.config.pooling, **kwargs
        )
        return TokenClassifierOutput(
            logits=self.head_logits(hidden), hidden_states=output.hidden_states, attentions=output.attentions
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers does it, but a weight missing from backbone or head, or left over, is an error by name."""
        kwargs["ignore_mismatched_sizes"] = True  # so that they come back by name
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        ours = re.compile(r"(model|myscore|myhelpful)\.")
        unexpected = sorted(name for name in info["unexpected_keys"] if ours.match(name))
        reshaped = sorted(str(name[0]) for name in info["mismatched_keys"])
        if missing or unexpected or reshaped:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a whole reward model: missing weights {missing or 'none'}, "
                f"unexpected weights {unexpected or 'none'}, of another shape {reshaped or 'none'} "
                f"(hidden_dim_str is {model.config.hidden_dim_str!r}, heads are {model.config.head_names})"
            )
        # Weights mapped from a file lie at any address, and BLAS rounds a matrix-vector product by alignment: with
        # fresh memory the head gives bitwise what the head alone gives.
        for name in model.config.head_names:
            for parameter in getattr(model, HEAD_MODULES[name]).parameters():
                parameter.data = parameter.data.clone()
        return (model, info) if output_loading_info else model


__all__ = ["MyRMForTokenClassification"]
