"""scripts/setup.sh: makes the environment once, says what is wrong, and leaves no mark of a set-up that failed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python is a shell script that writes down what it is asked to do."""
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, folder / name)
    return folder


def fake_python(folder: Path, *, works: bool = True, pip: bool = True, version_ok: bool = True) -> Path:
    """`-m venv X` copies itself to X/bin/python; `-m pip install` notes its arguments and succeeds if it `works`."""
    script = folder / "fake_python"
    script.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  *version_info*) exit {0 if version_ok else 1} ;;
  --version) echo "Python 3.8.1" ;;
  "-m venv"*) target="${{@: -1}}"; mkdir -p "$target/bin"; cp "$0" "$target/bin/python"; echo venv >>"{folder}/log" ;;
  "-m pip --version") exit {0 if pip else 1} ;;
  *) echo "$*" >>"{folder}/log"; exit {0 if works else 1} ;;
esac
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    return script


def set_up(checkout: Path, extras: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("UPS_RM_VENV", "PYTHON")}
    script = f'set -euo pipefail; source scripts/setup.sh; setup_venv "$PWD" "{extras}"; echo "venv is $venv"'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def log(checkout: Path) -> list[str]:
    file = checkout / "log"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def test_it_installs_exact_versions_once(checkout):
    python = str(fake_python(checkout))
    first = set_up(checkout, PYTHON=python)
    assert first.returncode == 0, first.stderr
    assert log(checkout)[0] == "venv"
    assert f"-c {checkout}/constraints.txt torch -e {checkout}" in log(checkout)[1]
    assert f"venv is {checkout}/.venv" in first.stdout
    assert set_up(checkout, PYTHON=python).returncode == 0
    assert len(log(checkout)) == 2, "the second start installed again"


def test_more_extras_serve_a_command_that_needs_fewer_and_not_the_other_way(checkout):
    python = str(fake_python(checkout))
    for extras, installs in (("", 1), ("dev,verl,trl", 2), ("", 2), ("dev,verl,trl", 2)):
        assert set_up(checkout, extras, PYTHON=python).returncode == 0
        assert sum("install" in line for line in log(checkout)) == installs, extras
    assert log(checkout)[-1].endswith("[dev,verl,trl]")


def test_changed_requirements_install_again(checkout):
    python = str(fake_python(checkout))
    set_up(checkout, PYTHON=python)
    (checkout / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    set_up(checkout, PYTHON=python)
    assert sum("install" in line for line in log(checkout)) == 2


def test_a_failed_install_fails_and_is_done_again(checkout):
    assert set_up(checkout, PYTHON=str(fake_python(checkout, works=False))).returncode != 0
    shutil.rmtree(checkout / ".venv")
    assert set_up(checkout, PYTHON=str(fake_python(checkout))).returncode == 0


def test_an_environment_of_the_users_is_left_alone(checkout, tmp_path):
    own = tmp_path / "own"
    (own / "bin").mkdir(parents=True)
    without = set_up(checkout, UPS_RM_VENV=str(own))
    assert without.returncode != 0
    assert "has no bin/ups-rm" in without.stderr
    (own / "bin/ups-rm").write_text("#!/bin/sh\n", encoding="utf-8")
    (own / "bin/ups-rm").chmod(0o755)
    done = set_up(checkout, UPS_RM_VENV=str(own))
    assert done.returncode == 0
    assert f"venv is {own}" in done.stdout
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_named(checkout):
    done = set_up(checkout, PYTHON=str(fake_python(checkout, version_ok=False)))
    assert done.returncode != 0
    assert "Python >= 3.10" in done.stderr
    assert "3.8.1" in done.stderr


def test_a_path_with_blanks_is_no_trouble(tmp_path):
    folder = tmp_path / "a folder" / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, folder / name)
    assert set_up(folder, PYTHON=str(fake_python(folder))).returncode == 0
