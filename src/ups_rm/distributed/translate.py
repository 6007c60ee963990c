"""From a recipe to verl 0.9.1's configuration, as Hydra overrides. Imports neither verl nor torch.

Every key of the recipe falls in exactly one class, so that nothing is silently dropped (a test walks all of them):
`SAME` goes to verl under its own name, `COMPUTED` to verl in other words, `OURS` is read by UPS-RM itself before,
beside or after verl's run, `REFUSED` can't be honoured by verl and is an error with the reason when set away from its
default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ups_rm.distributed import rewards
from ups_rm.distributed.prompts import PromptFiles
from ups_rm.errors import RecipeError
from ups_rm.recipe import Recipe, as_list
from ups_rm.recipe_checks import ARR, value_of

Overrides = dict[str, Any]

SAME = (
    *(f"data.{name}" for name in ("prompt_key", "train_batch_size", "max_prompt_length", "max_response_length")),
    "data.truncation",
    *(f"{ARR}.model.{name}" for name in ("trust_remote_code", "enable_gradient_checkpointing", "use_remove_padding")),
    *(f"{ARR}.model.{name}" for name in ("lora_rank", "lora_alpha", "target_modules", "exclude_modules")),
    *(f"{ARR}.actor.{name}" for name in ("strategy", "ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu")),
    *(f"{ARR}.actor.{name}" for name in ("use_dynamic_bsz", "ppo_max_token_len_per_gpu", "ppo_epochs", "shuffle")),
    *(f"{ARR}.actor.{name}" for name in ("ulysses_sequence_parallel_size", "data_loader_seed", "loss_agg_mode")),
    *(f"{ARR}.actor.{name}" for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")),
    *(f"{ARR}.actor.{name}" for name in ("entropy_coeff", "use_kl_loss", "kl_loss_coef", "kl_loss_type", "grad_clip")),
    *(f"{ARR}.actor.optim.{name}" for name in ("lr", "lr_warmup_steps", "lr_warmup_steps_ratio", "weight_decay")),
    *(f"{ARR}.actor.optim.{name}" for name in ("betas", "num_cycles")),
    *(f"{ARR}.actor.fsdp_config.{name}" for name in ("model_dtype", "param_offload", "optimizer_offload")),
    *(f"{ARR}.actor.fsdp_config.{name}" for name in ("reshard_after_forward", "fsdp_size")),
    *(f"{ARR}.rollout.{name}" for name in ("name", "tensor_model_parallel_size", "gpu_memory_utilization", "n")),
    *(f"{ARR}.rollout.{name}" for name in ("enforce_eager", "free_cache_engine", "max_num_batched_tokens")),
    *(f"{ARR}.rollout.{name}" for name in ("temperature", "top_p", "top_k", "seed", "max_num_seqs")),
    f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu",
    *(f"{ARR}.rollout.val_kwargs.{name}" for name in ("temperature", "top_p", "top_k", "do_sample", "n")),
    f"{ARR}.ref.log_prob_micro_batch_size_per_gpu",
    f"{ARR}.ref.fsdp_config.param_offload",
    *(f"algorithm.{name}" for name in ("norm_adv_by_std_in_grpo", "use_kl_in_reward", "kl_penalty")),
    *(f"algorithm.kl_ctrl.{name}" for name in ("type", "kl_coef", "horizon", "target_kl")),
    *(f"trainer.{name}" for name in ("project_name", "experiment_name", "test_freq")),
    *(f"trainer.{name}" for name in ("nnodes", "n_gpus_per_node", "resume_mode")),
    f"{ARR}.actor.policy_loss.loss_mode",
    "ray_kwargs.ray_init.num_cpus",
)
"""Recipe keys that are verl's keys, with the same name and meaning."""

COMPUTED = {
    "algorithm.adv_estimator": "`ups_rm`, which asks it, where rewards have components or an overlong penalty",
    f"{ARR}.model.path": "the folder, where the recipe names a model that is fetched",
    f"{ARR}.actor.loss_scale_factor": "data.max_response_length where not given (verl would take each batch's longest)",
    **{
        f"{ARR}.actor.optim.{name}": "constant with zero_indexed_step=false (heeded for cosine only): a cosine with "
        "min_lr_ratio=1"
        for name in ("lr_scheduler_type", "min_lr_ratio", "zero_indexed_step")
    },
    f"{ARR}.actor.fsdp_config.dtype": "fsdp_config.mixed_precision of actor and reference",
    f"{ARR}.rollout.dtype": "auto: that of the actor's forward",
    "data.seed": "the order of the prompts, laid out in the file that verl reads; also verl's data.seed",
    "trainer.total_epochs": "trainer.total_training_steps",
    "trainer.total_training_steps": "with total_epochs: steps that the prompts allow",
    "trainer.logger": "trainer.logger without jsonl, which is always written, plus verl's `file`",
    "trainer.val_before_train": "only if test_freq asks for validation, as in the local engine",
    "trainer.save_freq": "-1: after the last step only, which the trained policy is taken from",
    "trainer.default_local_dir": "as an absolute path",
    "trainer.resume_from_path": "as an absolute path",
    "trainer.max_actor_ckpt_to_keep": "either name",
    "trainer.max_ckpt_to_keep": "trainer.max_actor_ckpt_to_keep",
    "trainer.device": "auto: cuda",
    "trainer.seed": "actor.fsdp_config.seed",
    "ray_kwargs.ray_init.address": "`local` where not given: a Ray of its own, whatever else runs on the machine",
}
"""Recipe keys that reach verl in other words."""

