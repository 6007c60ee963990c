"""What the values of a recipe must be, each by itself and against each other. No torch: errors are instant."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RecipeError

if TYPE_CHECKING:
    from ups_rm.recipe import Recipe

# As in ups_rm.grpo, which imports torch; a test keeps them equal.
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
DTYPES = ("auto", "bfloat16", "float32")

ARR = "actor_rollout_ref"
ONE_OF: dict[str, tuple[str, ...]] = {
    "prepare.dedup": ("none", "prompt"),
    "reward_training.loss": ("bce", "severity", "pairs"),
    "reward_training.pooling": ("last", "mean"),
    "data.truncation": ("error",),
    "data.prompt_key": ("prompt",),
    f"{ARR}.actor.kl_loss_type": (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS)),
    f"{ARR}.actor.loss_agg_mode": LOSS_AGG_MODES,
    f"{ARR}.actor.optim.lr_scheduler_type": ("constant", "cosine"),
    f"{ARR}.actor.fsdp_config.model_dtype": ("fp32", "float32"),
    f"{ARR}.actor.fsdp_config.dtype": DTYPES,
    f"{ARR}.rollout.dtype": DTYPES,
    "algorithm.adv_estimator": ("grpo",),
    "algorithm.kl_penalty": (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS)),
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "reward_model.model.dtype": DTYPES,
    f"{ARR}.actor.strategy": ("fsdp2", "fsdp"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
}
INF = math.inf
BETWEEN: dict[str, tuple[float, float]] = {  # both ends are allowed
    "reward_training.lora_rank": (1, INF),
    "reward_training.lora_epochs": (1, INF),
    "evaluation.max_unsafe_prompts": (0, INF),
    "evaluation.max_benign_prompts": (0, INF),
    "evaluation.n": (1, INF),
    "evaluation.max_new_tokens": (1, INF),
    "evaluation.temperature": (0, INF),
    "evaluation.n_resamples": (1, INF),
    "data.train_batch_size": (1, INF),
    "data.max_prompt_length": (1, INF),
    "data.max_response_length": (1, INF),
    "data.benign_share": (-1, 1),
    f"{ARR}.model.lora_rank": (0, INF),
    f"{ARR}.model.lora_alpha": (1, INF),
    f"{ARR}.actor.ppo_mini_batch_size": (1, INF),
    f"{ARR}.actor.ppo_micro_batch_size_per_gpu": (1, INF),
    f"{ARR}.actor.ppo_epochs": (1, INF),
    f"{ARR}.actor.clip_ratio": (0.2, 0.2),
    f"{ARR}.actor.clip_ratio_low": (0, 1),
    f"{ARR}.actor.clip_ratio_high": (0, INF),
    f"{ARR}.actor.clip_ratio_c": (1 + 1e-9, INF),
    f"{ARR}.actor.loss_scale_factor": (1, INF),
    f"{ARR}.actor.grad_clip": (1e-12, INF),
    f"{ARR}.actor.optim.lr": (0, INF),
    f"{ARR}.actor.optim.lr_warmup_steps_ratio": (0, 1),
    f"{ARR}.actor.optim.weight_decay": (0, INF),
    f"{ARR}.actor.optim.min_lr_ratio": (0, 1),
    f"{ARR}.rollout.n": (1, INF),
    f"{ARR}.rollout.temperature": (1e-3, INF),
    f"{ARR}.rollout.top_p": (1e-9, 1),
    f"{ARR}.rollout.max_num_seqs": (1, INF),
    f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu": (1, INF),
    f"{ARR}.rollout.val_kwargs.temperature": (0, INF),
    f"{ARR}.rollout.val_kwargs.top_p": (1e-9, 1),
    f"{ARR}.rollout.val_kwargs.n": (1, INF),
    f"{ARR}.ref.log_prob_micro_batch_size_per_gpu": (1, INF),
    "algorithm.kl_ctrl.kl_coef": (0, INF),
    "algorithm.kl_ctrl.horizon": (1, INF),
    "algorithm.kl_ctrl.target_kl": (1e-12, INF),
    "reward_model.max_batch_tokens": (1, INF),
    "trainer.total_epochs": (1, INF),
    "trainer.total_training_steps": (1, INF),
    "trainer.max_actor_ckpt_to_keep": (1, INF),
    "trainer.group_log_freq": (0, INF),
    "trainer.nnodes": (1, INF),
    "trainer.n_gpus_per_node": (0, INF),
    f"{ARR}.actor.ppo_max_token_len_per_gpu": (1, INF),
    f"{ARR}.actor.ulysses_sequence_parallel_size": (1, INF),
    f"{ARR}.rollout.tensor_model_parallel_size": (1, INF),
    f"{ARR}.rollout.gpu_memory_utilization": (1e-9, 1),
    f"{ARR}.rollout.max_num_batched_tokens": (1, INF),
    "ray_kwargs.ray_init.num_cpus": (1, INF),
}
FOR_VERL = (
    f"{ARR}.model.use_remove_padding",
    f"{ARR}.actor.strategy",
    f"{ARR}.actor.use_dynamic_bsz",
    f"{ARR}.actor.ppo_max_token_len_per_gpu",
    f"{ARR}.actor.ulysses_sequence_parallel_size",
    *(f"{ARR}.actor.fsdp_config.{name}" for name in ("param_offload", "optimizer_offload")),
    *(f"{ARR}.actor.fsdp_config.{name}" for name in ("reshard_after_forward", "fsdp_size")),
    f"{ARR}.ref.fsdp_config.param_offload",
    *(f"{ARR}.rollout.{name}" for name in ("name", "tensor_model_parallel_size", "gpu_memory_utilization")),
    *(f"{ARR}.rollout.{name}" for name in ("enforce_eager", "free_cache_engine", "max_num_batched_tokens")),
    "ray_kwargs.ray_init.address",
    "ray_kwargs.ray_init.num_cpus",
    *(f"verl.{name}" for name in ("overrides", "external_modules", "time_limit", "silence_limit")),
)
"""Keys that only the verl engine honours; the local engine takes nothing but their defaults."""
TEXTS = ("data.train_files", "data.val_files", "trainer.logger", f"{ARR}.model.target_modules")
"""Keys that hold a text or a list of texts."""


def value_of(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_recipe(recipe: Recipe, *, engine: str | None = "local") -> None:
    """Values that are wrong by themselves or against each other, or that the local engine does not do.

    Raises:
        RecipeError: names the key, its value and what is allowed.
    """
    for key, allowed in ONE_OF.items():
        value = value_of(recipe, key)
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{key}={value} is not one of {', '.join(allowed)}; did you mean {near}?")
    for key, (least, most) in BETWEEN.items():
        value = value_of(recipe, key)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            raise RecipeError(f"{key}={value} {_range(key, value, least, most)}")
    for key in TEXTS:
        value = value_of(recipe, key)
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise RecipeError(f"{key}={value} is neither a text nor a list of texts")
    betas = recipe.actor_rollout_ref.actor.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise RecipeError(f"{ARR}.actor.optim.betas={betas} must be two numbers in [0, 1), for example [0.9,0.999]")
    _check_together(recipe)
    if engine == "local":
        _check_local(recipe)


def _range(key: str, value: float, least: float, most: float) -> str:
    if not math.isfinite(value):
        return "is not a finite number"
    if key == f"{ARR}.actor.clip_ratio":
        return "has no effect, as in verl: set clip_ratio_low and clip_ratio_high"
    if most < INF:
        return f"must lie between {least:g} and {most:g}"
    return f"must be at least {least:g}" if least == int(least) else f"must be more than {int(least)}"


def _check_together(recipe: Recipe) -> None:
    actor, data = recipe.actor_rollout_ref.actor, recipe.data
    if -1 < data.benign_share < 0:
        raise RecipeError(f"data.benign_share={data.benign_share} must be a share from 0 to 1, or -1 for none")
    if data.train_batch_size % actor.ppo_mini_batch_size:
        raise RecipeError(
            f"data.train_batch_size={data.train_batch_size} is not a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
        )
    if recipe.evaluation.max_unsafe_prompts + recipe.evaluation.max_benign_prompts == 0:
        raise RecipeError("evaluation.max_unsafe_prompts=0 and evaluation.max_benign_prompts=0: nothing to compare on")
    if recipe.trainer.resume_mode == "resume_path" and not recipe.trainer.resume_from_path:
        raise RecipeError("trainer.resume_mode=resume_path needs trainer.resume_from_path")


def _check_local(recipe: Recipe) -> None:
    """What only the verl engine does is an error here, so that nothing that a recipe asks for is silently dropped."""
    from ups_rm.recipe import Recipe as Defaults

    actor, rollout, defaults = recipe.actor_rollout_ref.actor, recipe.actor_rollout_ref.rollout, Defaults()
    if recipe.trainer.nnodes != 1 or recipe.trainer.n_gpus_per_node > 1:
        raise RecipeError(
            f"trainer.nnodes={recipe.trainer.nnodes}, trainer.n_gpus_per_node={recipe.trainer.n_gpus_per_node}: "
            "the local engine runs one process on one device\n  fix: ENGINE=verl (--engine verl)"
        )
    set_for_verl = [key for key in FOR_VERL if value_of(recipe, key) != value_of(defaults, key)]
    if set_for_verl:
        raise RecipeError(
            f"{', '.join(f'{key}={value_of(recipe, key)}' for key in set_for_verl)}: only the verl engine does that\n"
            f"  fix: ENGINE=verl (--engine verl), or leave {'it' if len(set_for_verl) == 1 else 'them'} out"
        )
    if rollout.dtype not in ("auto", actor.fsdp_config.dtype):
        raise RecipeError(
            f"actor_rollout_ref.rollout.dtype={rollout.dtype} differs from actor_rollout_ref.actor.fsdp_config.dtype="
            f"{actor.fsdp_config.dtype}: the local engine samples with the weights that it trains\n"
            "  fix: actor_rollout_ref.rollout.dtype=auto"
        )
