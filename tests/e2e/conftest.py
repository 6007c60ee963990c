"""Tiny models of different tokenizers, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_backbone, tiny_policy, tiny_rm


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 policy with its own tokenizer."""
    return tiny_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def rm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama reward model with another tokenizer and template."""
    return tiny_rm(tmp_path_factory.mktemp("models") / "rm")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama backbone to make a reward model of."""
    return tiny_backbone(tmp_path_factory.mktemp("models") / "backbone")
