"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tiny import tiny_backbone, tiny_policy, tiny_rm

REPO = Path(__file__).resolve().parents[1]


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
