"""The recipe: unknown keys name the nearest known one, wrong values say so, verl's keys are verl's."""

from __future__ import annotations

import dataclasses
import re
import string
import subprocess
import sys
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ups_rm.errors import RecipeError
from ups_rm.recipe import VERL_ONLY, Recipe, RewardModelModel, as_list, known_keys, load_recipe
from ups_rm.recipe_checks import (
    BETWEEN,
    FOR_VERL,
    INF,
    KL_ESTIMATORS,
    LOSS_AGG_MODES,
    ONE_OF,
    ORDERS,
    POLICY_LOSSES,
    TEXTS,
    check_recipe,
    value_of,
)
from ups_rm.recipe_hash import recipe_hash

KEYS = sorted(known_keys())
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]
SECTIONS = [key for key in KEYS if key not in LEAVES]
REPO = Path(__file__).parents[1]


def failure(name: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(name, overrides)
    return str(error.value)


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text("")
    return tmp_path / "mine.yaml"


# ---- unknown keys


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """(a key with one letter missing, added, changed or swapped, the key that was meant)."""
    key = draw(st.sampled_from(KEYS))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    kind = draw(st.sampled_from(["missing", "added", "changed", "swapped"]))
    typo = {
        "missing": key[:at] + key[at + 1 :],
        "added": key[:at] + letter + key[at:],
        "changed": key[:at] + letter + key[at + 1 :],
        "swapped": key[:at] + key[at + 1 : at + 2] + key[at : at + 1] + key[at + 2 :],
    }[kind]
    return typo, key


@given(typos())
@settings(max_examples=120, deadline=None)
def test_a_typo_names_a_key_that_is_as_near_as_the_one_meant(case: tuple[str, str]) -> None:
    typo, meant = case
    if typo in KEYS or not typo.strip("."):
        return
    message = failure("quickstart", f"{typo}=1")
    found = re.search(r"^(\S+) is not a key of the recipe; did you mean (\S+?)( or .*)?\?$", message, re.MULTILINE)
    assert found, message
    assert found[1] == typo
    assert found[2] in KEYS
    assert edit_distance(typo, found[2]) <= edit_distance(typo, meant)
    assert message.endswith(f"in the override '{typo}=1'")


@given(typos())
@settings(max_examples=40, deadline=None)
def test_a_typo_in_a_file_names_key_and_line(case: tuple[str, str]) -> None:
    import tempfile

    typo, _ = case
    parts = typo.split(".")
    if typo in KEYS or not all(parts):
        return
    lines = ["# a comment", ""] + ["  " * depth + f"{part}:" for depth, part in enumerate(parts)]
    lines[-1] += " 1"
    first_wrong = next(depth for depth in range(len(parts)) if ".".join(parts[: depth + 1]) not in KEYS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.yaml"
        file.write_text("\n".join(lines))
        message = failure(file)
        assert message.startswith(".".join(parts[: first_wrong + 1]) + " is not a key of the recipe")
        assert message.endswith(f"in {file}, line {first_wrong + 3}")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("rollout.n", "actor_rollout_ref.rollout.n"),
        ("actor.optim.lr", "actor_rollout_ref.actor.optim.lr"),
        ("optim.lr", "actor_rollout_ref.actor.optim.lr"),
        ("kl_coef", "algorithm.kl_ctrl.kl_coef"),
        ("lr", "reward_training.lr or actor_rollout_ref.actor.optim.lr"),
        ("actor_rollout_ref.rollout.m", "actor_rollout_ref.rollout.n"),
        ("trainer.total_steps", "trainer.total_epochs"),
        ("reward_model.path", "reward_model.model.path"),
    ],
)
def test_sections_left_out_are_found(wrong: str, meant: str) -> None:
    assert f"did you mean {meant}?" in failure("quickstart", f"{wrong}=1")


@pytest.mark.parametrize("key", VERL_ONLY)
def test_keys_of_the_verl_engine_say_why_and_name_the_nearest(key: str) -> None:
    message = failure("quickstart", f"{key}=1")
    assert message.startswith(f"{key} is verl's and has no effect here ({VERL_ONLY[key]})")
    found = re.search(r"did you mean (\S+?)( or .*)?\?", message)
    assert found
    assert found[1] in KEYS


