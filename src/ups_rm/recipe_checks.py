"""What the values of a recipe must be, each by itself and against each other. No torch: errors are instant."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RecipeError
from ups_rm.monitor.limits import ALARMS
from ups_rm.reward.transforms import OUTPUTS, TRANSFORMS

if TYPE_CHECKING:
    from ups_rm.recipe import Recipe, RewardModelModel

# As in ups_rm.grpo, which imports torch; a test keeps them equal.
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
ADV_ESTIMATORS = ("grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo",
                  "reinforce_plus_plus_baseline")  # fmt: skip
POLICY_LOSSES = ("vanilla", "gspo", "cispo")
ORDERS = ("before", "after")
DTYPES = ("auto", "bfloat16", "float32")
RM_KINDS = ("auto", "myrm", "sequence", "token", "pairwise", "function", "http")
NORMALIZE = ("auto", "reference", "fixed", "none")
CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

ARR = "actor_rollout_ref"
ONE_OF: dict[str, tuple[str, ...]] = {
    "prepare.dedup": ("none", "prompt"),
    "reward_training.target": ("safety", "helpfulness", "both"),
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
    "algorithm.adv_estimator": ADV_ESTIMATORS,
    "algorithm.kl_penalty": (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS)),
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "reward_model.model.dtype": DTYPES,
    f"{ARR}.actor.strategy": ("fsdp2", "fsdp"),
    "reward_model.model.kind": RM_KINDS,
    "reward_model.model.output": OUTPUTS,
    "reward_model.model.normalize": NORMALIZE,
    "reward_model.transform": TRANSFORMS,
    "reward_model.placement": ("shared", "own", "node", "http"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    "trainer.nonfinite": ("skip", "stop"),
    "algorithm.zero_std_groups": ("keep", "mask", "resample"),
    "algorithm.objective": ("safety", "weighted", "constrained"),
    "algorithm.constraint.prompts": ("all", "unsafe"),
    "algorithm.normalize_components": ORDERS,
    f"{ARR}.actor.policy_loss.loss_mode": POLICY_LOSSES,
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
    "reward_model.model.weight": (1e-12, INF),
    "reward_model.model.mean": (-INF, INF),
    "reward_model.model.std": (1e-12, INF),
    "reward_model.transform_temperature": (1e-12, INF),
    "reward_model.max_batch_tokens": (1, INF),
    "reward_model.num_workers": (1, INF),
    "reward_model.timeout_s": (0.1, INF),
    "reward_model.retries": (0, INF),
    "trainer.total_epochs": (1, INF),
    "trainer.total_training_steps": (1, INF),
    "trainer.max_actor_ckpt_to_keep": (1, INF),
    "trainer.max_ckpt_to_keep": (1, INF),
    "trainer.best_ckpt_to_keep": (0, INF),
    "trainer.max_skipped_steps": (0, INF),
    "algorithm.zero_std_tolerance": (0, INF),
    "algorithm.resamples": (0, INF),
    "reward_model.max_dropped_share": (0, 1),
    "reward_model.overlong_buffer.len": (0, INF),
    "reward_model.overlong_buffer.penalty_factor": (0, INF),
    "algorithm.objective_weights.safety": (0, INF),
    "algorithm.objective_weights.helpfulness": (0, INF),
    "algorithm.constraint.cost_limit": (-INF, INF),
    "algorithm.constraint.lambda_init": (1e-12, INF),
    "algorithm.constraint.lambda_lr": (0, INF),
    "algorithm.constraint.lambda_min": (1e-12, INF),
    "algorithm.constraint.lambda_max": (1e-12, INF),
    "algorithm.constraint.warmup_steps": (0, INF),
    "trainer.group_log_freq": (0, INF),
    "trainer.nnodes": (1, INF),
    "trainer.n_gpus_per_node": (0, INF),
    f"{ARR}.actor.ppo_max_token_len_per_gpu": (1, INF),
    f"{ARR}.actor.ulysses_sequence_parallel_size": (1, INF),
    f"{ARR}.rollout.tensor_model_parallel_size": (1, INF),
    f"{ARR}.rollout.gpu_memory_utilization": (1e-9, 1),
    f"{ARR}.rollout.max_num_batched_tokens": (1, INF),
    "ray_kwargs.ray_init.num_cpus": (1, INF),
    "monitor.window": (1, INF),
    **{f"monitor.{name}": (0, 1) for name in ("benign_refusals", "benign_refusals_rise", "refusals", "distinct_2")},
    **{f"monitor.{name}": (0, 1) for name in ("repetition_rise", "prompt_overlap", "zero_std_share")},
    **{f"monitor.{name}": (0, 1) for name in ("saturated_share", "judge_share", "judge_min_gain")},
    "monitor.length_factor": (1 + 1e-9, INF),
    "monitor.kl": (0, INF),
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
    *(f"reward_model.{name}" for name in ("placement", "num_workers", "timeout_s", "node_resource")),
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
    _check_integers(recipe)
    for key, allowed in ONE_OF.items():
        value = value_of(recipe, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value)[:100], allowed, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{key}={_shown(value)} is not one of {', '.join(allowed)}; did you mean {near}?")
    for key, (least, most) in BETWEEN.items():
        value = value_of(recipe, key)
        if value is not None and not (least <= value <= most and _is_finite(value)):
            raise RecipeError(f"{key}={_shown(value)} {_range(key, value, least, most)}")
    for key in TEXTS:
        value = value_of(recipe, key)
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise RecipeError(f"{key}={_shown(value)} is neither a text nor a list of texts")
    betas = recipe.actor_rollout_ref.actor.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise RecipeError(f"{ARR}.actor.optim.betas={betas} must be two numbers in [0, 1), for example [0.9,0.999]")
    _check_together(recipe)
    _check_objective(recipe)
    _check_reward_models(recipe)
    if engine == "local":
        _check_local(recipe)


def _check_integers(section: Any, prefix: str = "") -> None:
    """YAML reads integers of any length; tensors, seeds and JSON readers take 64 bits."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_integers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int) and not _is_finite(value):
            raise RecipeError(f"{prefix}{field.name}={_shown(value)} is not a number of at most 64 bits")


