"""What is seen of this machine, and of machines that a test makes up."""

from __future__ import annotations

import os
import socket
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ups_rm.machine import facts
from ups_rm.machine.facts import Clash, find_clashes, look

SMI = """#!/bin/sh
echo "NVIDIA H200, 143771, 512, 580.95.05, 9.0"
echo "NVIDIA H200, 143771, 90000, 580.95.05, 9.0"
"""


def test_this_machine_is_seen_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = look([tmp_path / "not/there/yet"])
    assert seen.gpus is None
    assert "nvidia-smi is not there" in seen.unseen["GPUs"]
    assert seen.torch is not None
    assert seen.torch.version == metadata.version("torch")
    assert seen.packages["transformers"] == metadata.version("transformers")
    assert seen.clashes == []
    assert list(seen.disk) == [str(tmp_path / "not/there/yet")]
    assert seen.disk[str(tmp_path / "not/there/yet")] > 0
    assert seen.memory is not None
    assert 0 < seen.memory < 2**50


def fake_smi(folder: Path, text: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    fake_smi(tmp_path, SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus = look([tmp_path]).gpus
    assert gpus is not None
    assert [gpu.name for gpu in gpus] == ["NVIDIA H200"] * 2
    assert gpus[1].used == 90_000 << 20
    assert (gpus[0].memory, gpus[0].driver, gpus[0].compute_capability) == (143_771 << 20, "580.95.05", "9.0")


def test_an_nvidia_smi_that_fails_is_said(tmp_path, monkeypatch):
    fake_smi(tmp_path, "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    seen = look([tmp_path])
    assert seen.gpus is None
    assert "Driver/library version mismatch" in seen.unseen["GPUs"]


def test_a_port_that_a_program_listens_on_is_seen(tmp_path, monkeypatch):
    with socket.socket() as program:
        program.bind(("127.0.0.1", 0))
        program.listen()
        port = program.getsockname()[1]
        monkeypatch.setattr(facts, "RAY_PORTS", {port: "a test's"})
        assert look([tmp_path]).ports_in_use == [port]
    assert look([tmp_path]).ports_in_use == []


def test_a_package_that_is_not_there_is_one_clash():
    assert find_clashes("no-such-package[x]") == [Clash("UPS-RM", "no-such-package[x]", None)]


@pytest.fixture
def requirements(monkeypatch):
    """Makes find_clashes see a package `made-up` with these requirement lines."""

    def given(*lines: str) -> None:
        real = metadata.requires
        monkeypatch.setattr(metadata, "requires", lambda name: list(lines) if name == "made-up" else real(name))

    return given


def test_wrong_versions_and_missing_packages_are_clashes_and_others_are_not(requirements):
    requirements("numpy>=1", "torch==0.1", "not-there-at-all>2", 'absent; python_version < "3"')
    found = {clash.requirement: clash.installed for clash in find_clashes("made-up")}
    assert found == {"torch==0.1": metadata.version("torch"), "not-there-at-all>2": None}


def test_an_extra_is_followed_into_the_extras_it_refers_to(requirements):
    requirements('made-up[core]; extra == "vllm"', 'numpy==0.1; extra == "core"', 'torch==0.1; extra == "other"')
    assert [clash.requirement for clash in find_clashes("made-up[vllm]")] == ["numpy==0.1"]
    assert find_clashes("made-up") == []


@pytest.mark.oracle
def test_the_versions_that_verl_pins_for_gpus_are_read_from_its_own_metadata():
    pytest.importorskip("verl")
    found = {Requirement(clash.requirement).name: clash for clash in find_clashes("verl[vllm]")}
    pins = {"torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"}
    for name, version in pins.items():
        if name not in found:  # an environment from constraints-gpu.txt has exactly these
            assert metadata.version(name) == version
            continue
        assert found[name].requirement == f"{name}=={version}"