OURS = {
    "prepare": "ups-rm run, before verl",
    "reward_training": "ups-rm run, before verl",
    "evaluation": "ups-rm run and ups-rm eval, after verl",
    **dict.fromkeys(
        [f"data.{name}" for name in ("train_files", "val_files", "train_max_samples", "val_max_samples", "shuffle")],
        "the prompts are laid out for verl by distributed/prompts.py",
    ),
    **dict.fromkeys(
        [f"data.{name}" for name in ("filter_overlong_prompts", "unique_prompts", "benign_share")],
        "the prompts are laid out for verl by distributed/prompts.py",
    ),
    **dict.fromkeys(
        [f"algorithm.{name}" for name in ("objective", "objective_weights", "constraint", "normalize_components")],
        "an advantage estimator of ours in verl's registry, see distributed/verl_objective.py",
    ),
    "reward_model": "our reward manager and its workers, see distributed/rewards.py",
    **dict.fromkeys(
        [f"trainer.group_log_{name}" for name in ("dir", "freq", "max_groups", "max_samples_per_group")],
        "our trainer in verl, see distributed/rewards.py",
    ),
    "monitor": "ups-rm's own process reads verl's metrics, see docs/monitoring.md",
    "trainer.allow_changes": "our check of the checkpoint, before verl",
    "trainer.overwrite": "our check of the run folder, before verl",
    "verl": "distributed/launch.py",
}
"""Sections and keys that UPS-RM reads itself, and where."""

REFUSED = {
    "trainer.max_kl": "verl has no early stop (monitor.stop_on=[kl_runaway] ends it from outside)",
    "trainer.max_grad_norm": "verl has no early stop",
    "trainer.nonfinite": "verl leaves the update out where the gradient is not finite, and goes on",
    "trainer.max_skipped_steps": "verl leaves the update out where the gradient is not finite, and goes on",
    "algorithm.zero_std_groups": "groups of equal scores stay (verl's algorithm.filter_groups draws other prompts)",
    "algorithm.zero_std_tolerance": "verl divides by std + 1e-6 whatever the std is; only objectives of several "
    "components heed it there",
    "algorithm.resamples": "groups of equal scores stay",
    "reward_model.max_dropped_share": "no reply is left out: one without a score ends the run",
    "trainer.best_ckpt_to_keep": "verl keeps the newest checkpoints only",
    "trainer.async_save": "verl saves as it does; the key is the local engine's",
}
"""Recipe keys that verl 0.9.1 can't honour."""

TRACKERS = ("console", "wandb", "tensorboard", "mlflow", "swanlab", "clearml", "trackio")
"""Trackers that are verl's as well."""


PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
NOT_TEXT = ("null", "true", "false", "nan", "inf", "yes", "no", "on", "off")


def verl_overrides(recipe: Recipe, prompts: PromptFiles) -> list[str]:
    """The recipe as Hydra overrides of verl's `ppo_trainer` configuration.

    Args:
        prompts: as laid out by `distributed.prompts`, in the order of the steps.

    Raises:
        RecipeError: an option that verl can't honour, with the reason.
    """
    check_for_verl(recipe)
    overrides: Overrides = {key: value_of(recipe, key) for key in SAME}
    overrides |= _data(recipe, prompts)
    overrides |= _number_formats(recipe)
    overrides |= _actor(recipe)
    overrides |= _trainer(recipe, prompts)
    overrides |= rewards.verl_overrides(recipe)
    return [f"{key}={hydra_value(value)}" for key, value in overrides.items()] + list(recipe.verl.overrides)


