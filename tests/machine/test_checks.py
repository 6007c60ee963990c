"""Each finding of the doctor, from facts that the test makes up."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import tiny_policy, tiny_rm
from ups_rm.cli import app
from ups_rm.machine import facts
from ups_rm.machine.checks import Finding, check_machine
from ups_rm.machine.facts import Clash, Facts, GpuFact, TorchFact, look
from ups_rm.recipe import Recipe, RewardModelModel, load_recipe

TOKEN = "a token of ours with blanks".replace(" ", "-")
H200 = GpuFact("NVIDIA H200", 143_771 << 20, 0, "580.95.05", "9.0")
GPU_NODE = Facts(
    python=(3, 12, 3),
    system="Linux x86_64",
    cpus=192,
    memory=1_800 * 10**9,
    gpus=[H200] * 8,
    torch=TorchFact("2.11.0", "13.0", True, "2.28.9"),
    packages={"torch": "2.11.0", "verl": "0.9.1", "vllm": "0.24.0", "ray": "2.60.0", "flash-attn": "2.8.3"},
    clashes=[],
    shared_memory=64 << 30,
    disk={"runs/x": 4 * 10**12},
    ports_in_use=[],
    open_files=1_048_576,
    infiniband=["mlx5_0"],
)
LAPTOP = replace(
    GPU_NODE, gpus=None, torch=TorchFact("2.13.0+cpu", None, False, None), memory=8 * 10**9,
    unseen={"GPUs": "nvidia-smi is not there"},
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """The full-scale sizes; small folders stand in for the models on disk."""
    folder = tmp_path_factory.mktemp("models")
    tiny_policy(folder / "policy")
    tiny_rm(folder / "rm")
    return load_recipe("quickstart", [
        f"actor_rollout_ref.model.path={folder / 'policy'}", f"reward_model.model.path={folder / 'rm'}",
        f"data.train_files={folder / 'policy/config.json'}", f"data.val_files={folder / 'policy/config.json'}",
    ])  # fmt: skip


def with_gpus(recipe: Recipe, per_node: int, nodes: int = 1, policy: str = "") -> Recipe:
    trainer = replace(recipe.trainer, n_gpus_per_node=per_node, nnodes=nodes)
    whole = recipe.actor_rollout_ref
    each = recipe.data.train_batch_size * whole.rollout.n // (per_node * nodes) or 1  # verl: micro batches divide it
    model = replace(
        whole,
        actor=replace(whole.actor, ppo_micro_batch_size_per_gpu=each),
        rollout=replace(whole.rollout, log_prob_micro_batch_size_per_gpu=each),
        ref=replace(whole.ref, log_prob_micro_batch_size_per_gpu=each),
    )
    changed = replace(recipe, trainer=trainer, actor_rollout_ref=model)
    if policy:
        settings = changed.actor_rollout_ref
        model = replace(settings.model, path=policy, enable_gradient_checkpointing=True)
        changed = replace(changed, actor_rollout_ref=replace(settings, model=model))
    return changed


def findings(facts: Facts, recipe: Recipe, engine: str = "verl") -> dict[str, Finding]:
    return {finding.what: finding for finding in check_machine(facts, recipe, engine)}


def test_a_machine_with_everything_has_no_finding_against_it(recipe):
    found = findings(GPU_NODE, with_gpus(recipe, 8))
    assert {finding.verdict for finding in found.values()} == {"ok"}, found


def test_what_verl_can_t_honour_is_found_before_a_machine_is_asked_for(recipe):
    found = findings(GPU_NODE, with_gpus(replace(recipe, trainer=replace(recipe.trainer, nonfinite="stop")), 8))
    assert found["recipe"].verdict == "fail"
    assert "trainer.nonfinite=stop: verl leaves the update out" in found["recipe"].seen
    assert found["recipe"].fix.startswith("trainer.nonfinite=skip")


def test_a_laptop_runs_the_local_engine_and_says_what_it_can_t_see(recipe):
    found = findings(LAPTOP, recipe, "local")
    assert not [finding for finding in found.values() if finding.verdict in ("fail", "warn")]
    assert found["GPUs"].verdict == "unknown"


def test_a_laptop_can_t_run_the_verl_engine(recipe):
    found = findings(LAPTOP, with_gpus(recipe, 8))
    assert {found[what].verdict for what in ("GPUs", "CUDA", "NCCL")} == {"fail"}
    assert found["GPU memory"].verdict == "unknown"


GIB = 1 << 30
CASES = {
    "old driver": (
        {"gpus": [replace(H200, driver="570.86.10")] * 8}, "driver", "fail", "570.86.10; CUDA 13.0 needs 580",
    ),
    "unknown CUDA": ({"torch": TorchFact("3.0", "19.1", True, "3.0")}, "driver", "unknown", "CUDA 19.1"),
    "CPU build of torch": (
        {"torch": TorchFact("2.11.0+cpu", None, False, None)}, "CUDA", "fail", "2.11.0+cpu is a CPU build",
    ),
    "torch sees no GPU": ({"torch": TorchFact("2.11.0", "13.0", False, "2.28.9")}, "CUDA", "fail", "sees no GPU"),
    "torch does not load": ({"torch": None, "unseen": {"torch": "libcudart"}}, "torch", "fail", "libcudart"),
    "too few GPUs": ({"gpus": [H200] * 4}, "GPUs", "fail", "4 x NVIDIA H200"),
    "old GPUs": ({"gpus": [replace(H200, name="V100", compute_capability="7.0")] * 8}, "bf16", "fail", "7.0"),
    "busy GPUs": ({"gpus": [H200] * 7 + [replace(H200, used=90 * GIB)]}, "GPUs free", "warn", "1 GPUs have 90.0 GiB"),
    "little shared memory": ({"shared_memory": 2 * GIB}, "shared memory", "warn", "2.0 GiB"),
    "Docker's shared memory": ({"shared_memory": 64 << 20}, "shared memory", "fail", "0.1 GiB"),
    "no shared memory": (
        {"shared_memory": None, "unseen": {"shared memory": "gone"}}, "shared memory", "unknown", "gone",
    ),
    "port taken": ({"ports_in_use": [6379]}, "port", "warn", "6379 (Ray's head) is taken"),
    "few open files": ({"open_files": 1024}, "open files", "warn", "limit 1,024"),
    "little disk": ({"disk": {"runs/x": 10**6}}, "disk: runs/x", "fail", "0 GB free"),
    "little host memory": ({"memory": 10**5}, "host memory", "fail", "0 GB available"),
    "no flash-attn": ({"packages": {"torch": "2.11.0"}}, "flash-attn", "fail", "not installed"),
    "python too new": ({"python": (3, 13, 1)}, "Python", "fail", "3.13.1"),
    "python too old": ({"python": (3, 9, 2)}, "Python", "fail", "3.9.2"),
    "version clash": (
        {"clashes": [Clash("verl[vllm]", "torch==2.11.0", "2.13.0")]}, "verl[vllm]", "fail",
        "torch==2.11.0 wanted, 2.13.0 is installed",
    ),
    "package missing": (
        {"clashes": [Clash("verl[vllm]", "vllm==0.24.0", None)]}, "not installed", "fail", "vllm==0.24.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what", "verdict", "text"), CASES.values(), ids=CASES.keys())
def test_one_fault_is_one_finding_with_a_way_out(recipe, change, what, verdict, text):
    found = findings(replace(GPU_NODE, **change), with_gpus(recipe, 8))
    assert found[what].verdict == verdict
    assert text in found[what].seen
    assert bool(found[what].fix) == (verdict != "unknown")


def test_several_nodes_without_rdma_are_a_warning_and_with_it_a_word_on_what_can_t_be_seen(recipe):
    assert findings(replace(GPU_NODE, infiniband=[]), with_gpus(recipe, 8, 2))["NCCL"].verdict == "warn"
    with_rdma = findings(GPU_NODE, with_gpus(recipe, 8, 2))["NCCL"]
    assert with_rdma.verdict == "ok"
    assert "can't be seen from one of them" in with_rdma.seen


PLACES = {
    "shared": ("shared", 8, "ok", "8 on 8 training GPUs"),
    "shared by too many": ("shared", 9, "fail", "9 on 8 training GPUs"),
    "own, none left": ("own", 1, "fail", "1 GPUs of their own beside 8 that train; 8 are here"),
    "another node": ("node", 2, "unknown", "2 GPUs of nodes with the Ray resource"),
    "service": ("http", 1, "ok", "1 requests at a time to a service"),
}


@pytest.mark.parametrize(("placement", "workers", "verdict", "text"), PLACES.values(), ids=PLACES.keys())
def test_gpus_of_the_rm_are_where_the_recipe_puts_it(recipe, placement, workers, verdict, text):
    placed = replace(recipe, reward_model=replace(recipe.reward_model, placement=placement, num_workers=workers))
    found = findings(GPU_NODE, with_gpus(placed, 8))["RM workers"]
    assert (found.verdict, bool(found.fix)) == (verdict, verdict == "fail")
    assert text in found.seen
    if placement == "own":
        assert findings(GPU_NODE, with_gpus(placed, 7))["RM workers"].verdict == "ok"


def test_only_a_shared_rm_needs_memory_of_the_training_gpus(recipe):
    """An 8B RM beside a 7B policy: 48 GB are enough only if it is elsewhere."""
    small = replace(GPU_NODE, gpus=[replace(H200, memory=48 * 10**9)] * 8)
    for placement, verdict in (("shared", "fail"), ("node", "ok")):
        model = replace(recipe.reward_model.model, path="llama3-8b")
        placed = replace(recipe, reward_model=replace(recipe.reward_model, model=model, placement=placement))
        assert findings(small, with_gpus(placed, 8, policy="qwen2-7b-instruct"))["GPU memory"].verdict == verdict


def test_gpu_memory_is_the_plan_s(recipe):
    big = with_gpus(recipe, 8, policy="qwen2-7b-instruct")
    assert findings(GPU_NODE, big)["GPU memory"].verdict == "ok"
    small = replace(GPU_NODE, gpus=[replace(H200, memory=16 * GIB)] * 8)
    found = [finding for finding in check_machine(small, big, "verl") if finding.what == "GPU memory"]
    assert {finding.verdict for finding in found} == {"fail"}
    assert any("GB of 17 GB" in finding.seen for finding in found)


def test_checkpoints_that_are_all_kept_are_a_warning(recipe):
    keeps = replace(recipe, trainer=replace(recipe.trainer, save_freq=10))
    assert findings(GPU_NODE, with_gpus(keeps, 8))["disk: runs/x"].verdict == "warn"


def test_models_that_are_missing_empty_or_on_a_hub(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}", encoding="utf-8")
    verdicts = {}
    for name in (str(tmp_path / "empty"), str(tmp_path / "gone"), "Qwen/Qwen2-7B-Instruct"):
        verdicts[Path(name).name] = findings(GPU_NODE, with_gpus(recipe, 8, policy=name))["policy"].verdict
    assert verdicts == {"empty": "fail", "gone": "fail", "Qwen2-7B-Instruct": "warn"}


@pytest.fixture(scope="module")
def service(rm_folder) -> Iterator[str]:
    """The address of a real reward server with a token."""
    pytest.importorskip("fastapi", reason="the reward server is an extra")
    from ups_rm.reward.scorer import RewardScorer
    from ups_rm.reward.server import RewardServer

    with RewardServer([RewardScorer.load(rm_folder, dtype="float32")], name="tiny", token=TOKEN) as server:
        yield server.url


@pytest.mark.parametrize(
    ("token", "verdict", "seen", "fix"),
    [
        (TOKEN, "ok", "is healthy and scored a conversation (token: OUR_RM_TOKEN)", ""),
        ("another token of theirs", "fail", "is healthy, but (token: OUR_RM_TOKEN): ", "give the server's token"),
        (None, "fail", "the environment variable OUR_RM_TOKEN (token_env) is not set", "docs/guides/rm-server.md"),
    ],
)
def test_a_reward_service_is_asked_for_a_score_with_the_recipe_s_token(
    recipe, service, token, verdict, seen, fix, monkeypatch, tmp_path
):
    monkeypatch.delenv("OUR_RM_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("OUR_RM_TOKEN", token)
    found = service_row(recipe, service, tmp_path)
    assert found.verdict == verdict
    assert seen in found.seen
    assert fix in found.fix


@pytest.mark.parametrize("what", ["nothing", "silence", "another program"])
def test_what_is_no_reward_service_is_named(recipe, what, monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "HEALTH_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        if what == "nothing":
            other.close()
        if what == "another program":
            other.close()
            server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
            threading.Thread(target=server.handle_request, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
        found = service_row(recipe, url, tmp_path)
    said = {"nothing": "ConnectError", "silence": "ReadTimeout", "another program": "HTTP 501"}[what]
    assert found.verdict == "fail"
    assert f"{url} is not a healthy reward server: GET /health: {said}" in found.seen
    assert "ups-rm rm serve" in found.fix


def service_row(recipe: Recipe, url: str, folder: Path) -> Finding:
    """The doctor's row for a recipe whose RM is behind that address, by real facts of it."""
    model = RewardModelModel(url=url, token_env="OUR_RM_TOKEN")
    served = replace(recipe, reward_model=replace(recipe.reward_model, model=model, placement="http"))
    seen = look([folder], services=[model])
    return findings(replace(GPU_NODE, services=seen.services), with_gpus(served, 8))["reward service"]


def test_the_command_on_this_machine_prints_a_table_and_exits_by_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ENGINE", raising=False)
    local = CliRunner().invoke(app, ["doctor"])
    assert local.exit_code == 0, local.output
    assert "nothing here stands in the way" in local.output
    done = CliRunner().invoke(app, ["doctor", "--engine", "verl", "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 1
    assert found["ok"] is False
    assert {"GPUs", "CUDA"} <= {row["what"] for row in found["findings"] if row["verdict"] == "fail"}
    assert found["facts"]["python"][0] == 3
