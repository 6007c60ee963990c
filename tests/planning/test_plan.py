"""`ups-rm plan` from the recipe to the printed tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tiny import tiny_policy, tiny_rm
from ups_rm.cli import app
from ups_rm.errors import PlanError
from ups_rm.planning import memory
from ups_rm.planning.architecture import read_architecture, reward_model
from ups_rm.planning.plan import HEADROOM, Machine, Plan, make_plan
from ups_rm.planning.report import proposed_settings
from ups_rm.planning.speed import GPUS, Cluster, rm_seconds
from ups_rm.recipe import load_recipe

QWEN, RM = read_architecture("qwen2-7b-instruct"), reward_model(read_architecture("llama3-8b"))
FULL_SCALE = [
    "data.train_batch_size=64", "data.max_prompt_length=2048", "data.max_response_length=2048",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.model.enable_gradient_checkpointing=true", "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16",
    "reward_model.max_batch_tokens=16384", "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
]  # fmt: skip
CLUSTER = Cluster(8, 8, GPUS["h200"], 2, 8, rm_gpus=1, rm_shared=False)
H200 = Machine(gpus=8, nodes=1, memory_gb=140, gpu=GPUS["h200"])
OPTIONS = ["plan", "--gpus", "8", "--gpu-mem", "140", "--policy", "qwen2-7b-instruct", "--rm", "llama3-8b"]
RUNNER = CliRunner()


def plan_of(machine: Machine = H200, *overrides: str) -> Plan:
    return make_plan(load_recipe("quickstart", [*FULL_SCALE, *overrides], engine=None), QWEN, RM, machine)


def test_the_full_scale_run_fits_8_gpus_of_140_gb():
    plan = plan_of()
    assert plan.fits, plan.problems
    assert plan.micro_batch.with_checkpointing >= 8


def test_the_same_run_on_24_gb_does_not_and_every_phase_says_the_way_out():
    plan = plan_of(replace(H200, memory_gb=24))
    assert not plan.fits
    assert all("\n  fix: " in problem for problem in plan.problems)
    assert {problem.split(" needs ")[0] for problem in plan.problems} >= {"rollout", "update"}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("memory_gb", [80, 140])
def test_the_proposed_micro_batch_fits_and_twice_as_many_does_not(checkpointing, memory_gb):
    plan = plan_of(replace(H200, memory_gb=memory_gb), "data.train_batch_size=4096")
    best = plan.micro_batch.with_checkpointing if checkpointing else plan.micro_batch.without_checkpointing

    def update(size: int) -> int:
        layout = replace(plan.layout, micro_batch=size, checkpointing=checkpointing)
        return sum(memory.phases(QWEN, RM, layout)["update"].values())

    limit = int(HEADROOM * memory_gb * 1e9)
    assert update(2 * best or 1) > limit
    assert best == 0 or update(best) <= limit


def test_proposed_micro_batches_are_taken_by_the_verl_engine():
    """6 GPUs beside 2 of the RM's own: 60 prompts x 4 are 40 replies per GPU, which 16 does not divide."""
    from ups_rm.distributed.translate import check_for_verl

    own = ["reward_model.placement=own", "trainer.n_gpus_per_node=6", "data.train_batch_size=60"]
    own += ["actor_rollout_ref.actor.ppo_mini_batch_size=60", "reward_model.model.path=llama3-8b"]
    found = plan_of(replace(H200, gpus=6, memory_gb=180), *own)
    assert (found.micro_batch.with_checkpointing, found.micro_batch.log_probs) == (20, 40)
    proposed = dict(word.split("=") for word in proposed_settings(found).split())
    assert len(proposed) == 3
    given = [*own, *(f"{key}={size}" for key, size in proposed.items())]
    check_for_verl(load_recipe("pku_saferlhf_qwen2_7b_8gpu", given, engine="verl"))


