"""Thousands of bad inputs for every parser: each is taken or refused in our own words, in time and in bounded memory.

Short in an ordinary run. All of it, in minutes per parser (UPS_RM_FUZZ_SEED for other inputs):

    UPS_RM_FUZZ_CASES=100000 python -m pytest tests/fuzz -m slow -s
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fuzz import mutate
from fuzz.parsers import PARSERS
from fuzz.runner import fuzz, run
from ups_rm.errors import RecipeError

CASES = int(os.environ.get("UPS_RM_FUZZ_CASES", "2000"))
SEED = int(os.environ.get("UPS_RM_FUZZ_SEED", "0"))
MEMORY_MB = 600
"""How much the memory of a process may grow over its cases."""


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_bad_inputs_are_taken_or_refused_in_our_own_words(parser: str) -> None:
    pytest.importorskip("fastapi", reason="the reward server is an extra") if parser == "server" else None
    tally = fuzz(parser, CASES, SEED)
    told = ", ".join(f"{name} {count}" for name, count in tally.outcomes.most_common())
    print(f"\n{parser}: {tally.cases} cases, {tally.seconds:.0f} s, +{tally.peak_mb:.0f} MB, seed {SEED}: {told}")
    assert not tally.defects, "\n\n".join(f"{place}: {text}" for place, text in tally.defects.items())
    assert tally.cases == CASES
    assert tally.peak_mb < MEMORY_MB
    assert len(tally.outcomes) > 1, "some inputs are bad, some are good"


@pytest.mark.parametrize("parser", ["rows", "card", "recipe"])
def test_a_case_is_the_same_input_every_time(parser: str, tmp_path: Path) -> None:
    seen = []
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        target = PARSERS[parser](tmp_path / str(n))
        for number in range(5):
            target.case(random.Random(f"7 {number}"))
            seen.append(target.shown())
    assert seen[:5] == seen[5:]
    assert len(set(seen)) > 3


def test_a_defect_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer can fail: an error that is none of ours, and a message that does not say enough."""
    from ups_rm.data import rows

    def broken(*_: object, **__: object) -> None:
        raise KeyError("prompt")

    monkeypatch.setattr(rows, "parse_row", broken)
    tally = run("rows", 0, 3, 0)
    assert any(place.startswith("KeyError at test_fuzz.py") for place in tally.defects)
    assert "case 0 of seed 0" in next(iter(tally.defects.values()))
    monkeypatch.setattr("ups_rm.recipe.check_recipe", _raise_empty)
    assert any(place.startswith("AssertionError at parsers.py") for place in run("recipe", 0, 120, 0).defects)


def _raise_empty(*_: object, **__: object) -> None:
    raise RecipeError("")


def test_a_process_that_dies_is_a_defect() -> None:
    tally = fuzz("no such parser", 1)
    assert "KeyError: 'no such parser'" in next(iter(tally.defects.values()))


def test_mutations_reach_every_node_and_leave_the_original_alone() -> None:
    good = {"a": [1, {"b": "text"}], "c": {"d": None}}
    before = repr(good)
    found = {repr(mutate.mutated(random.Random(n), good, 1)) for n in range(2000)}
    assert repr(good) == before
    assert len(found) > 500
    assert any("'b': 'text'" not in one for one in found)
    assert any("'d': None" not in one for one in found)
    assert any(mutate.damaged(random.Random(n), b"abc") != b"abc" for n in range(10))
