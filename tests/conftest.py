"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_backbone, tiny_policy, tiny_rm
from ups_rm.layers.native import kernels

REPO = Path(__file__).resolve().parents[1]


ALONE = ("tests/e2e/test_verl_", "tests/e2e/test_real_model", "tests/distributed/", "tests/test_models.py", "_real_")
"""Parts of the paths of files that fill both cores by themselves (Ray, verl, the real model)."""


def scope(nodeid: str) -> str:
    """What stays together where `-n` shares tests out to several processes.

    A file does, for its fixtures' sake; a page's commands are independent of another page's. Files that fill both cores
    follow each other in one process, so that no two of them meet.
    """
    file = nodeid.split("::")[0]
    if any(part in file for part in ALONE):
        return "alone"
    return nodeid if file.endswith("test_readme_commands.py") else file


@pytest.hookimpl(optionalhook=True)  # tests run without xdist too
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadgroup` would do it by markers, but does not see them under pytest 9 (xdist 3.8)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByScope(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: what fills both cores, then what is slow."""
    rank: dict[str, int] = {}  # by scope
    for item in items:
        heavy = item.get_closest_marker("verl") or item.get_closest_marker("real_model")
        if heavy and scope(item.nodeid) != "alone":
            raise pytest.UsageError(f"{item.nodeid} is marked {heavy.name}: add its file to ALONE in tests/conftest.py")
        value = 0 if scope(item.nodeid) == "alone" else 1 if item.get_closest_marker("slow") else 2
        rank[scope(item.nodeid)] = min(rank.get(scope(item.nodeid), 2), value)
    items.sort(key=lambda item: rank[scope(item.nodeid)])


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built() -> None:
    """Once, in the user's cache, before a test names another one."""
    kernels()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows beside the checkout; a test that wants it is skipped where it is absent."""
    folder = Path(os.environ.get("UPS_RM_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real rows are not here: put them beside the checkout in shared/data or set UPS_RM_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 policy with its own tokenizer."""
    return tiny_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama to make a reward model of, with another tokenizer and template."""
    return tiny_backbone(tmp_path_factory.mktemp("models") / "backbone")


@pytest.fixture(scope="session")
def rm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model on such a Llama."""
    return tiny_rm(tmp_path_factory.mktemp("models") / "rm")