# ---- values


def test_every_key_takes_its_own_default_back(file: Path) -> None:
    """In a file and as overrides; so no check refuses a default, and every default is of its type."""
    defaults = {key: value_of(Recipe(), key) for key in LEAVES}
    file.write_text(Recipe().to_yaml())
    overrides = [f"{key}={'null' if value is None else value}" for key, value in defaults.items()]
    for recipe in (load_recipe(file), load_recipe(file, overrides)):
        for key, default in defaults.items():
            if "${" not in str(default):
                assert value_of(recipe, key) == default, key
        assert recipe.trainer.default_local_dir == "runs/ups-rm/grpo"


WRONG = {int: ["x", "1.5", "[1]"], float: ["x", "[1.0]", "{a: 1}"], bool: ["maybe", "[true]"], list: ["3", "x"]}


def kind_of(key: str) -> Any:
    """The type that a key is annotated with, without its Optional."""
    hint: Any = Recipe
    for part in key.split("."):
        hint = typing.get_type_hints(hint)[part]
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    optional = typing.get_origin(hint) is not list and options
    kind = options[0] if optional else hint
    return typing.get_origin(kind) or kind


@pytest.mark.parametrize("key", [key for key in LEAVES if kind_of(key) in WRONG])
def test_a_value_of_the_wrong_type_is_an_error(key: str, file: Path) -> None:
    texts = WRONG[kind_of(key)]
    text = texts[len(key) % len(texts)]
    message = failure(file, f"{key}={text}")
    assert message.startswith(f"{key}: ")
    assert message.endswith(f"in the override {f'{key}={text}'!r}")


def test_a_wrong_type_in_a_file_names_its_line(file: Path) -> None:
    for key in ("data.seed", "data.shuffle", "actor_rollout_ref.actor.optim.betas", "actor_rollout_ref.actor.optim.lr"):
        file.write_text("# first line\n" + yaml.safe_dump(nested(key, WRONG[kind_of(key)][0])))
        message = failure(file)
        assert message.startswith(key)
        assert message.endswith(f"in {file}, line {2 + key.count('.')}")


def test_text_stays_text() -> None:
    """What YAML would take for a date, a number, a mapping or null is a name all the same."""
    for text in ("2024-01-01", "1e5", "007", "true", "a: b", "[x", "runs/#3", "~", "12:30"):
        recipe = load_recipe("quickstart", [f"trainer.experiment_name={text}"])
        assert recipe.trainer.experiment_name == text
    assert load_recipe("quickstart", ["trainer.experiment_name='quoted'"]).trainer.experiment_name == "quoted"
    assert load_recipe("quickstart", ["trainer.resume_from_path=null"]).trainer.resume_from_path is None
    assert load_recipe("quickstart", ["prepare.source=/a b/c=d.jsonl"]).prepare.source == "/a b/c=d.jsonl"


def test_numbers_and_lists_as_people_write_them() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "actor_rollout_ref.actor.optim.lr=5e-7", "trainer.logger=['console','wandb']", "+trainer.save_freq=5",
            "data.train_files=[a.parquet,b.parquet]", "actor_rollout_ref.actor.optim.betas=[0.8,0.95]",
            "data.shuffle=False", "trainer.total_training_steps=null",
        ],
    )  # fmt: skip
    assert recipe.actor_rollout_ref.actor.optim.lr == 5e-7
    assert recipe.trainer.logger == ["console", "wandb"]
    assert recipe.trainer.save_freq == 5
    assert as_list(recipe.data.train_files) == ["a.parquet", "b.parquet"]
    assert recipe.actor_rollout_ref.actor.optim.betas == [0.8, 0.95]
    assert recipe.data.shuffle is False
    assert recipe.trainer.total_training_steps is None