def _is_finite(value: float) -> bool:
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


def _shown(value: Any) -> str:
    """A value for a message, shortened."""
    if isinstance(value, int) and not _is_finite(value):
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _range(key: str, value: float, least: float, most: float) -> str:
    if not _is_finite(value):
        return "is not a finite number of at most 64 bits"
    if key == f"{ARR}.actor.clip_ratio":
        return "has no effect, as in verl: set clip_ratio_low and clip_ratio_high"
    if most < INF:
        return f"must lie between {least:g} and {most:g}"
    nearly = round(least) if abs(least - round(least)) < 1e-6 else least
    return f"must be at least {least:g}" if least == nearly else f"must be more than {nearly:g}"


def _check_together(recipe: Recipe) -> None:
    actor, data = recipe.actor_rollout_ref.actor, recipe.data
    if -1 < data.benign_share < 0:
        raise RecipeError(f"data.benign_share={data.benign_share} must be a share from 0 to 1, or -1 for none")
    if data.train_batch_size % actor.ppo_mini_batch_size:
        raise RecipeError(
            f"data.train_batch_size={data.train_batch_size} is not a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
        )
    if recipe.algorithm.adv_estimator == "grpo_passk" and recipe.actor_rollout_ref.rollout.n < 2:
        raise RecipeError(
            f"algorithm.adv_estimator=grpo_passk compares the best two replies to a prompt, but "
            f"actor_rollout_ref.rollout.n={recipe.actor_rollout_ref.rollout.n}\n  fix: actor_rollout_ref.rollout.n=4"
        )
    if recipe.evaluation.max_unsafe_prompts + recipe.evaluation.max_benign_prompts == 0:
        raise RecipeError("evaluation.max_unsafe_prompts=0 and evaluation.max_benign_prompts=0: nothing to compare on")
    made = recipe.reward_training
    for name in ("helpful", "degenerate"):
        if made.lora and (weight := getattr(made, name)):
            raise RecipeError(
                f"reward_training.{name}={weight:g} and reward_training.lora=True: adapters do not learn from that "
                f"comparison\n  fix: reward_training.{name}=0, or no lora"
            )
    _check_target(recipe)
    for name in recipe.monitor.stop_on:
        if name not in ALARMS:
            near = difflib.get_close_matches(str(name)[:100], ALARMS, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"monitor.stop_on: {_shown(name)} is not one of {', '.join(ALARMS)}; did you mean {near}?"
            )
    names = ("max_ckpt_to_keep", "max_actor_ckpt_to_keep")
    given = {name: keep for name in names if (keep := getattr(recipe.trainer, name)) is not None}
    if len(set(given.values())) > 1:
        told = ", ".join(f"trainer.{name}={keep}" for name, keep in given.items())
        raise RecipeError(f"{told} are two names for one setting\n  fix: give one of them")
    if recipe.trainer.resume_mode == "resume_path" and not recipe.trainer.resume_from_path:
        raise RecipeError("trainer.resume_mode=resume_path needs trainer.resume_from_path")


