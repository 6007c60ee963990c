"""Loading an RM folder: with our own `MyRMForTokenClassification` and no remote code, or with the folder's code.

The native way takes our folders and those of the original merge tool: `model_type: llama` with `architectures:
LlamaForSequenceClassification` and an auto_map, the head in its own shard, an unused backbone `score` layer missing
from or left in the index, a pad token beyond the embedding, a `total_size` that counts elements. What counts is whether
every weight of backbone and head is there; weights that are missing, unknown or of another shape are an error by name.

Nothing is registered with transformers' Auto classes on import or on load: a registration of "myrm" holds for every
folder of the process. `register()` does it for those who want `AutoModel...` to work natively.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.control_tokens import special_tokens
from ups_rm.errors import RMError
from ups_rm.model_files import check_manifest, check_model_folder, panics_as_errors, refused_pickle

if TYPE_CHECKING:
    import torch

    from ups_rm.reward.myrm.configuration_myrm import MyRMConfig


MAX_HEAD_LAYERS = 64
MAX_HEAD_WIDTH = 2**20


def rm_folder(folder: Path | str) -> Path:
    """`folder` as a path, if it holds a config.json.

    Raises:
        RMError: it does not.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise RMError(
            f"no reward model at {path}: {'no config.json in it' if path.is_dir() else 'no such folder'}\n"
            "  fix: make one with `ups-rm rm merge`, or download it first (`hf download OWNER/NAME --local-dir FOLDER`)"
        )
    return path


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json as it stands."""
    path = rm_folder(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise RMError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(config, dict):
        raise RMError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


def myrm_config(folder: Path | str) -> MyRMConfig:
    """The folder's config as our class; original-merge folders get `backbone_model_type` from their model_type.

    Raises:
        RMError: no `hidden_dim_str` (not a backbone + MLP head folder), or fields transformers refuses.
    """
    from transformers import AutoConfig

    from ups_rm.reward.myrm.configuration_myrm import LABEL_FIELDS, OWN_FIELDS, MyRMConfig

    raw = read_config(folder)
    if "hidden_dim_str" not in raw:
        raise RMError(
            f"{folder}/config.json has no hidden_dim_str: not a backbone with an MLP head as `ups-rm rm merge` makes\n"
            "  fix: load it with its own code: reward_model.model.trust_remote_code=True (--trust-remote-code)"
        )
    model_type = raw.get("model_type", "myrm")
    backbone_type = raw.get("backbone_model_type") or ("llama" if model_type == "myrm" else model_type)
    fields = {key: value for key, value in raw.items() if key not in OWN_FIELDS + LABEL_FIELDS}
    try:
        # through the backbone's own class first: it knows older spellings, such as rope_theta and rope_scaling
        fields = AutoConfig.for_model(backbone_type, **fields).to_dict()
        fields = {key: value for key, value in fields.items() if key not in OWN_FIELDS + LABEL_FIELDS}
        head = (hidden_dim_text(raw["hidden_dim_str"]), backbone_type, raw.get("pooling", "last"), raw.get("heads"))
        config = MyRMConfig(*head, **fields)
        config.backbone_config()
    except Exception as error:  # transformers validates with several error classes
        raise RMError(f"{folder}/config.json: {_short(error)}") from error
    return config


def heads_of(config: Mapping[str, Any], where: Path | str) -> tuple[str, ...]:
    """What each column of the logits says, from a folder's config.json: unsafety alone if it does not tell.

    Raises:
        RMError: heads that there are not, or in another order.
    """
    from ups_rm.reward.myrm.configuration_myrm import HEADS

    heads = config.get("heads")
    if heads is None:
        return HEADS[:1]
    if not isinstance(heads, list) or tuple(heads) not in (HEADS[:1], HEADS[1:], HEADS):
        raise RMError(f"{where}/config.json: heads are {heads!r}, expected {list(HEADS)} or one of them")
    return tuple(heads)


def hidden_dim_text(value: Any) -> str:
    """`hidden_dim_str` in its one form: 256 -> "256", [256, 64] -> "256,64", "256, 64" -> "256,64".

    Raises:
        RMError: anything else.
    """
    parts = value if isinstance(value, (list, tuple)) else str(value)[:1000].split(",")
    try:
        widths = [int(part) for part in parts if str(part).strip()]
    except (ValueError, TypeError, OverflowError):
        widths = [-1]
    if len(widths) > MAX_HEAD_LAYERS or any(not 1 <= width <= MAX_HEAD_WIDTH for width in widths):
        raise RMError(
            f"hidden_dim_str is {str(value)[:200]!r}, expected at most {MAX_HEAD_LAYERS} widths such as '256,64'"
        )
    return ",".join(map(str, widths))


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """The reward model in eval mode; `model(input_ids, attention_mask).logits` has shape (B, 1), with two heads (B, 2).

    Args:
        folder: an RM folder.
        dtype: of the backbone (bfloat16: see `lower_to_bf16`; a folder's own code is wholly in `dtype`). Our head is
            always computed in float32.
        trust_remote_code: run the Python files of the folder instead of ours.

    Raises:
        RMError: weights missing, unexpected or of another shape (by name), or a folder that can't be read.
    """
    path = rm_folder(folder)
    check_model_folder(path, RMError, trust_remote_code=trust_remote_code)
    check_manifest(path, RMError)
    import torch

    from ups_rm.reward.myrm.modeling_myrm import HEAD_MODULES, MyRMForTokenClassification

    # the native bf16 way starts from the stored weights: norms and embeddings are not rounded
    stored = dtype == torch.bfloat16 and not trust_remote_code
    options: dict[str, Any] = {"dtype": "auto" if stored else dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # so that check_weights tells them by name
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_transformers():
            if trust_remote_code:
                model, info = _load_remote(path, options)
            else:
                from ups_rm.reward.folder_size import check_size

                config = myrm_config(path)
                check_size(path, config)
                model, info = MyRMForTokenClassification.from_pretrained(path, config=config, **options)
    except RMError:
        raise
    except Exception as error:  # OSError for missing shards, RuntimeError for shapes, ValueError of from_pretrained
        if "is not a whole reward model" in str(error):  # from modeling_myrm.py
            raise RMError(str(error)) from error
        reason = refused_pickle(error) or _short(error)
        raise RMError(f"{path} can't be loaded: {reason}") from error
    check_weights(path, info)
    if stored:
        lower_to_bf16(model.model)
        for name in config.head_names:  # copies, as the backbone's
            for parameter in getattr(model, HEAD_MODULES[name]).parameters():
                parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False).to(device)


def lower_to_bf16(backbone: Any) -> None:
    """Matrices in bfloat16; norms, biases and the stream between layers in float32. Run it inside `compute_context`.

    As fast as a backbone wholly in bfloat16, with half its error (SmolLM2-135M: logits 0.07 instead of 0.15 off on
    average). An embedding keeps the number format it is stored in, and its output is made float32.
    All become copies: one tensor that is still the file's own, mapped into memory, keeps the whole file resident.
    """
    import torch

    for module in backbone.modules():
        embedding = isinstance(module, torch.nn.Embedding)
        if embedding:
            module.register_forward_hook(lambda _module, _inputs, output: output.float())
        for parameter in module.parameters(recurse=False):
            lowered = torch.bfloat16 if parameter.dim() > 1 else torch.float32
            parameter.data = parameter.data.to(parameter.dtype if embedding else lowered, copy=True)


def compute_context(dtype: torch.dtype, device: str | torch.device) -> AbstractContextManager[Any]:
    """What a backbone lowered by `lower_to_bf16` runs in; nothing for other number formats."""
    import torch

    if dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The RM's own tokenizer, exactly as plain AutoTokenizer gives it.

    Raises:
        RMError: it can't be loaded, or does not work: transformers takes some files that it can't use afterwards.
    """
    from transformers import AutoTokenizer

    check_model_folder(folder, RMError, trust_remote_code=trust_remote_code)
    try:
        with panics_as_errors(), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(rm_folder(folder), trust_remote_code=trust_remote_code)
            special_tokens(tokenizer)
            tokenizer(["Hi"], add_special_tokens=False)
        return tokenizer
    except RMError:
        raise
    except Exception as error:
        raise RMError(f"the tokenizer in {folder} can't be loaded: {_short(error)}") from error


def _short(error: Exception) -> str:
    """Class and text of another library's error, which may quote all of what it could not use."""
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 2000 else f'{text[:2000]}...'}"