def test_later_overrides_win_and_paths_follow_names() -> None:
    recipe = load_recipe("quickstart", ["trainer.experiment_name=a", "trainer.experiment_name=b"])
    assert recipe.trainer.default_local_dir == "runs/ups-rm/b"
    assert recipe.trainer.group_log_dir == "runs/ups-rm/b/groups"


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_is_not_a_value(key: str, file: Path) -> None:
    assert f"{key} is a section, not a key" in failure("quickstart", f"{key}=1")
    for value in (5, None, [1], "x"):
        file.write_text(yaml.safe_dump(nested(key, value)))
        message = failure(file)
        assert f"{key} is a section, not a key" in message
        assert message.endswith(f"in {file}, line {1 + key.count('.')}")


def checked(key: str, value: Any) -> str:
    """What `check_recipe` says of the defaults with one value changed; "" if nothing."""
    recipe = Recipe()
    *sections, leaf = key.split(".")
    setattr(value_of(recipe, ".".join(sections)), leaf, value)
    try:
        check_recipe(recipe, engine=None if key in FOR_VERL else "local")
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", ONE_OF)
def test_names_are_of_a_list_and_the_nearest_is_given(key: str) -> None:
    allowed = ONE_OF[key]
    for name in allowed:
        assert not checked(key, name).startswith(f"{key}={name} is not one of")
    message = checked(key, f"{allowed[-1]}x")
    assert message.startswith(f"{key}={allowed[-1]}x is not one of {', '.join(allowed)}")
    assert f"did you mean {allowed[-1]}?" in message


@pytest.mark.parametrize("key", BETWEEN)
def test_numbers_are_within_their_range(key: str) -> None:
    least, most = BETWEEN[key]
    for value in (least - 1, most + 1):
        assert checked(key, value).startswith(f"{key}={value} ")
    for value in (float("inf"), float("-inf"), float("nan")):
        assert "is not a finite number" in checked(key, value) or "has no effect" in checked(key, value)
    inside = max(least, 1) if most > 1 else most
    alone = key.startswith(("algorithm.constraint", "algorithm.objective_weights"))  # mean nothing to `safety`
    if not alone and not key.endswith(("train_batch_size", "ppo_mini_batch_size")):  # these depend on each other
        assert checked(key, inside) == ""


@pytest.mark.parametrize(
    ("key", "value", "objective"),
    [
        ("algorithm.constraint.cost_limit", -2.0, "constrained"),
        ("algorithm.constraint.prompts", "unsafe", "constrained"),
        ("algorithm.objective_weights.helpfulness", 0.25, "weighted"),
        ("algorithm.normalize_components", "after", "constrained"),
    ],
)
def test_a_bound_without_its_objective_is_an_error(key: str, value: object, objective: str) -> None:
    """Else a forgotten algorithm.objective would train for safety alone."""
    assert f"algorithm.objective={objective}, or leave it out" in checked(key, value)
    given = [f"{key}={value}", f"algorithm.objective={objective}", "reward_training.target=both"]
    assert load_recipe("quickstart", given).algorithm.objective == objective


@pytest.mark.parametrize("key", [key for key, (least, most) in BETWEEN.items() if 0 < least < 1 and most == INF])
def test_the_limit_that_is_told_is_the_one_that_holds(key: str) -> None:
    """A value between 0 and the limit must not be told that it "must be more than 0"."""
    least = BETWEEN[key][0]
    message = checked(key, least / 2)
    told = float(message.rsplit(" ", 1)[1])
    assert message.startswith(f"{key}={least / 2} must be ")
    assert told == (least if least > 1e-6 else 0)


