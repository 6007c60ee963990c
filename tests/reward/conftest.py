"""What the tests of the doctor share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_judge import pairs_file, tiny_judge


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained RM folder with which nothing is wrong; pairs.jsonl lies beside it. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("doctor") / "judge"
    tiny_judge(folder)
    pairs_file(folder.parent / "pairs.jsonl")
    return folder
