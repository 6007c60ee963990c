"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tiny import tiny_backbone, tiny_policy, tiny_rm
from ups_rm.local.native import kernels

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, and how tests are shared out where `-n` starts more than one process.

    A file stays together, for its fixtures' sake; a page's commands are independent of another page's. What fills both
    cores by itself (Ray, verl, the real model) stays in one process, so that no two of them meet.
    """
    rank: dict[str, int] = {}  # by group
    for item in items:
        alone = item.get_closest_marker("verl") or item.get_closest_marker("real_model")
        page = "page" in getattr(item, "fixturenames", ()) and item.get_closest_marker("slow")
        group = "alone" if alone else item.nodeid if page else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        rank[group] = min(rank.get(group, 2), 0 if alone else 1 if item.get_closest_marker("slow") else 2)
    items.sort(key=lambda item: rank[item.get_closest_marker("xdist_group").args[0]])  # type: ignore[union-attr]


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
