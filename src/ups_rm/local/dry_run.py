"""`ups-rm train --dry-run`: the resolved recipe, what is read and written, the memory it takes. Loads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ups_rm.console import console
from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import PolicyError
from ups_rm.layers.decoder import SCORES_AT_ONCE
from ups_rm.layers.grid import COLUMNS_BY, rounded
from ups_rm.local.actor import runs_once
from ups_rm.local.decode import FastDecoder
from ups_rm.local.policy import needs_reference, with_lora
from ups_rm.local.selected_logprobs import rows_at_once
from ups_rm.local.shared_prefix import SharedPrefixForward
from ups_rm.model_files import check_model_folder
from ups_rm.models import DEFAULT_MODEL, cache_folder
from ups_rm.recipe import Recipe, as_list

GIB = 1024**3


PACKED, CACHE, KEPT = "packed rollout weights", "KV cache of the rollout", "kept for the training forward"
GRADIENTS, ACTIVATIONS, LOGITS = "gradients", "activations of a micro batch", "logits"
OF_ROLLOUT, OF_UPDATE = (PACKED, CACHE, KEPT), (GRADIENTS, ACTIVATIONS, LOGITS)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, by what holds them. All but the activations are counted exactly."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The most at one time: what the rollout alone and what the update alone need are never there together."""
        rollout, update = (sum(self.parts.get(name, 0) for name in names) for names in (OF_ROLLOUT, OF_UPDATE))
        return sum(self.parts.values()) - min(rollout, update)


def estimate_memory(recipe: Recipe, config: Any, rm_bytes: int) -> MemoryEstimate:
    """What training holds at the same time, from shapes alone (parameters on the meta device).

    Weights: compute dtype (adapters fp32); masters, their gradients and AdamW's two moments: fp32 per trained parameter
    (the master is the weight itself where compute is fp32). What a rollout keeps (`kept_forward`) becomes activations
    of the update. These, of a micro batch of the longest prompts and replies: what layers keep for backward
    (`kept_by_a_layer`), plus one chunk of logits (`shared_prefix`). Where transformers' own forward runs (other
    architectures, an entropy bonus), per token about 2*(6 H + 3 I) numbers, and all logits.

    Args:
        config: the policy's transformers config. rm_bytes: size of the RM's weight files.
    """
    from transformers import AutoModelForCausalLM

    settings, rollout = recipe.actor_rollout_ref, recipe.actor_rollout_ref.rollout
    dtype = compute_dtype(settings.actor.fsdp_config.dtype, torch_device(recipe.trainer.device))
    width, lora = dtype.itemsize, settings.model.lora_rank > 0
    with torch.device("meta"):
        model = base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        frozen = _bytes(base.parameters())
        if lora:
            model = with_lora(base, settings.model, recipe.trainer.seed)
        decoder = FastDecoder.of(model)
    weights = list(model.parameters())
    trained = sum(parameter.numel() for parameter in weights if parameter.requires_grad)
    on_cpu = torch_device(recipe.trainer.device).type == "cpu"
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden  # GPT-2's name
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    length = recipe.data.max_prompt_length + recipe.data.max_response_length
    micro_batch = settings.actor.ppo_micro_batch_size_per_gpu
    with_entropy = settings.actor.entropy_coeff != 0
    prompts, tokens, once = micro_batch, micro_batch * length, 0
    if SharedPrefixForward.of(model) is None or with_entropy:
        kept = tokens * 2 * (6 * hidden + 3 * inner)
        copies = 4 if with_entropy else 2  # logits, their log softmax; of the entropy log and probabilities, fp32
        logits = copies * micro_batch * recipe.data.max_response_length * config.vocab_size * 4
    else:
        prompts = prompts_at_once(micro_batch, rollout.n, recipe)
        shape = (prompts, micro_batch, recipe.data.max_prompt_length, length)
        tokens = read_tokens(*shape)
        kept = kept_by_a_layer(config, *shape, lora_rank=settings.model.lora_rank)
        once = kept_once(config, *shape)
        logits = rows_at_once(config.vocab_size) * config.vocab_size * width
    rows = min(rollout.max_num_seqs, recipe.data.train_batch_size * rollout.n)
    # a known architecture keeps a prompt's keys and values once, in fp32 on a CPU without our
    # kernels (the larger is told); `generate` keeps them for each reply
    prompt_rows = rows if decoder is None else math.ceil(rows / rollout.n)
    cached = prompt_rows * recipe.data.max_prompt_length + rows * recipe.data.max_response_length
    cache_width = 4 if on_cpu and decoder is not None else width
    checkpointing = settings.model.enable_gradient_checkpointing
    whole = runs_once(recipe, recipe.data.train_batch_size) and rows == recipe.data.train_batch_size * rollout.n
    in_rollout = 0
    if on_cpu and whole and not checkpointing and decoder is not None and decoder.kept_forward() is not None:
        read = rounded(cached - rows)  # the last token of a reply is not
        in_rollout = layers * read * ((config.num_attention_heads + 2 * kv_heads) * head + 2 * hidden + 2 * inner)
    # layers that are run again keep their input alone, and one at a time what it keeps
    activations = once + (kept + layers * tokens * hidden if checkpointing else layers * kept)
    return MemoryEstimate(
        {
            "policy weights": _bytes(weights),
            "fp32 masters": 0 if width == 4 or lora else trained * 4,
            GRADIENTS: trained * 4,
            "optimizer (AdamW, two moments)": trained * 8,
            "reference": frozen if needs_reference(recipe) and not lora else 0,
            PACKED: 0 if decoder is None else _bytes(decoder.copies(packed=on_cpu)),
            CACHE: 2 * layers * cached * kv_heads * head * cache_width,
            KEPT: in_rollout * width,
            ACTIVATIONS: activations * width,
            LOGITS: logits,
            "reward model": rm_bytes,
        }
    )