CONTRADICTIONS = {
    "mini batch does not divide": (
        ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=3"],
        "data.train_batch_size=8 is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size=3",
    ),
    "several devices": (["trainer.n_gpus_per_node=8"], "trainer.n_gpus_per_node=8: the local engine"),
    "several machines": (["trainer.nnodes=2"], "trainer.nnodes=2"),
    "resume without path": (["trainer.resume_mode=resume_path"], "needs trainer.resume_from_path"),
    "two number formats": (
        ["actor_rollout_ref.rollout.dtype=float32", "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16"],
        "samples with the weights that it trains",
    ),
    "a clip that does nothing": (["actor_rollout_ref.actor.clip_ratio=0.1"], "has no effect, as in verl"),
    "half a share": (["data.benign_share=-0.5"], "must be a share from 0 to 1"),
    "nothing to compare": (
        ["evaluation.max_unsafe_prompts=0", "evaluation.max_benign_prompts=0"],
        "nothing to compare on",
    ),
    "adapters that do not compare": (
        ["reward_training.lora=true", "reward_training.helpful=0.3"],
        "adapters do not learn from that comparison",
    ),
    "spoiled replies with adapters": (
        ["reward_training.lora=true", "reward_training.degenerate=0.1"],
        "adapters do not learn from that comparison",
    ),
    "one beta": (["actor_rollout_ref.actor.optim.betas=[0.9]"], "must be two numbers"),
    "beta of 1": (["actor_rollout_ref.actor.optim.betas=[0.9,1.0]"], "must be two numbers"),
    "a key of the verl engine": (["reward_model.strategy=fsdp"], "is verl's and has no effect here"),
}


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_errors(overrides: list[str], message: str) -> None:
    assert message in failure("quickstart", *overrides)


def test_what_verl_is_told_beside_the_recipe_makes_another_training() -> None:
    """A run is not resumed, nor taken for done, with other overrides; with other time limits it is."""
    plain, same, *others = (
        recipe_hash(load_recipe("quickstart", [override], engine=None))
        for override in (
            "verl.time_limit=-1", "verl.time_limit=60", "verl.overrides=[algorithm.gamma=0.9]",
            "verl.external_modules=[my_rollout]",
        )
    )  # fmt: skip
    assert plain == same
    assert len({plain, *others}) == 3


@pytest.mark.parametrize("key", TEXTS)
def test_files_and_names_are_texts(key: str) -> None:
    for text in ("3", "[1]", "null"):
        assert "neither a text nor a list of texts" in failure("quickstart", f"{key}={text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a recipe"),
        ("5", "is not a recipe"),
        ("data:\n  seed: 1\n  seed: 2", "duplicate key seed"),
        ("data:\n\tseed: 1", "can't be read as YAML"),
        ("trainer:\n  default_local_dir: ${foo.bar}", "Interpolation key 'foo.bar' not found"),
        ("1: 2", "1 is not a key of the recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    found = failure(file)
    assert message in found
    assert str(file) in found


def test_a_recipe_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert "no recipe file at" in failure(tmp_path / "none.yaml")
    message = failure("quickstrat")
    assert "packaged ones: " in message
    assert "quickstart" in message
    assert "write key=value" in failure("quickstart", "trainer.seed")
    assert "write key=value" in failure("quickstart", "=3")


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    for text in ("", "\n", "# only a comment\n"):
        file.write_text(text)
        loaded, default = load_recipe(file).as_dict(), Recipe().as_dict()
        default["trainer"] |= {key: loaded["trainer"][key] for key in ("default_local_dir", "group_log_dir")}
        assert loaded == default


# ---- the whole


def packaged() -> list[str]:
    names = sorted(entry.name for entry in (resources.files("ups_rm") / "recipes").iterdir() if ".yaml" in entry.name)
    return [name for name in names if not name.startswith("study_")]


def test_a_study_is_no_recipe_and_says_what_runs_it() -> None:
    assert "fix: ups-rm study study_constrained" in failure("study_constrained")


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_loads_and_gives_itself_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name.removesuffix(".yaml"), engine=None)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again, engine=None) == recipe


def test_quickstart_is_what_it_promises() -> None:
    recipe = load_recipe()
    assert recipe == load_recipe("quickstart")
    assert recipe.reward_model.model.path == ""
    assert recipe.prepare.source == "sample"
    assert 0 < recipe.data.benign_share < 1, "harmless prompts keep the policy from refusing everything"


def test_every_field_is_documented() -> None:
    """A text stands under every field and above every section: docs/recipe.md is made of them."""
    import ast

    tree = ast.parse((REPO / "src/ups_rm/recipe.py").read_text(encoding="utf-8"))
    missing = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "Recipe":
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and not _is_section(statement):
                    text = following.value if isinstance(following, ast.Expr) else None
                    if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                        missing.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert not missing


