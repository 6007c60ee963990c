"""20 steps straight and 20 steps with SIGKILLs are the same run, bit for bit.

The whole of it, 30 kills and more (UPS_RM_KILLS, UPS_RM_KILL_SEED): `python -m pytest tests/reliability -m slow -s`.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reliability.lives import AT_THE_END, PER_EPOCH, PLACES, STEPS, Lives, assert_equal, traces


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """The processes compute on one thread each, and the server that they are forked from finds what it is to import."""
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> tuple[dict[str, Any], float]:
    """The run that is never killed, and its seconds."""
    lives = Lives(tmp_path_factory.mktemp("straight"), policy_folder)
    assert lives.once()
    found = traces(lives.run)
    assert [row["step"] for row in found["metrics"]] == [str(step) for step in range(STEPS + 1)]
    assert len(found["groups"]) == 2 * STEPS, "each has its manifest"
    assert STEPS % PER_EPOCH != 0, "an epoch ends within the run, not with it"
    return found, lives.seconds


def test_four_kills_leave_the_run_as_it_was(
    tmp_path: Path, policy_folder: Path, straight: tuple[dict[str, Any], float]
) -> None:
    lives = Lives(tmp_path, policy_folder)
    for place, at in (("rollout", 30), ("checkpoint half written", 2), ("epoch boundary", 2), ("last step", 1)):
        assert not lives.once(place, at), f"{place} was not reached"
    assert lives.once()
    assert lives.kills == ["rollout", "checkpoint half written", "epoch boundary", "last step"]
    assert_equal(traces(lives.run), straight[0])


@pytest.mark.slow
def test_kills_at_random_instants_leave_the_run_as_it_was(
    tmp_path: Path, policy_folder: Path, straight: tuple[dict[str, Any], float]
) -> None:
    """Runs, each killed until it ends, until there were enough kills; every place at least once."""
    wanted, seed = int(os.environ.get("UPS_RM_KILLS", "30")), int(os.environ.get("UPS_RM_KILL_SEED", "0"))
    draw, expected, seconds = random.Random(seed), straight[0], straight[1]
    kills: list[str] = []
    runs, missing = 0, list(PLACES)
    while len(kills) < wanted or missing:
        lives = Lives(tmp_path / str(runs), policy_folder)
        while True:
            if draw.random() < 0.4:
                ended = lives.once(after_seconds=draw.uniform(0.3, seconds))
            else:
                place = draw.choice(missing or [place for place in PLACES if place not in AT_THE_END])
                ended = lives.once(place, draw.randint(1, PLACES[place]))
                if not ended and place in missing:
                    missing.remove(place)
            if ended:
                break
        runs += 1
        kills += lives.kills
        assert_equal(traces(lives.run), expected)
        assert runs < 50
    print(f"\n{len(kills)} kills in {runs} runs of {STEPS} steps (seed {seed}): {dict(Counter(kills))}")
    assert set(kills) >= set(PLACES)