def test_checkpointing_saves_what_the_table_says():
    size = plan_of().activations
    assert size["without checkpointing"] > 8 * size["with checkpointing"]


def test_growth_goes_to_4096_gpus_with_the_batch_and_without():
    plan = plan_of()
    for rows, prompts in ((plan.growing, 64 * 512), (plan.fixed, 64)):
        assert {row.gpus for row in rows} == {8, 64, 512, 4096}
        assert rows[-1].prompts == prompts
        assert {row.shard_group for row in rows if row.gpus == 4096} == {8, 4096}
    assert [row.divides for row in plan.fixed if row.shard_group == 8] == [True, True, False, False]
    assert all(row.divides for row in plan.growing)


@pytest.mark.parametrize("gpus", [64, 512])
def test_as_many_rm_workers_as_the_table_says_take_a_tenth(gpus):
    plan = plan_of(replace(H200, rm_gpus=1))
    row = next(row for row in plan.growing if row.gpus == gpus)
    one_worker = rm_seconds(RM, replace(plan.work, prompts=row.prompts), CLUSTER, plan.machine.efficiency)
    assert one_worker / row.rm_workers_for_a_tenth <= 0.1 * (row.time.total - row.time.rm)
    assert one_worker / (row.rm_workers_for_a_tenth - 1) > 0.1 * (row.time.total - row.time.rm)


@pytest.mark.parametrize(
    ("nodes", "override", "message"),
    [
        (3, "", "8 GPUs can't be spread evenly over 3 nodes"),
        (
            1,
            "rollout.tensor_model_parallel_size=3",
            "tensor_model_parallel_size 3 does not divide the 8 GPUs of a node",
        ),
        (1, "actor.fsdp_config.fsdp_size=3", "fsdp_size 3 does not divide 8 GPUs"),
        (1, "actor.ulysses_sequence_parallel_size=3", "ulysses_sequence_parallel_size 3 does not divide 8 GPUs"),
    ],
)
def test_layouts_that_don_t_divide_are_refused(nodes, override, message):
    with pytest.raises(PlanError, match=message):
        plan_of(replace(H200, nodes=nodes), *([f"actor_rollout_ref.{override}"] if override else []))


KEYS = {
    "token budget": ("actor.use_dynamic_bsz=true", "update", "activations", 0.5),  # 16,384 tokens instead of 32,768
    "sequence parallel": ("actor.ulysses_sequence_parallel_size=2", "update", "activations", 0.5),
    "fp32 compute": ("actor.fsdp_config.dtype=float32", "update", "logits", 2.0),
    "sharded over 4": ("actor.fsdp_config.fsdp_size=4", "update", "optimizer (AdamW)", 2.0),
    "larger rollout": ("rollout.gpu_memory_utilization=0.75", "rollout", "rollout engine (weights, KV cache)", 1.5),
}


@pytest.mark.parametrize(("override", "phase", "part", "factor"), KEYS.values(), ids=KEYS.keys())
def test_what_the_recipe_says_of_its_layout_counts(override, phase, part, factor):
    before, after = plan_of(), plan_of(H200, f"actor_rollout_ref.{override}")
    assert after.phases[phase][part] == pytest.approx(factor * before.phases[phase][part], rel=0.01)


def test_an_engine_that_keeps_its_memory_and_weights_that_stay_gathered_are_counted():
    engine = "rollout engine (weights, KV cache)"
    assert engine not in plan_of().phases["update"]
    assert engine in plan_of(H200, "actor_rollout_ref.rollout.free_cache_engine=false").phases["update"]
    stays = plan_of(H200, "actor_rollout_ref.actor.fsdp_config.reshard_after_forward=false")
    assert stays.phases["update"]["gathered weights"] > 2 * QWEN.parameters