def _is_section(statement: Any) -> bool:
    import ast

    from ups_rm import recipe

    return dataclasses.is_dataclass(getattr(recipe, ast.unparse(statement.annotation), None))


def test_every_key_is_read_somewhere() -> None:
    """A key that no code reads would be dropped without a word. The last ones are checked, not used. What the verl
    engine does with each key is in tests/distributed."""
    sources = "\n".join(
        file.read_text(encoding="utf-8")
        for file in (REPO / "src" / "ups_rm").rglob("*.py")
        if file.name not in ("recipe.py", "recipe_checks.py") and file.parent.name not in ("distributed", "doctor")
    )
    local = [key for key in LEAVES if key not in FOR_VERL]
    unread = {key for key in local if not re.search(rf"[.\"]{key.rsplit('.', 1)[-1]}\b", sources)}
    assert unread == {
        "data.prompt_key",
        "data.truncation",
        "actor_rollout_ref.actor.clip_ratio",
        "actor_rollout_ref.actor.fsdp_config.model_dtype",
    }


def test_names_are_those_of_grpo() -> None:
    from ups_rm import grpo

    assert set(ONE_OF["algorithm.kl_penalty"]) == set(grpo.KL_ESTIMATORS)
    assert set(KL_ESTIMATORS) < set(grpo.KL_ESTIMATORS)
    assert grpo.LOSS_AGG_MODES == LOSS_AGG_MODES
    assert tuple(grpo.TOKEN_LOSSES) == POLICY_LOSSES
    assert grpo.ORDERS == ORDERS
    assert ONE_OF["algorithm.adv_estimator"] == grpo.PER_REPLY


def test_the_recipe_is_read_without_torch() -> None:
    code = "import sys, ups_rm.recipe; ups_rm.recipe.load_recipe(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- verl


OF_VERLS_RM = {"reward_model.model.path", "reward_model.model.trust_remote_code"}
OURS = {
    "data.unique_prompts",
    "data.benign_share",
    *({f"reward_model.model.{field.name}" for field in dataclasses.fields(RewardModelModel)} - OF_VERLS_RM),
    *(f"reward_model.helpfulness.{field.name}" for field in dataclasses.fields(RewardModelModel)),
    "reward_model.models",
    "reward_model.transform",
    "reward_model.transform_temperature",
    "reward_model.reference_data",
    "reward_model.max_batch_tokens",
    "reward_model.placement",
    "reward_model.timeout_s",
    "reward_model.retries",
    "reward_model.node_resource",
    "trainer.seed",
    "trainer.max_kl",
    *(f"trainer.{name}" for name in ("allow_changes", "overwrite", "max_ckpt_to_keep", "best_ckpt_to_keep")),
    *(f"trainer.{name}" for name in ("async_save", "max_grad_norm", "nonfinite", "max_skipped_steps")),
    *(f"algorithm.{name}" for name in ("zero_std_groups", "zero_std_tolerance", "resamples")),
    "reward_model.max_dropped_share",
    *(f"reward_model.overlong_buffer.{name}" for name in ("enable", "len", "penalty_factor")),
    *(key for key in LEAVES if key.startswith(("algorithm.objective", "algorithm.constraint."))),
    "algorithm.normalize_components",
    "trainer.group_log_dir",
    "trainer.group_log_freq",
    "trainer.group_log_max_groups",
    "trainer.group_log_max_samples_per_group",
    "ray_kwargs.ray_init.address",  # an argument of ray.init that verl passes on
}
"""Keys in verl's sections that verl 0.9.1 does not have."""
OUR_SECTIONS = ("prepare", "reward_training", "evaluation", "monitor", "verl")


@pytest.fixture(scope="module")
def verl_config() -> dict[str, Any]:
    verl = pytest.importorskip("verl", reason="verl is an extra")
    file = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    return typing.cast(dict[str, Any], yaml.safe_load(file.read_text(encoding="utf-8")))


