"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows beside the checkout; a test that wants it is skipped where it is absent."""
    folder = Path(os.environ.get("UPS_RM_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real rows are not here: put them beside the checkout in shared/data or set UPS_RM_SHARED_DATA")
    return folder
