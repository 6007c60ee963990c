"""From a recipe to verl's configuration: every key has a fate, and verl's own Hydra takes what comes out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ups_rm.distributed import rewards
from ups_rm.distributed.prompts import PromptFiles
from ups_rm.distributed.translate import COMPUTED, OURS, REFUSED, SAME, hydra_value, verl_config, verl_overrides
from ups_rm.errors import RecipeError
from ups_rm.local.actor import lr_factor
from ups_rm.recipe import Recipe, RewardModelModel, known_keys, load_recipe
from ups_rm.recipe_checks import ARR, ONE_OF, check_recipe, value_of

pytest.importorskip("verl", reason="verl is an extra")
LEAVES = [key for key in known_keys() if not dataclasses.is_dataclass(value_of(Recipe(), key))]
FULL_SCALE = ["pku_saferlhf_qwen2_7b_8gpu", "pku_saferlhf_qwen2_7b_2nodes"]


def overrides_of(recipe: Recipe) -> list[str]:
    return verl_overrides(recipe, PromptFiles(Path("t.parquet"), Path("v.parquet"), total_steps=30, steps_per_epoch=10))


def composed(recipe: Recipe) -> dict[str, Any]:
    return verl_config(overrides_of(recipe))


def at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def changed(key: str) -> tuple[Recipe, Any]:
    """A recipe with this one key away from its default, and the new value."""
    recipe = Recipe()
    recipe.reward_model.model.path = "rm"
    old = value_of(recipe, key)
    special = {
        "trainer.logger": ["console", "tensorboard"],
        f"{ARR}.model.target_modules": ["q_proj"],
        f"{ARR}.actor.optim.betas": [0.8, 0.9],
        f"{ARR}.rollout.top_p": 0.5,
        f"{ARR}.rollout.val_kwargs.top_p": 0.5,
        f"{ARR}.rollout.gpu_memory_utilization": 0.25,
        f"{ARR}.actor.ppo_mini_batch_size": 32,
        f"{ARR}.actor.clip_ratio": 0.2,
        "data.train_batch_size": 128,
        f"{ARR}.actor.fsdp_config.dtype": "float32",
        f"{ARR}.rollout.dtype": "float32",
        "trainer.save_freq": 7,
        "trainer.test_freq": 7,
        "trainer.total_training_steps": 30,
        "ray_kwargs.ray_init.num_cpus": 3,
        "reward_model.models": [RewardModelModel(path="one"), RewardModelModel(path="two")],
    }
    if key in special:
        new = special[key]
    elif key in ONE_OF:
        new = next((value for value in ONE_OF[key] if value != old), old)
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, int):
        new = old + 1
    elif isinstance(old, float):
        new = old / 2 if old > 0 else 0.5
    elif isinstance(old, list):
        new = [*old, "x"]
    else:
        new = "x"
    *sections, leaf = key.split(".")
    setattr(value_of(recipe, ".".join(sections)), leaf, new)
    return recipe, new


def test_every_key_of_the_recipe_has_exactly_one_fate() -> None:
    for key in LEAVES:
        owners = [key, *(key[:i] for i, letter in enumerate(key) if letter == ".")]
        ours = key not in REFUSED and any(
            owner in OURS for owner in owners
        )  # of a section of ours, a key may be refused
        fates = [key in SAME, key in COMPUTED, key in REFUSED, ours]
        assert sum(fates) == 1, f"{key} is in {sum(fates)} of SAME, COMPUTED, REFUSED, OURS"
    assert {*SAME, *COMPUTED, *REFUSED} <= set(LEAVES)
    assert set(OURS) <= set(known_keys())


def test_a_key_of_the_same_name_arrives_under_its_name() -> None:
    """All of them at once, each away from its default where it has another value: verl's config holds just those."""
    recipe = Recipe()
    recipe.reward_model.model.path = "rm"
    for key in SAME:
        *sections, leaf = key.split(".")
        setattr(value_of(recipe, ".".join(sections)), leaf, changed(key)[1])
    recipe.trainer.n_gpus_per_node, recipe.trainer.nnodes = 8, 3
    recipe.actor_rollout_ref.rollout.tensor_model_parallel_size = 4
    recipe.data.train_batch_size = recipe.actor_rollout_ref.actor.ppo_mini_batch_size = 96
    config = composed(recipe)
    for key in SAME:
        assert at(config, key) == value_of(recipe, key), key


