"""Every command says what it does and shows an example that is a command of ours."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from ups_rm.cli import app, main

RUNNER = CliRunner()


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, command) of every command below a group."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


def test_the_commands_that_users_know_are_there():
    expected = {
        "run", "train", "eval", "data prepare", "data check", "data stats", "rm features", "rm train", "rm merge",
        "rm check", "rm card", "rm score", "models fetch",
    }  # fmt: skip
    assert expected <= {" ".join(path) for path in COMMANDS}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_an_example(path):
    done = RUNNER.invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert f"Example: ups-rm {' '.join(path)}" in " ".join(done.output.split())
    assert COMMANDS[path].help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_example_uses_options_that_exist(path):
    known = {name for parameter in COMMANDS[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    for example in re.split(r"\s{2,}", COMMANDS[path].epilog or ""):
        command = re.sub(r"^[A-Z][\w ]*: ", "", example)
        words = [word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")]
        assert set(words) <= known, f"{command}: {set(words) - known}"


@pytest.mark.parametrize("mine", [None, "ACTIVE"])
def test_idle_threads_sleep_unless_told_otherwise(mine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says of every command; torch reads it when it is imported."""
    monkeypatch.setattr(sys, "argv", ["ups-rm", "data", "--help"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that both are put back
        monkeypatch.delenv(name)
    if mine:
        monkeypatch.setenv("OMP_WAIT_POLICY", mine)
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == (mine or "PASSIVE")
    assert os.environ.get("GOMP_SPINCOUNT") == (None if mine else "5000")


def test_help_of_groups_and_the_whole_shows_one():
    for path in ((), ("data",), ("rm",), ("models",)):
        done = RUNNER.invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        if not path:
            assert "Example: ups-rm run" in " ".join(done.output.replace("**", "").split())