def check_for_verl(recipe: Recipe) -> None:
    """What verl can't do is said before anything starts.

    Raises:
        RecipeError: names the key and the reason.
    """
    trainer = recipe.trainer
    _check_refused(recipe)
    judge = recipe.monitor.judge
    if judge.path or judge.url or judge.callable:
        raise RecipeError(
            "monitor.judge: the verl engine has no second judge\n"
            "  fix: leave it out, and compare afterwards: ups-rm eval --rm JUDGE"
        )
    unknown = sorted({*as_list(trainer.logger)} - {*TRACKERS, "jsonl"})
    if unknown:
        raise RecipeError(f"trainer.logger={unknown[0]} is no tracker of verl's; it has {', '.join(TRACKERS)}")
    if trainer.n_gpus_per_node < 1:
        raise RecipeError(f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}: the verl engine needs at least 1")
    tensor_parallel = recipe.actor_rollout_ref.rollout.tensor_model_parallel_size
    gpus = trainer.nnodes * trainer.n_gpus_per_node
    if gpus % tensor_parallel:
        raise RecipeError(
            f"{ARR}.rollout.tensor_model_parallel_size={tensor_parallel} does not divide the {gpus} GPUs "
            "(trainer.nnodes * trainer.n_gpus_per_node)"
        )
    for key in ("data.train_batch_size", f"{ARR}.actor.ppo_mini_batch_size"):
        replies = value_of(recipe, key) * recipe.actor_rollout_ref.rollout.n
        if replies % gpus:
            raise RecipeError(f"{key} * {ARR}.rollout.n = {replies} replies can't be divided evenly among {gpus} GPUs")
    _check_micro_batches(recipe, gpus)
    ray = recipe.ray_kwargs.ray_init
    if ray.address and ray.num_cpus is not None:
        raise RecipeError(
            f"ray_kwargs.ray_init.num_cpus={ray.num_cpus}, but ray_kwargs.ray_init.address={ray.address} names a "
            "cluster that runs already: Ray takes one of them"
        )
    rewards.check_placement(recipe.reward_model)
    _check_free_overrides(recipe)


def _check_refused(recipe: Recipe) -> None:
    default = Recipe()
    for key, reason in REFUSED.items():
        given, usual = value_of(recipe, key), value_of(default, key)
        heeded = key == "algorithm.zero_std_tolerance" and recipe.algorithm.objective != "safety"
        off = key in ("trainer.max_kl", "trainer.max_grad_norm") and given <= 0
        if given != usual and not heeded and not off:
            raise RecipeError(f"{key}={given}: {reason}\n  fix: {key}={usual}, or --engine local")


def _check_micro_batches(recipe: Recipe, gpus: int) -> None:
    """verl cuts each GPU's replies into micro batches of exactly the given size, and stops at a rest."""
    model, actor = recipe.actor_rollout_ref, recipe.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return
    per_gpu = model.rollout.n * actor.ulysses_sequence_parallel_size / gpus
    batch, mini = recipe.data.train_batch_size * per_gpu, actor.ppo_mini_batch_size * per_gpu
    sizes = {
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu": (model.rollout.log_prob_micro_batch_size_per_gpu, batch),
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu": (actor.ppo_micro_batch_size_per_gpu, mini),
    }
    if recipe.algorithm.use_kl_in_reward or actor.use_kl_loss:
        sizes[f"{ARR}.ref.log_prob_micro_batch_size_per_gpu"] = (model.ref.log_prob_micro_batch_size_per_gpu, batch)
    for key, (size, replies) in sizes.items():
        if replies % size:
            fits = max(math.gcd(int(replies), divisor) for divisor in range(1, size + 1))
            raise RecipeError(
                f"{key}={size} does not divide the {replies:g} replies of each of {gpus} GPUs, as verl demands\n"
                f"  fix: {key}={fits}, or {ARR}.actor.use_dynamic_bsz=true"
            )


def _check_free_overrides(recipe: Recipe) -> None:
    """A key that the recipe has must be set there: two places for one setting would hide one of them."""
    from ups_rm.recipe import known_keys

    known = set(known_keys())
    for text in recipe.verl.overrides:
        key = text.partition("=")[0].lstrip("+~")
        if "=" not in text or not key:
            raise RecipeError(f"verl.overrides: {text!r} is not key=value")
        if key in known:
            raise RecipeError(f"verl.overrides: {key} is a key of the recipe\n  fix: set it there instead: {text}")


def _data(recipe: Recipe, prompts: PromptFiles) -> Overrides:
    return {
        "data.train_files": str(prompts.train.absolute()),
        "data.val_files": str(prompts.val.absolute()),
        "data.shuffle": False,  # the file has the order
        "data.seed": recipe.data.seed,
        "data.validation_shuffle": False,
        "data.filter_overlong_prompts": False,  # done while the file was written
        "data.trust_remote_code": recipe.actor_rollout_ref.model.trust_remote_code,
        "data.dataloader_num_workers": 0,  # the position in the file is then exact in a checkpoint
    }