@pytest.mark.parametrize("key", COMPUTED)
def test_a_computed_key_changes_what_verl_is_told(key: str) -> None:
    base, (recipe, _) = Recipe(), changed(key)
    base.reward_model.model.path = "rm"
    if key == "trainer.val_before_train":
        base.trainer.test_freq = recipe.trainer.test_freq = 1
    if key in ("trainer.total_epochs", "trainer.total_training_steps"):
        assert "total_training_steps=30" in " ".join(overrides_of(recipe))  # counted by prompts.py, and given
    else:
        assert overrides_of(recipe) != overrides_of(base)


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_away_from_its_default_is_an_error_with_the_reason(key: str) -> None:
    recipe, _ = changed(key)
    if key in ("trainer.max_kl", "trainer.max_grad_norm"):
        *_, leaf = key.split(".")
        setattr(recipe.trainer, leaf, 0.5)
    with pytest.raises(RecipeError, match=f"(?s){re.escape(key)}=.*{re.escape(REFUSED[key])}.*fix: {re.escape(key)}="):
        overrides_of(recipe)


def test_the_tolerance_is_heeded_where_rewards_have_components() -> None:
    recipe, tolerance = changed("algorithm.zero_std_tolerance")
    recipe.algorithm.objective = "constrained"
    assert f"+trainer.ups_rm_algorithm.zero_std_tolerance={tolerance}" in overrides_of(recipe)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_constant_rate_with_a_shifted_warm_up_is_verls_cosine_of_one_level(warmup: int) -> None:
    """verl's own schedule, as configured, gives the local engine's learning rates."""
    torch_functional = pytest.importorskip("verl.utils.torch_functional")
    recipe = Recipe()
    recipe.reward_model.model.path = "rm"
    optim = recipe.actor_rollout_ref.actor.optim
    optim.lr_warmup_steps, optim.zero_indexed_step = warmup, False
    told = at(composed(recipe), f"{ARR}.actor.optim")
    assert told["lr_scheduler_type"] == "cosine"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch_functional.get_cosine_schedule_with_warmup(
        optimizer, warmup, 10, told["min_lr_ratio"], told["num_cycles"], zero_indexed_step=told["zero_indexed_step"]
    )
    for step in range(10):
        assert schedule.get_last_lr()[0] == pytest.approx(lr_factor(step, optim, 10))
        optimizer.step()
        schedule.step()


