"""docs/errors.md lists every class and exit code, and nothing else; a mistake is one message, with --debug more."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import REPO

import ups_rm.cli
from tiny_training import command
from ups_rm import errors, exits

PAGE = (REPO / "docs/errors.md").read_text(encoding="utf-8")
CLASSES = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}
MINE: dict[str, tuple[Any, ...]] = {"NumberError": ("loss", [3])}


def app_that_raises(error: Exception) -> Any:
    """What `ups_rm.cli.main` calls, with nothing in it but an error."""

    def app(*_: Any, **__: Any) -> None:
        raise error

    return app


def test_every_class_is_listed_with_the_code_that_the_command_app_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {name: int(code) for name, code in re.findall(r"^\| `(\w+Error)` \| (\d+) \|", PAGE, re.M)}
    found = {}
    for name, kind in CLASSES.items():
        error = kind(*MINE.get(name, ("what is wrong\n  fix: this",)))
        monkeypatch.setattr(ups_rm.cli, "app", app_that_raises(error))
        found[name] = command("data", "check")
    assert found == listed


def test_every_error_has_one_base_and_no_other_module_makes_more() -> None:
    assert all(issubclass(kind, errors.UpsRmError) for kind in CLASSES.values())
    # within the package only: become an error of ours, or an exit code, before they leave it
    private = {"_NotPlain", "BadRow", "RefusedError", "QueueFullError", "Interrupted", "Stopped"}
    for file in (REPO / "src").rglob("*.py"):
        found = set(re.findall(r"^class (\w+)\((?:\w*Error|\w*Exception)\)", file.read_text(encoding="utf-8"), re.M))
        assert file.name == "errors.py" or found <= private, file


def test_every_exit_code_is_listed_by_its_name() -> None:
    listed = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", PAGE, re.M)}
    real = {name: value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert listed == real
    literals = [
        f"{file.name}: {found}"
        for file in [*(REPO / "src").rglob("*.py"), *(REPO / "scripts").glob("*.py")]
        for found in re.findall(r"(?:typer\.Exit|sys\.exit)\([1-9]\d*\)", file.read_text(encoding="utf-8"))
    ]
    assert literals in ([], ["process.py: sys.exit(1)"])  # the latter: verl's own process, which we read


@pytest.mark.parametrize("place", ["first", "last", "none"])
def test_a_mistake_is_one_message_and_debug_adds_the_traceback(place: str, capsys: Any, tmp_path: Path) -> None:
    words = ["data", "check", str(tmp_path / "no.parquet")]
    words = {"first": ["--debug", *words], "last": [*words, "--debug"], "none": words}[place]
    assert command(*words) == 2
    told = capsys.readouterr().err
    assert f"DataError: {tmp_path / 'no.parquet'}: no such file\n  fix: " in told
    assert ("Traceback (most recent call last)" in told) == (place != "none")
    assert command("data", "check", str(tmp_path / "no.parquet")) == 2
    assert "Traceback" not in capsys.readouterr().err, "--debug is of one command"


def test_what_the_machine_refuses_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for error, words in (
        (PermissionError(13, "Permission denied", "/x/y"), "RunError: /x/y: Permission denied\n  fix: "),
        (MemoryError(), "RunError: memory is used up: MemoryError\n  fix: smaller ppo_micro_batch_size"),
        (OSError("no network"), "RunError: no network"),
    ):
        monkeypatch.setattr(ups_rm.cli, "app", app_that_raises(error))
        assert command("run") == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(ups_rm.cli, "app", app_that_raises(KeyError("x")))
    assert command("run") == exits.BUG
    told = capsys.readouterr().err
    assert "bug in UPS-RM: KeyError: 'x'" in told
    assert "Traceback" not in told
    assert "--debug" in told


@pytest.mark.parametrize(
    ("script", "given"),
    [
        ("preprocess_pku_saferlhf.py", ["--local_dataset_path", "no/where"]),
        ("test_data_loading.py", ["--parquet_path", "no.parquet"]),
    ],
)
def test_scripts_do_the_same(script: str, given: list[str], tmp_path: Path) -> None:
    for more in ([], ["--debug"]):
        run = [sys.executable, str(REPO / "scripts" / script), *given, *more]
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert "DataError: no" in done.stderr
        assert ("Traceback" in done.stderr) == bool(more)