def _number_formats(recipe: Recipe) -> Overrides:
    """Compute type: verl's FSDP engine reads `mixed_precision`, not `dtype`; gradients are reduced in float32."""
    wanted = recipe.actor_rollout_ref.actor.fsdp_config.dtype
    dtype = "bfloat16" if wanted == "auto" else wanted
    rollout = recipe.actor_rollout_ref.rollout.dtype
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    mixed = {"param_dtype": short, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return {
        f"{ARR}.actor.fsdp_config.dtype": dtype,
        f"{ARR}.ref.fsdp_config.dtype": dtype,
        f"{ARR}.ref.fsdp_config.model_dtype": recipe.actor_rollout_ref.actor.fsdp_config.model_dtype,
        f"+{ARR}.actor.fsdp_config.mixed_precision": mixed,
        f"+{ARR}.ref.fsdp_config.mixed_precision": mixed,
        f"{ARR}.rollout.dtype": dtype if rollout == "auto" else rollout,
    }


def _actor(recipe: Recipe) -> Overrides:
    actor = recipe.actor_rollout_ref.actor
    given = actor.loss_scale_factor
    level = actor.optim.lr_scheduler_type == "constant" and not actor.optim.zero_indexed_step
    ours = recipe.algorithm.objective != "safety" or recipe.reward_model.overlong_buffer.enable
    return {
        "algorithm.adv_estimator": "ups_rm" if ours else recipe.algorithm.adv_estimator,
        f"{ARR}.model.path": recipe.actor_rollout_ref.model.path,
        f"{ARR}.actor.loss_scale_factor": recipe.data.max_response_length if given is None else given,
        f"{ARR}.actor.optim.lr_scheduler_type": "cosine" if level else actor.optim.lr_scheduler_type,
        f"{ARR}.actor.optim.min_lr_ratio": 1.0 if level else actor.optim.min_lr_ratio,
        f"{ARR}.actor.optim.zero_indexed_step": actor.optim.zero_indexed_step,
        f"{ARR}.actor.fsdp_config.seed": recipe.trainer.seed,
    }


def _trainer(recipe: Recipe, prompts: PromptFiles) -> Overrides:
    trainer, address = recipe.trainer, recipe.ray_kwargs.ray_init.address
    resume_from = trainer.resume_from_path
    return {
        "trainer.total_epochs": 1,  # the file holds every prompt of every step
        "trainer.total_training_steps": prompts.total_steps,
        "+trainer.ups_rm_steps_per_epoch": prompts.steps_per_epoch,  # for `training/epoch`
        "trainer.logger": [name for name in as_list(trainer.logger) if name != "jsonl"] + ["file"],
        "trainer.val_before_train": trainer.val_before_train and trainer.test_freq > 0,
        "trainer.save_freq": trainer.save_freq if trainer.save_freq > 0 else prompts.total_steps,
        "trainer.default_local_dir": str(Path(trainer.default_local_dir).absolute()),
        "trainer.max_actor_ckpt_to_keep": trainer.ckpt_to_keep,
        "trainer.resume_from_path": str(Path(resume_from).absolute()) if resume_from else None,
        "trainer.device": "cuda" if trainer.device == "auto" else trainer.device,
        "+ray_kwargs.ray_init.address": address or "local",  # never whatever cluster happens to run here
        "+ray_kwargs.ray_init.runtime_env.env_vars": run_environment(recipe),
    }


def run_environment(recipe: Recipe) -> dict[str, str]:
    """What every process of verl's needs in its environment, on every node."""
    folder = Path(recipe.trainer.default_local_dir).absolute()
    return {
        "VERL_USE_EXTERNAL_MODULES": ",".join(["ups_rm.distributed.process", *recipe.verl.external_modules]),
        "VERL_FILE_LOGGER_PATH": str(folder / "verl" / "metrics.jsonl"),
        "TENSORBOARD_DIR": str(folder / "tensorboard"),
        "WANDB_DIR": str(folder),
    }


def hydra_value(value: Any) -> str:
    """A value in Hydra's override grammar; texts are quoted unless they are plain words, and `${` stays text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in NOT_TEXT:
        return text
    # a backslash is itself except before a quote, and before `${`, which it makes text
    text = re.sub(r"(\\*)('|\$\{|$)", lambda found: found[1] * 2 + ("\\" if found[2] else "") + found[2], text)
    return f"'{text}'"


def verl_config(overrides: Iterable[str]) -> dict[str, Any]:
    """verl's whole configuration with the overrides, as its own `main_ppo` composes it; unresolved.

    Raises:
        RunError: verl is not installed. RecipeError: verl's configuration does not take an override.
    """
    from importlib.util import find_spec

    from ups_rm.errors import RunError

    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise RunError('the verl engine needs verl 0.9.1\n  fix: pip install "ups-rm[verl]"')
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    folder = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "config"
    try:
        with initialize_config_dir(str(folder), version_base=None):
            config = compose("ppo_trainer", overrides=list(overrides))
    except HydraException as error:
        raise RecipeError(f"verl 0.9.1 does not take this configuration: {error}") from error
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