def _check_target(recipe: Recipe) -> None:
    """Whether the heads that the run would make go with the reward models that are named."""
    made, models = recipe.reward_training, recipe.reward_model
    if made.target == "both" and models.helpfulness.named and not models.entries():
        raise RecipeError(
            "reward_training.target=both makes a helpfulness head, and reward_model.helpfulness names another model\n"
            "  fix: reward_training.target=safety, or leave reward_model.helpfulness out"
        )
    if made.target != "helpfulness":
        return
    if made.lora:
        raise RecipeError(
            "reward_training.target=helpfulness and reward_training.lora=True: adapters learn from labels of safety\n"
            "  fix: reward_training.target=both, or no lora"
        )
    if not models.entries():
        raise RecipeError(
            "reward_training.target=helpfulness makes no reward model for safety, and none is named\n"
            "  fix: reward_training.target=both, or reward_model.model.path=FOLDER"
        )


def _check_objective(recipe: Recipe) -> None:
    algorithm, buffer = recipe.algorithm, recipe.reward_model.overlong_buffer
    constraint, weights = algorithm.constraint, algorithm.objective_weights
    if not constraint.lambda_min <= constraint.lambda_init <= constraint.lambda_max:
        raise RecipeError(
            f"algorithm.constraint.lambda_init={constraint.lambda_init:g} must lie between lambda_min="
            f"{constraint.lambda_min:g} and lambda_max={constraint.lambda_max:g}"
        )
    _check_unused(recipe)
    if algorithm.objective == "weighted" and weights.safety + weights.helpfulness == 0:
        raise RecipeError("algorithm.objective_weights: both are 0, so nothing would count")
    if algorithm.objective != "safety" and algorithm.adv_estimator == "reinforce_plus_plus_baseline":
        raise RecipeError(
            f"algorithm.objective={algorithm.objective}: adv_estimator=reinforce_plus_plus_baseline whitens over the "
            "batch, which knows of no components\n  fix: algorithm.adv_estimator=grpo (or rloo, opo, grpo_passk)"
        )
    longest = recipe.data.max_response_length
    if buffer.enable and not 1 <= buffer.len <= longest:
        raise RecipeError(
            f"reward_model.overlong_buffer.len={buffer.len} must lie between 1 and data.max_response_length={longest}"
        )


def _check_unused(recipe: Recipe) -> None:
    """A bound or weight that is set while safety alone is trained: the objective was forgotten."""
    from ups_rm.recipe import Recipe as Defaults

    if recipe.algorithm.objective != "safety":
        return
    for key, objective in (
        ("algorithm.constraint", "constrained"),
        ("algorithm.objective_weights", "weighted"),
        ("algorithm.normalize_components", "constrained"),
    ):
        if value_of(recipe, key) != value_of(Defaults(), key):
            raise RecipeError(
                f"{key} is set, but algorithm.objective=safety trains for the safe score alone: it has no effect\n"
                f"  fix: algorithm.objective={objective}, or leave it out"
            )


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