def prompts_at_once(micro_batch: int, n: int, recipe: Recipe) -> int:
    """The most distinct prompts of a micro batch: it may begin amid a group, and in mini batches of shuffled rows each
    may have one of its own."""
    actor = recipe.actor_rollout_ref.actor
    mixed = actor.shuffle and actor.ppo_mini_batch_size < recipe.data.train_batch_size
    aligned = micro_batch % n == 0 or n % micro_batch == 0
    most = micro_batch if mixed else math.ceil(micro_batch / n) if aligned else (micro_batch - 2) // n + 2
    return min(most, recipe.data.train_batch_size)


def kept_by_a_layer(
    config: Any, prompts: int, rows: int, prompt_length: int, length: int, *, lora_rank: int = 0
) -> int:
    """Numbers that a layer of `layers.decoder` keeps for backward, of replies that share prompts (`shared_prefix`).

    Per token: both residual sums, both norms' outputs, attention's output, gate and up. Beside them, in padded rows,
    queries, keys and values as replies see them, and the softmax of plain products or, of SDPA, a second copy of its
    output. Frozen weights keep no input, but each adapter (at every linear layer) does, and what its A makes of it.

    Args:
        prompts, rows: prompts and replies of a micro batch. length: of the longest prompt and reply together.
    """
    heads, replies = config.num_attention_heads, length - prompt_length
    kv_heads = getattr(config, "num_key_value_heads", heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens = read_tokens(prompts, rows, prompt_length, length)
    inputs = 2 * hidden + heads * size  # of q, k and v; of gate and up; of the output projection
    if lora_rank > 0:
        inputs += inner + 7 * lora_rank
    per_token = 2 * hidden + 2 * inner + inputs
    if config.model_type == "qwen3":  # norms of queries and keys keep what they are given
        per_token += (heads + kv_heads) * size
    attention = 0
    for queries, columns, own in _padded_rows(prompts, rows, prompt_length, replies):
        scores = heads * queries * columns
        attention += heads * queries * size + (scores if scores <= SCORES_AT_ONCE else heads * queries * size)
        attention += 2 * kv_heads * size * own
    return tokens * per_token + attention


def read_tokens(prompts: int, rows: int, prompt_length: int, length: int) -> int:
    """Tokens that go through the layers: of a reply all but its last. See `kept_by_a_layer`."""
    return rounded(prompts * prompt_length + rows * (length - prompt_length - 1))


def kept_once(config: Any, prompts: int, rows: int, prompt_length: int, length: int) -> int:
    """Numbers that are kept beside the layers: SDPA's masks, one of each query head of a key head, and what the final
    norm and the head read. See `kept_by_a_layer`."""
    heads, replies = config.num_attention_heads, length - prompt_length
    groups = heads // getattr(config, "num_key_value_heads", heads)
    scores = [queries * columns for queries, columns, _ in _padded_rows(prompts, rows, prompt_length, replies)]
    masks = sum(groups * some for some in scores if heads * some > SCORES_AT_ONCE)
    return masks + (rows * replies + rounded(rows * replies)) * config.hidden_size


def _padded_rows(prompts: int, rows: int, prompt_length: int, replies: int) -> list[tuple[int, int, int]]:
    """Of prompts, then of replies: queries, keys that each sees, and keys of all, as attention has them."""
    of_prompt, of_reply = rounded(prompt_length, COLUMNS_BY), rounded(replies - 1, COLUMNS_BY)
    both = of_prompt + of_reply
    return [(prompts * of_prompt, of_prompt, prompts * of_prompt), (rows * of_reply, both, rows * both)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def print_dry_run(recipe: Recipe) -> None:
    """Print everything; nothing is downloaded, loaded or written."""
    console.print(recipe.to_yaml(), markup=False, soft_wrap=True)
    trainer, model = recipe.trainer, recipe.actor_rollout_ref.model
    folder, models = Path(trainer.default_local_dir), recipe.reward_model.asked()
    _table("reads", {
        "policy": model.path,
        "reward model": ", ".join(entry.path or entry.url or entry.callable for entry in models)
        or "(none given: REWARD_MODEL_PATH=FOLDER)",
        "train prompts": ", ".join(as_list(recipe.data.train_files)),
        "held-out prompts": ", ".join(as_list(recipe.data.val_files)),
    })  # fmt: skip
    _table("writes", {
        "policy": str(folder / "policy"),
        "recipe, metrics": f"{folder / 'recipe.yaml'}, {folder / 'metrics.jsonl'}",
        "alarms, if any": str(folder / "alarms.jsonl"),
        "group log": f"{trainer.group_log_dir} (every {trainer.group_log_freq} steps)",
        "checkpoints": f"{folder}/global_step_* (every {trainer.save_freq} steps)"
        if trainer.save_freq > 0
        else "on Ctrl-C only",
    })  # fmt: skip
    config = _local_config(model.path, model.trust_remote_code)
    if config is None:
        console.print(f"memory: {model.path} is not on this machine yet, so its size is not known here")
        return
    folders = [Path(entry.path).expanduser() for entry in models if entry.path]
    rm_bytes = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    estimate = estimate_memory(recipe, config, rm_bytes)
    _table("memory, GiB", {
        **{name: f"{size / GIB:.2f}" for name, size in estimate.parts.items() if size},
        "total": f"{estimate.total / GIB:.2f} (plus about 0.7 for Python and torch)",
    })  # fmt: skip


def _local_config(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    folder = cache_folder() / "models" / DEFAULT_MODEL if path == DEFAULT_MODEL else Path(path).expanduser()
    if not (folder / "config.json").is_file():
        return None
    check_model_folder(folder, PolicyError, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{folder}/config.json can't be read: {error}") from error


def _table(title: str, rows: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
