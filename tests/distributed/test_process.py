"""Our trainer costs only the processes that ask verl for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from ups_rm.distributed.process import OURS, TRAINERS, Follower, follow
from ups_rm.distributed.prompts import PromptFiles
from ups_rm.distributed.translate import run_environment, verl_overrides
from ups_rm.recipe import load_recipe

HEAVY = ("torch", "ray", "verl", "transformers", OURS)


def reported(code: str, **environment: str) -> dict[str, object]:
    """What a new process prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_module_that_every_process_imports_brings_nothing_heavy() -> None:
    code = f"import ups_rm.distributed.process\nprint(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    assert reported(code) == []


@pytest.mark.verl
def test_trainer_and_estimator_are_known_once_verls_own_are_imported(tmp_path: Path) -> None:
    """In a process of verl's, by the environment that a run gives it and the names that a run asks for."""
    pytest.importorskip("verl", reason="verl is an extra")
    recipe = load_recipe(
        "pku_saferlhf_qwen2_7b_8gpu",
        ["algorithm.objective=weighted", f"trainer.default_local_dir={tmp_path}"],
        engine="verl",
    )
    asked = dict(
        text.split("=", 1) for text in verl_overrides(recipe, PromptFiles(tmp_path / "t", tmp_path / "v", 1, 1))
    )
    code = f"""
import verl
before = {OURS!r} in sys.modules or {TRAINERS!r} in sys.modules
from {TRAINERS} import get_trainer_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
trainer = get_trainer_cls({asked["trainer.v1.trainer_mode"]!r})
estimator = get_adv_estimator_fn({asked["algorithm.adv_estimator"]!r})
print(json.dumps([before, trainer.__name__, estimator.__name__]))
"""
    assert reported(code, **run_environment(recipe)) == [False, "SafetyTrainer", "advantages_of_the_step"]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`first_of_two` counts in `told`, and so does `second_of_two`, which needs the first one whole."""
    (tmp_path / "first_of_two.py").write_text("import told\ntold.order.append('first')\nready = True\n")
    (tmp_path / "second_of_two.py").write_text(
        "import told\nfrom first_of_two import ready\ntold.order.append('second')\n"
    )
    (tmp_path / "told.py").write_text("order = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in ("first_of_two", "second_of_two", "told"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("started_with", ["first_of_two", "second_of_two"])
def test_a_module_follows_another_whichever_is_asked_for(modules: None, started_with: str) -> None:
    follow("first_of_two", then="second_of_two")
    assert "told" not in sys.modules
    import_module(started_with)
    assert import_module("told").order == ["first", "second"]
    import_module("first_of_two")
    assert import_module("told").order == ["first", "second"]


def test_a_module_that_is_there_already_is_followed_at_once(modules: None) -> None:
    import_module("first_of_two")
    follow("first_of_two", then="second_of_two")
    assert import_module("told").order == ["first", "second"]
    assert not any(isinstance(finder, Follower) and finder.first == "first_of_two" for finder in sys.meta_path)


def test_what_the_follower_fails_on_is_not_hidden(modules: None) -> None:
    follow("first_of_two", then="no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_module("first_of_two")
