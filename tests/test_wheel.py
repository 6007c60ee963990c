"""The package as users get it without a checkout: what the wheel carries, and that it works alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tiny import tiny_policy

REPO = Path(__file__).resolve().parents[1]
SMALL = [
    "trainer.total_training_steps=2",
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "data.max_response_length=8",
    "evaluation.max_unsafe_prompts=4",
    "evaluation.max_benign_prompts=4",
    "evaluation.n=1",
    "evaluation.max_new_tokens=8",
    "reward_training.max_epochs=2",
]


def source_copy(folder: Path) -> Path:
    """What git would give a user who clones: building happens there and leaves nothing here."""
    names = ["src", "README.md", "LICENSE", "pyproject.toml", "constraints.txt"]
    folder.mkdir()
    for name in names:
        path = REPO / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", ".*cache"))
        else:
            shutil.copy(path, folder / name)
    return folder


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"$ {' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


def test_wheel_carries_the_sample_the_recipes_and_the_rm_files(tmp_path):
    source = source_copy(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    run([*command, "--no-index", "--quiet"], source)
    with zipfile.ZipFile(next((source / "dist").glob("ups_rm-*.whl"))) as wheel:
        names = set(wheel.namelist())
        package = REPO / "src/ups_rm"
        files = [
            file for file in package.rglob("*") if file.is_file() and "cache" not in str(file.relative_to(package))
        ]
        for file in files:
            name = f"ups_rm/{file.relative_to(package).as_posix()}"
            assert name in names, f"the wheel lacks {name}"
            assert wheel.read(name) == file.read_bytes(), name
        metadata = next(name for name in names if name.endswith("dist-info/METADATA"))
        text = wheel.read(metadata).decode()
        entry_points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert any(name.startswith("ups_rm/recipes/") and name.endswith(".yaml") for name in names)
    assert sum(name.startswith("ups_rm/data/sample/") and name.endswith(".jsonl") for name in names) == 6
    assert not [name for name in names if name.startswith(("tests", "scripts", "docs", "recipes"))]
    assert any(name.endswith("/LICENSE") for name in names)
    assert "ups-rm = ups_rm.cli:main" in entry_points
    assert "Requires-Dist: verl==0.9.1" in text
    assert all(
        "extra ==" in line
        for line in text.splitlines()
        if line.startswith(("Requires-Dist: verl", "Requires-Dist: trl"))
    )


@pytest.mark.slow
def test_wheel_alone_in_an_empty_environment_runs_from_an_empty_folder(tmp_path):
    source = source_copy(tmp_path / "source")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [environment / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", "dist", ".", "--quiet"], source)
    wheel = next((source / "dist").glob("ups_rm-*.whl"))
    # torch named as in scripts/setup.sh, so that the exact version decides which build is taken; not compiled: most of
    # these thousands of files are never imported here
    run([*pip, "install", "--quiet", "--no-compile", "-c", "constraints.txt", "torch", wheel], source)
    shutil.rmtree(source)

    cache, empty = tmp_path / "cache", tmp_path / "empty"
    policy = tiny_policy(cache / "models/smollm2-135m-instruct")
    (policy / "ups_rm_source.json").write_text("{}", encoding="utf-8")
    empty.mkdir()
    alone = {
        "UPS_RM_CACHE": str(cache),
        "UPS_RM_NATIVE": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONNOUSERSITE": "1",
    }
    where = run(
        [environment / "bin/python", "-c", "import importlib.util as u, ups_rm; print(ups_rm.__file__); "
         "print([name for name in ('verl', 'trl', 'ray', 'wandb', 'pytest') if u.find_spec(name)])"],
        empty, **alone,
    )  # fmt: skip
    assert str(environment) in where.splitlines()[0]
    assert where.splitlines()[1] == "[]", "the main install brings what only extras need"
    output = run([environment / "bin/ups-rm", "run", *SMALL], empty, **alone)
    summary = json.loads((empty / "runs/ups-rm/quickstart/summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    assert summary["safe_score"]["n"] == 8
    assert (empty / "runs/ups-rm/quickstart/policy/config.json").is_file()
    assert "safe score" in output
    again = run([environment / "bin/ups-rm", "run", *SMALL], empty, **alone)
    assert again.count("done before, skipped") == len(summary["seconds"])