def test_keys_of_the_reward_side_change_what_verl_is_told() -> None:
    base = Recipe()
    base.reward_model.model.path = "rm"
    check_recipe(base, engine=None)
    for key in (key for key in LEAVES if key.startswith(("reward_model.", "trainer.group_log_"))):
        recipe, new = changed(key)
        if new != value_of(base, key):
            assert rewards.verl_overrides(recipe) != rewards.verl_overrides(base), key


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trainer.max_kl=0.5"], "trainer.max_kl=0.5: verl has no early stop"),
        (["trainer.logger=[aim]"], "trainer.logger=aim is no tracker of verl's"),
        (["trainer.n_gpus_per_node=0"], "needs at least 1"),
        (["trainer.n_gpus_per_node=8", f"{ARR}.rollout.tensor_model_parallel_size=3"], "does not divide the 8 GPUs"),
        (["trainer.n_gpus_per_node=5"], "32 replies can't be divided evenly among 5 GPUs"),
        (["trainer.n_gpus_per_node=8"], "log_prob_micro_batch_size_per_gpu=32 does not divide the 4 replies"),
        (["trainer.n_gpus_per_node=8"], "fix: actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"),
        (["verl.overrides=[trainer.critic_warmup]"], "is not key=value"),
        (["verl.overrides=[+trainer.nnodes=2]"], "trainer.nnodes is a key of the recipe"),
        (["ray_kwargs.ray_init.address=auto", "ray_kwargs.ray_init.num_cpus=4"], "cluster that runs already"),
    ],
)
def test_what_verl_cannot_honour_is_an_error_with_the_reason(overrides: list[str], reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        overrides_of(load_recipe("quickstart", overrides, engine="verl"))
    assert reason in str(error.value)


def test_a_wrong_free_override_is_verls_own_error() -> None:
    with pytest.raises(RecipeError, match="no_such_key"):
        composed(load_recipe("quickstart", ["verl.overrides=[trainer.no_such_key=1]"], engine="verl"))


TEXT_VALUES = ["a b", "it's", 'a "quoted" word', "a,b", "{x: 1}", "[1]", "a=b", "C:\\dir\\", "\\'", "ü ☃", "$HOME"]
TEXT_VALUES += ["${trainer.nnodes}", "\\${x}", "", "null", "true", "1e-5", "007", " lead", "x#y", "a/b-c.d", "on"]


def test_values_arrive_as_they_are() -> None:
    """Through Hydra's own override parser, and OmegaConf's interpolation."""
    from omegaconf import OmegaConf

    values = [*TEXT_VALUES, 0.1, 1e-9, 3, True, None, ["a'b", 1], {"k": "v,w"}]
    config = OmegaConf.create(verl_config([f"+ups_rm_test_{i}={hydra_value(v)}" for i, v in enumerate(values)]))
    for i, value in enumerate(values):
        found = config[f"ups_rm_test_{i}"]
        assert (OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found) == value


@pytest.mark.parametrize("name", FULL_SCALE)
def test_full_scale_recipes_are_the_original_run(name: str) -> None:
    recipe = load_recipe(name, ["reward_model.model.path=rm"], engine="verl")
    config = composed(recipe)
    original = {
        "data.train_batch_size": 64,
        "data.max_prompt_length": 2048,
        "data.max_response_length": 2048,
        f"{ARR}.rollout.n": 4,
        f"{ARR}.rollout.temperature": 1.0,
        f"{ARR}.rollout.top_p": 1.0,
        f"{ARR}.rollout.tensor_model_parallel_size": 2,
        f"{ARR}.rollout.gpu_memory_utilization": 0.5,
        f"{ARR}.actor.optim.lr": 1e-6,
        f"{ARR}.actor.optim.lr_warmup_steps_ratio": 0.1,
        f"{ARR}.actor.ppo_mini_batch_size": 64,
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu": 8,
        "trainer.save_freq": 50,
        "trainer.test_freq": 10,
        "trainer.n_gpus_per_node": 8,
        "trainer.nnodes": 2 if name.endswith("2nodes") else 1,
        "algorithm.adv_estimator": "grpo",
    }
    assert {key: at(config, key) for key in original} == original
    assert recipe.trainer.total_epochs == 5  # prompts.py makes steps of it
    assert at(config, f"{ARR}.actor.fsdp_config.mixed_precision")["param_dtype"] == "bf16"
    assert at(config, "ray_kwargs.ray_init.address") == ("auto" if name.endswith("2nodes") else "local")


@pytest.mark.parametrize("name", FULL_SCALE)
def test_verl_itself_finds_nothing_wrong_with_the_full_scale_recipes(name: str, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from tiny import tiny_policy

    policy = tiny_policy(tmp_path / "policy")  # verl reads the model's config
    given = ["reward_model.model.path=rm", f"{ARR}.model.path={policy}"]
    config = OmegaConf.create(composed(load_recipe(name, given, engine="verl")))
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert need_reference_policy(config)
    assert not need_critic(config)


def test_dry_run_prints_command_and_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_training import command

    given = ["--engine", "verl", "--dry-run", "--recipe", FULL_SCALE[0], "--rm", "some/rm", "--out", tmp_path / "run"]
    assert command("train", *given) == 0
    out = capsys.readouterr().out
    yaml_text, _, last = out.rstrip().rpartition("\n")
    config = yaml.safe_load(yaml_text)
    assert at(config, f"{ARR}.rollout.n") == 4
    assert " -m verl.trainer.main_ppo " in last
    assert not (tmp_path / "run").exists()