def check_weights(folder: Path, info: dict[str, Any]) -> None:
    """Fatal, by name: weights of backbone or head that are missing, unexpected or of another shape.

    A backbone's own `score` or `lm_head` is no part of the RM: missing or left over, it does not matter.
    """
    found = {
        "missing": info.get("missing_keys") or (),
        "unexpected": info.get("unexpected_keys") or (),
        "of another shape": info.get("mismatched_keys") or (),
    }
    problems = []
    for kind, keys in found.items():
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        names = [name for name in names if name.startswith(("model.", "myscore.", "myhelpful."))]
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{kind}: {', '.join(names[:8])}{more}")
    if problems:
        raise RMError(f"{folder} is not a whole reward model; weights {'; '.join(problems)}")


def register() -> None:
    """Let `AutoConfig` and `AutoModelForTokenClassification` load `myrm` folders of ours without remote code."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    from ups_rm.reward.myrm.configuration_myrm import MyRMConfig
    from ups_rm.reward.myrm.modeling_myrm import MyRMForTokenClassification

    AutoConfig.register("myrm", MyRMConfig, exist_ok=True)
    AutoModelForTokenClassification.register(MyRMConfig, MyRMForTokenClassification, exist_ok=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers inside; we report what counts ourselves."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _load_remote(path: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Model and loading info by the folder's own classes.

    They are taken straight from its auto_map: the Auto classes would prefer whatever "myrm" another folder's code has
    registered earlier in this process.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = read_config(path).get("auto_map") or {}
    config_name, model_name = names.get("AutoConfig"), names.get("AutoModelForTokenClassification")
    if config_name and model_name:
        config_class = get_class_from_dynamic_module(config_name, str(path))
        model_class = get_class_from_dynamic_module(model_name, str(path))
        config = config_class.from_pretrained(path)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        model_class, options = AutoModelForTokenClassification, options | {"trust_remote_code": True}
    pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if pad is not None and vocabulary is not None and pad >= vocabulary:
        config.pad_token_id = None  # added without growing the embedding; padding is never read
    return model_class.from_pretrained(path, config=config, **options)