def _check_reward_models(recipe: Recipe) -> None:
    """Each entry by itself, and the entries against each other and against the rollout."""
    settings = recipe.reward_model
    if settings.models and (settings.model.path or settings.model.url or settings.model.callable):
        raise RecipeError(
            "reward_model.model and reward_model.models are both given (REWARD_MODEL_PATH and --rm set the first)\n"
            "  fix: add the one as an entry of reward_model.models, or leave one of the two out"
        )
    if settings.transform_temperature != 1.0 and settings.transform != "tempered_sigmoid":
        raise RecipeError(
            f"reward_model.transform_temperature={settings.transform_temperature:g} has no effect on "
            f"reward_model.transform={settings.transform}\n  fix: reward_model.transform=tempered_sigmoid"
        )
    for i, entry in enumerate(settings.models):
        if not dataclasses.is_dataclass(entry):  # an interpolation may stand for anything
            raise RecipeError(
                f"reward_model.models[{i}] is {_shown(entry)!r}, expected a section with the keys of model"
            )
    prefix = "reward_model.model."
    entries = {f"reward_model.models[{i}].": entry for i, entry in enumerate(settings.models)}
    entries["monitor.judge."] = recipe.monitor.judge
    entries["reward_model.helpfulness."] = settings.helpfulness
    for where, entry in entries.items():
        for key, allowed in ONE_OF.items():
            if key.startswith(prefix) and (value := getattr(entry, key.removeprefix(prefix))) not in allowed:
                raise RecipeError(
                    f"{where}{key.removeprefix(prefix)}={_shown(value)} is not one of {', '.join(allowed)}"
                )
        for key, (least, most) in BETWEEN.items():
            if key.startswith(prefix):
                value = getattr(entry, key.removeprefix(prefix))
                if not (least <= value <= most and _is_finite(value)):
                    name = key.removeprefix(prefix)
                    raise RecipeError(f"{where}{name}={_shown(value)} {_range(key, value, least, most)}")
        _check_entry(entry, where)
    if not settings.models:
        _check_entry(settings.model, prefix)
    names = [entry.name for entry in settings.models if entry.name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"reward_model.models: two entries have the name {twice[0]!r}")
    if settings.helpfulness.output == "unsafety":
        raise RecipeError(
            "reward_model.helpfulness.output=unsafety: helpfulness is a number that is higher for better replies\n"
            "  fix: reward_model.helpfulness.output=reward"
        )
    plain = type(settings)().helpfulness
    for name in ("weight", "normalize", "mean", "std"):
        if (value := getattr(settings.helpfulness, name)) != getattr(plain, name):
            raise RecipeError(
                f"reward_model.helpfulness.{name}={value} has no effect: only reward models for safety are combined\n"
                f"  fix: leave reward_model.helpfulness.{name} out"
            )
    relative = [entry for entry in settings.asked() if entry.kind == "pairwise" and not entry.reference_replies]
    rollout = recipe.actor_rollout_ref.rollout
    validates = recipe.trainer.test_freq > 0
    for key, n in ((f"{ARR}.rollout.n", rollout.n), (f"{ARR}.rollout.val_kwargs.n", rollout.val_kwargs.n)):
        if relative and n < 2 and (validates or "val_kwargs" not in key):
            raise RecipeError(
                f"{key}={n}: a pairwise RM has nothing to compare a single reply with\n"
                "  fix: 2 or more, or reference_replies of the model"
            )


def _check_no_secret(entry: RewardModelModel, where: str) -> None:
    """A recipe is written into the run folder, checkpoints and trackers: no token in it, and none in these messages."""
    if "@" in entry.url.partition("://")[2].partition("/")[0]:
        raise RecipeError(
            f"{where}url has a user or a token before the host, and the recipe is written into the run folder\n"
            f"  fix: the address alone, and {where}token_env=NAME of an environment variable with the token"
        )
    if entry.token_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", entry.token_env):
        raise RecipeError(
            f"{where}token_env is not the name of an environment variable (letters, digits, '_'); what it is is not "
            "shown here, for it may be the token itself\n  fix: put the token into a variable and give its name"
        )


def _check_entry(entry: RewardModelModel, where: str) -> None:
    sources = {"path": entry.path, "url": entry.url, "callable": entry.callable}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1 or (not given and "models[" in where):
        found = " and ".join(given) or "nothing"
        raise RecipeError(f"{where[:-1]} names {found}, expected one of path, url, callable")
    needs = {"function": "callable", "http": "url", "myrm": "path", "sequence": "path", "token": "path"}
    if given and entry.kind in needs and given != [needs[entry.kind]]:
        raise RecipeError(f"{where}kind={entry.kind} needs {where}{needs[entry.kind]}, but {given[0]} is given")
    if entry.kind == "pairwise" and given == ["url"]:
        raise RecipeError(f"{where}kind=pairwise needs path or callable: a service answers one number per conversation")
    if entry.callable and not CALLABLE.fullmatch(entry.callable):
        raise RecipeError(
            f"{where}callable={entry.callable[:200]!r} is not `module:callable`, for example my_package.rewards:score"
        )
    if entry.url and not entry.url.startswith(("http://", "https://")):
        raise RecipeError(f"{where}url={entry.url[:200]!r} must begin with http:// or https://")
    _check_no_secret(entry, where)
    if entry.name and not re.fullmatch(r"[\w.-]+", entry.name):
        raise RecipeError(
            f"{where}name={entry.name[:200]!r} must be letters, digits, '-', '_' and '.': metrics carry it"
        )
    if entry.reference_replies and entry.kind != "pairwise":
        raise RecipeError(f"{where}reference_replies has an effect with kind=pairwise only")