def in_verl(config: dict[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


@pytest.mark.oracle
def test_keys_that_verl_shares_exist_in_verl(verl_config: dict[str, Any]) -> None:
    shared = [key for key in LEAVES if key.split(".")[0] not in OUR_SECTIONS]
    missing = {key for key in shared if not in_verl(verl_config, key)[0]}
    assert missing == OURS


@pytest.mark.oracle
def test_keys_named_as_verls_are_verls(verl_config: dict[str, Any]) -> None:
    """The rest were verl's until it moved them (its reward_model is under `reward` now), and stand in old scripts."""
    assert {key for key in VERL_ONLY if not in_verl(verl_config, key)[0]} <= {
        "reward_model.micro_batch_size_per_gpu",
        "reward_model.strategy",
    }


@pytest.mark.oracle
def test_types_and_meaningful_defaults_are_verls(verl_config: dict[str, Any]) -> None:
    """A verl default of some type is of a type that our key takes; names of modes are verl's own."""
    for key in LEAVES:
        found, theirs = in_verl(verl_config, key)
        if not found or theirs is None or key.split(".")[0] in OUR_SECTIONS:
            continue
        ours = value_of(Recipe(), key)
        if isinstance(theirs, bool) or isinstance(ours, bool):
            assert isinstance(theirs, bool), key
            assert isinstance(ours, bool), key
        elif isinstance(theirs, int | float) and ours is not None:
            assert isinstance(ours, float) or isinstance(theirs, int), key
        elif isinstance(theirs, str) and ours is not None:
            assert isinstance(ours, str), key
        elif isinstance(theirs, list) and ours is not None:
            assert isinstance(ours, list), key
    actor = ("clip_ratio", "clip_ratio_c", "loss_agg_mode", "kl_loss_type", "grad_clip", "optim.betas")
    same = [f"actor_rollout_ref.actor.{name}" for name in (*actor, "optim.zero_indexed_step")]
    same += ["actor_rollout_ref.rollout.temperature", "actor_rollout_ref.rollout.top_k", "algorithm.kl_penalty"]
    same += [f"algorithm.kl_ctrl.{name}" for name in ("kl_coef", "horizon", "target_kl")]
    same += ["algorithm.norm_adv_by_std_in_grpo", "trainer.resume_mode", "trainer.val_before_train", "data.truncation"]
    for key in same:
        assert value_of(Recipe(), key) == in_verl(verl_config, key)[1], key


@pytest.mark.oracle
def test_a_resolved_recipe_composes_with_verls_own_config(verl_config: dict[str, Any]) -> None:
    """Everything that both know can be handed to verl as it stands: same nesting, no section where verl has a value."""
    from omegaconf import OmegaConf

    theirs = OmegaConf.create(verl_config)
    recipe = load_recipe()
    for key in LEAVES:
        if in_verl(verl_config, key)[0]:
            OmegaConf.update(theirs, key, value_of(recipe, key), merge=False)
            assert OmegaConf.select(theirs, key) == value_of(recipe, key) or isinstance(value_of(recipe, key), list)
    assert theirs.actor_rollout_ref.rollout.n == recipe.actor_rollout_ref.rollout.n


# ---- the engines


OTHER_VALUES: dict[type, Any] = {bool: lambda old: not old, int: lambda old: (old or 0) + 2, list: lambda old: ["a=b"]}


@pytest.mark.parametrize("key", FOR_VERL)
def test_the_local_engine_refuses_what_only_verl_does(key: str) -> None:
    default = value_of(Recipe(), key)
    names = {"actor_rollout_ref.actor.strategy": "fsdp", "reward_model.placement": "own"}
    other = {str: names.get(key, "x"), float: 0.25}.get(kind_of(key))
    other = OTHER_VALUES[kind_of(key)](default) if other is None else other
    message = failure("quickstart", f"{key}={other}")
    assert message.startswith(f"{key}={other}: only the verl engine does that")
    assert "fix: ENGINE=verl" in message
    assert value_of(load_recipe("quickstart", [f"{key}={other}"], engine="verl"), key) == other
    load_recipe("quickstart", [f"{key}={'null' if default is None else default}"])  # its default is taken
