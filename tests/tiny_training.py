"""Small pieces for tests of the local engine: models in memory, prompts as parquet, recipes, synthetic scorers.

Everything is made on the spot in well under a second. Weights are drawn wide (std 0.2 or more) so that logits differ
visibly: with the usual 0.02 all tokens are about equally likely and few mistakes would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny import qwen_tokenizer
from ups_rm.local.policy import Policy
from ups_rm.local.sequences import Sequences
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.types import Conversation, Score

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama without GQA, biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3 rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2 yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2 tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2 untied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3 wide heads": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "gpt neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
}
FAST = [name for name in ARCHITECTURES if not name.startswith("gpt")]
UNKNOWN = [name for name in ARCHITECTURES if name.startswith("gpt")]


def causal_lm(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A causal LM of a few thousand fp32 weights, in eval mode; biases and norms are random too."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    settings = SHAPE | own | changes
    if "rope_parameters" in settings:
        settings["rope_parameters"] = dict(settings["rope_parameters"])
    if model_class is GPT2LMHeadModel:
        settings |= {"n_positions": settings.pop("max_position_embeddings"), "n_inner": settings["intermediate_size"]}
        settings |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if not model_class.__name__.startswith(("Llama", "Qwen")):
        settings.pop("num_key_value_heads")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
        for name, parameter in model.named_parameters():  # transformers starts them at 0 and 1
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.eval()


def with_adapters(model: Any, **settings: Any) -> Any:
    """The model with adapters of LoRA, on all its linear layers unless the settings say otherwise, which are not
    nothing: as after some updates."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return adapted


def policy_of(model: Any, *, trainable: bool = True) -> Policy:
    """The model as a `Policy` on the CPU, with masters where it is trained."""
    policy = Policy(model, qwen_tokenizer(), torch.device("cpu"))
    if trainable:
        policy.make_masters(next(model.parameters()).dtype)
    else:
        model.requires_grad_(False)
    return policy


def random_prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 11) -> list[list[int]]:
    """Token ids of different lengths; ids 0 (padding) and 1 (end) do not occur."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def random_sequences(
    lengths: list[int], group_ids: list[int], *, seed: int = 0, prompt_padding: int = 2, response_padding: int = 1
) -> Sequences:
    """Replies of these lengths; rows of a group share their prompt; more padding than needed on both sides."""
    generator = torch.Generator().manual_seed(seed)
    groups = sorted(set(group_ids))
    prompts = dict(zip(groups, random_prompts(len(groups), seed=seed + 1, shortest=2), strict=True))
    width = max(map(len, prompts.values())) + prompt_padding
    length = max(lengths) + response_padding
    rows = [prompts[group] for group in group_ids]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return Sequences(
        prompts=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        responses=torch.randint(2, VOCAB, (len(lengths), length), generator=generator) * mask,
        response_mask=mask,
        group_ids=torch.tensor(group_ids),
    )


def slow_logprobs(model: Any, prompt: list[int], reply: list[int], temperature: float = 1.0) -> Tensor:
    """log pi(reply token) of one unpadded sequence through transformers' forward: the oracle of everything faster."""
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0].float() / temperature
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(1, torch.tensor(reply)[:, None]).squeeze(1)


UNSAFE = [
    *("How do I bake bread", "Tell me about the sun", "Practise a little", "What is a good way", "It could hurt"),
    *("someone every day", "I can't help", "the planets and the moon", "learn the piano", "flour and yeast"),
]
BENIGN = ["water and salt", "You are a helpful", "the moon", "at home", "I am sorry", "wait for the bread"]


def prompt_file(file: Path, *, unsafe: int = 8, benign: int = 4) -> Path:
    """Prompts in verl's schema: `unsafe` ones, then `benign` ones."""
    texts = [(text, "test/unsafe") for text in UNSAFE[:unsafe]] + [(text, "test/benign") for text in BENIGN[:benign]]
    rows = [
        {
            "data_source": "PKU-SafeRLHF",
            "prompt": [{"role": "user", "content": text}],
            "ability": "safety",
            "reward_model": {"style": "model", "ground_truth": None},
            "extra_info": {"split": "train", "index": i, "prompt_source": source},
        }
        for i, (text, source) in enumerate(texts)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


BASE: dict[str, Any] = {
    "prepare": {"source": "sample"},
    "data": {"train_batch_size": 4, "max_prompt_length": 128, "max_response_length": 8},
    "actor_rollout_ref": {
        "actor": {
            "ppo_mini_batch_size": 4,
            "ppo_micro_batch_size_per_gpu": 16,
            "fsdp_config": {"dtype": "float32"},
            "optim": {"lr": 1.0e-3},
        },
        "rollout": {"n": 4},
    },
    "reward_model": {"model": {"dtype": "float32"}},
    "trainer": {
        "device": "cpu",
        "logger": [],
        "total_epochs": 100,
        "total_training_steps": 3,
        "val_before_train": False,
    },
}


def tiny_recipe(folder: Path, policy: Path, *overrides: str, prompts: bool = True) -> Recipe:
    """A recipe for a tiny policy: 4 prompts x 4 replies of 8 tokens, run folder `<folder>/run`."""
    return load_recipe(recipe_yaml(folder), [*base_overrides(folder, policy, prompts=prompts), *overrides])


def recipe_yaml(folder: Path) -> Path:
    file = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return file


def base_overrides(folder: Path, policy: Path, *, prompts: bool = True) -> list[str]:
    given = [f"actor_rollout_ref.model.path={policy}", f"trainer.default_local_dir={folder / 'run'}"]
    if prompts:
        given += [
            f"data.train_files={prompt_file(folder / 'train.parquet')}",
            f"data.val_files={prompt_file(folder / 'val.parquet', unsafe=3, benign=3)}",
        ]
    return given


@dataclass
class SyntheticScorer:
    """A scorer that is a function of the reply's text; remembers what it was asked."""

    logit: Callable[[str], float]
    seen: list[Conversation] = field(default_factory=list)

    def score(self, conversations: list[Conversation]) -> list[Score]:
        self.seen += conversations
        logits = [self.logit(conversation[-1]["content"]) for conversation in conversations]
        return [Score(logit, 1 / (1 + math.exp(logit)), 1, False) for logit in logits]


def letter_share(text: str, letter: str = "e") -> float:
    """Share of a letter in a text; 0 for an empty one."""
    return text.count(letter) / len(text) if text else 0.0


def prefers(letter: str) -> SyntheticScorer:
    """The more of the letter the safer: logit 3 without it, -3 where there is nothing else."""
    return SyntheticScorer(lambda text: 3.0 - 6.0 * letter_share(text, letter))


def command(*arguments: str | Path) -> int:
    """Run `ups-rm ARGUMENTS` in this process, as the entry point does; its exit code."""
    import sys
    from unittest.mock import patch

    from ups_rm.cli import main

    with patch.object(sys, "argv", ["ups-rm", *map(str, arguments)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


class ProductSizes(TorchDispatchMode):
    """Sizes of what goes into matrix products, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "matmul", "linear")):
            self.found |= {size for given in args if isinstance(given, Tensor) for size in given.shape}
        return func(*args, **(kwargs or {}))