def test_the_command_prints_every_table():
    done = RUNNER.invoke(app, [*OPTIONS, *FULL_SCALE], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for text in ("7,615,616,512 parameters", "GB per GPU, by phase", "with checkpointing", "tensor parallel",
                 "tokens/s per GPU", "4,096",
                 "proposed micro batches: actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8", "bottleneck",
                 "assumed per GPU: 989 TFLOP/s", "fits"):  # fmt: skip
        assert text in done.output


def test_json_is_the_same_plan_and_a_plan_that_does_not_fit_exits_with_1():
    done = RUNNER.invoke(app, [*OPTIONS, "--json", *FULL_SCALE])
    found = json.loads(done.output)
    plan = plan_of()
    assert found["phases"]["update"]["total"] == sum(plan.phases["update"].values())
    assert found["time"]["total"] == pytest.approx(plan.time.total)
    assert found["growing"][-1]["time"]["bottleneck"] == plan.growing[-1].time.bottleneck
    assert found["fits"] is True
    small = RUNNER.invoke(app, [*OPTIONS[:4], "24", *OPTIONS[5:], "--json", *FULL_SCALE])
    assert small.exit_code == 1
    assert json.loads(small.output)["problems"]


def test_stated_flops_and_bandwidths_count_instead_of_the_data_sheet():
    stated = ["--tflops", "500", "--bandwidth", "2.5", "--link", "100", "--network", "12.5"]
    eager = "actor_rollout_ref.rollout.enforce_eager=true"
    found = json.loads(RUNNER.invoke(app, [*OPTIONS, *stated, "--json", *FULL_SCALE, eager]).output)["machine"]
    gpu = found["gpu"]
    assert (gpu["flops"], gpu["memory_bandwidth"], gpu["link"], gpu["network"]) == (500e12, 2.5e12, 100e9, 12.5e9)
    assert found["efficiency"]["iteration"] == 0.035


def test_folders_of_a_policy_and_an_rm_are_read_from_their_configs(tmp_path):
    policy, rm = tiny_policy(tmp_path / "policy"), tiny_rm(tmp_path / "rm")
    options = ["plan", "--gpus", "2", "--gpu-mem", "8", "--policy", str(policy), "--rm", str(rm), "--json"]
    found = json.loads(RUNNER.invoke(app, options).output)
    assert found["rm"]["head_dims"] == [16, 8]
    assert found["policy"]["hidden"] == 64


def test_an_unknown_gpu_is_refused():
    done = RUNNER.invoke(app, [*OPTIONS, "--gpu", "abacus"])
    assert isinstance(done.exception, PlanError)
    assert "h200" in str(done.exception)


@pytest.mark.parametrize(("name", "gpus"), [("pku_saferlhf_qwen2_7b_8gpu", 8), ("pku_saferlhf_qwen2_7b_2nodes", 16)])
def test_the_full_scale_recipes_fit_the_machines_they_are_for(name, gpus):
    """With nothing but their names: GPUs, nodes, policy and RM are the recipe's."""
    done = RUNNER.invoke(app, ["plan", "--recipe", name, "--gpu-mem", "140", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["layout"]["gpus"], found["layout"]["gpus_per_node"]) == (gpus, 8)
    assert found["policy"]["parameters"] == QWEN.parameters
    assert found["rm"]["parameters"] == RM.parameters
    assert found["layout"]["tensor_parallel"] == 2
    assert found["micro_batch"]["with_checkpointing"] >= 8


def test_gpus_are_those_of_one_node(tmp_path):
    done = RUNNER.invoke(app, [*OPTIONS, "--nodes", "2", "--json", *FULL_SCALE])
    assert json.loads(done.output)["layout"]["gpus"] == 16


def test_several_rms_are_refused_with_the_way_out():
    several = "reward_model.models=[{path: a}, {path: b}]"
    done = RUNNER.invoke(app, ["plan", "--gpu-mem", "140", several])
    assert isinstance(done.exception, PlanError)
    assert "--rm FOLDER" in str(done.exception)


# ---- where the RM scores

LLAMA = {"hidden": 4096, "inner": 14_336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128}
"""Llama-3-8B's published numbers."""
PLACEMENTS = [("shared", 1), ("shared", 8), ("own", 2), ("node", 1), ("http", 3)]


def placed(placement: str, workers: int, *overrides: str, machine: Machine = H200) -> Plan:
    given = [f"reward_model.placement={placement}", f"reward_model.num_workers={workers}"]
    return plan_of(machine, *given, *overrides)


def scoring_seconds(plan: Plan, gpus: int) -> float:
    """A forward over all conversations: 2 FLOPs per matrix weight and token, and causal attention; not the head."""
    h, i, layers, query, key = LLAMA["hidden"], LLAMA["inner"], LLAMA["layers"], 32 * 128, 8 * 128
    weights = layers * (2 * h * query + 2 * h * key + 3 * h * i)
    tokens, length = 64 * plan.work.n * (64 + 300), 64 + 300
    rate = 1 / (1 / (0.75 * 989e12) + 1 / (110 * plan.machine.gpu.memory_bandwidth))
    return tokens * (2 * weights + 2 * layers * query * length) / (gpus * rate)


@pytest.mark.parametrize(("placement", "workers"), PLACEMENTS)
def test_the_rm_takes_memory_only_where_it_is_shared(placement, workers):
    working_set = 16_384 * (2 * (3 * LLAMA["inner"] + 4 * LLAMA["hidden"]) + 4 * LLAMA["hidden"])
    head = 4096 * 256 + 256 + 256 * 64 + 64 + 64 + 1
    body = 8_030_261_248 - 128_256 * 4096  # without the LM head
    for parts in placed(placement, workers).phases.values():
        found = parts.get("reward model", 0)
        assert found == (2 * body + 4 * head + working_set if placement == "shared" else 0)


@pytest.mark.parametrize(("placement", "workers"), PLACEMENTS)
@pytest.mark.parametrize("prompts", [64, 64 * 256])
def test_scoring_takes_what_its_flops_take_beside_the_rollout_or_after_it(placement, workers, prompts):
    plan = placed(placement, workers, f"data.train_batch_size={prompts}")
    whole = prompts // 64 * scoring_seconds(plan, 1 if placement == "http" else workers)
    expected = whole if placement == "shared" else max(0.0, whole - plan.time.rollout)
    assert plan.time.rm == pytest.approx(expected, rel=2e-3)
    assert (expected > 0) == (placement == "shared" or prompts > 64), "both cases are seen"


def test_more_workers_than_gpus_to_share_are_refused():
    with pytest.raises(PlanError, match="num_workers=9, but there are only 8 training GPUs"):
        placed("shared", 9)
    assert placed("own", 9).rm_workers == 9


@pytest.mark.parametrize(("rm_gpus", "workers", "place"), [
    (None, 2, "on GPUs of another node"), (3, 3, "on GPUs of another node"), (0, 8, "on GPUs that also train"),
])  # fmt: skip
def test_gpus_given_on_the_command_line_count_instead_of_the_recipe_s(rm_gpus, workers, place):
    plan = placed("node", 2, machine=replace(H200, rm_gpus=rm_gpus))
    assert (plan.rm_workers, plan.rm_place) == (workers, place)


def test_gpus_of_the_rm_s_own_are_paid_for_and_shared_ones_grow_with_the_rest():
    shared, own = placed("shared", 2), placed("own", 2)
    assert [row.rm_workers for row in shared.growing if row.shard_group == 8] == [2, 16, 128, 1024]
    assert [row.rm_workers for row in own.growing if row.shard_group == 8] == [2, 2, 2, 2]
    for plan, paid in ((shared, 8), (own, 10)):
        row = plan.growing[0]
        assert row.gpu_hours_per_million_tokens == pytest.approx(paid * plan.time.total / 3600 / plan.work.tokens * 1e6)
