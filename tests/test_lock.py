"""requirements.lock: the versions of constraints.txt, each with hashes, and no place to fetch them from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[1]
OF_TORCH = re.compile(r"nvidia-|cuda-|triton$|pip$")
"""What torch pins itself, and pip: locked, but not in constraints.txt."""
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def lock() -> dict[str, int]:
    """Requirement as written -> number of its hashes."""
    found: dict[str, int] = {}
    for line in (REPO / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        text = line.strip().removesuffix("\\").strip()
        if line[0].isspace():
            assert HASH.fullmatch(text), line
            found[next(reversed(found))] += 1
        else:
            found[text] = 0
    return found


def normal(line: str) -> tuple[str, str, str]:
    one = Requirement(line)
    return one.name.lower().replace("_", "-"), str(one.specifier), str(one.marker or "")


def test_every_requirement_has_hashes(lock: dict[str, int]) -> None:
    assert len(lock) > 200
    assert all(lock.values()), [text for text, hashes in lock.items() if not hashes]


def test_lock_and_constraints_name_the_same_versions(lock: dict[str, int]) -> None:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line) for line in lines if not line.startswith("#")}
    locked = {normal(text) for text in lock}
    assert pinned <= locked, "bash scripts/audit.sh lock"
    assert [one for one in locked - pinned if not OF_TORCH.match(one[0])] == []


def test_every_dependency_is_locked_within_its_range(lock: dict[str, int]) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is in Python 3.11")
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted += [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]
    locked = [Requirement(text) for text in lock]
    for one in wanted:
        if one.name == "ups-rm":
            continue
        versions = [str(two.specifier).removeprefix("==") for two in locked if normal(two.name) == normal(one.name)]
        assert versions, f"{one.name} is not locked"
        assert any(one.specifier.contains(version) for version in versions), one


def test_the_lock_names_no_place() -> None:
    text = (REPO / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text
