"""Tokens and keys of the environment reach nothing that a run writes or prints.

A real training in processes of its own, with wandb offline, tensorboard, an RM behind HTTP that asks for a token, a
checkpoint per step and a group log per step; then what fails; then the report. All bytes are searched, also those in
the page's compressed data. A canary that must be found everywhere shows that the search can find something.
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from tiny_training import base_overrides, recipe_yaml
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import RewardServer

pytest.importorskip("wandb", reason='needs wandb: pip install "ups-rm[wandb]"')
pytest.importorskip("tensorboard", reason='needs tensorboard: pip install "ups-rm[tensorboard]"')
pytestmark = pytest.mark.slow  # seven processes
RM_TOKEN = "rm-token-Zq8vW3xK0pLm5TnB"
SECRETS = {
    "OUR_RM_TOKEN": RM_TOKEN,
    "UPS_RM_TOKEN": "ups-token-hV2cR9sYd4JgU7eA",
    "UPS_RM_JUDGE_KEY": "judge-key-bN6tF1oXw8QkP3iM",
    "WANDB_API_KEY": "5ecfa9d17b3e408c96a2f0d84b7c1e6395ad2f08",
    "HF_TOKEN": "hf_aLkXoPqWsZrTyUvBnMcJdHgFeRiKs",
    "HUGGING_FACE_HUB_TOKEN": "hf_oLdNaMeXoPqWsZrTyUvBnMcJdHgFe",
}
GIT_PASSWORD = "git-password-Ym4rC7zEj2"
CANARY = "canary-name-of-the-run"


class Output(NamedTuple):
    """What the run left: its folder, and what each command printed."""

    folder: Path
    printed: dict[str, str]


def forms(secret: str) -> list[bytes]:
    """A secret as text, in an address, and in the headers of basic authentication."""
    basic = [base64.b64encode(f"{user}:{secret}".encode()) for user in ("", "api", "user")]
    return [secret.encode(), quote(secret).encode(), *basic]


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file, with its path in front; compressed ones and a page's data opened."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        for packed in re.findall(rb"H4sI[A-Za-z0-9+/=]{20,}", data):
            data += gzip.decompress(base64.b64decode(packed))
        yield file.relative_to(folder), str(file).encode() + b"\n" + data


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, rm_folder: Path) -> Output:
    folder = tmp_path_factory.mktemp("secrets")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= SECRETS | {"WANDB_MODE": "offline", "HOME": str(folder / "home"), "WANDB_SILENT": "true"}
    environment["UPS_RM_NATIVE"] = "0"  # else they would be built anew in that home
    environment |= {f"WANDB_{name}_DIR": str(folder / f"wandb-{name.lower()}") for name in ("CACHE", "CONFIG", "DATA")}
    remote = f"https://somebody:{GIT_PASSWORD}@example.invalid/repo.git"
    for arguments in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    recipe = recipe_yaml(folder)
    given = [
        *base_overrides(folder, policy_folder), "reward_model.model.token_env=OUR_RM_TOKEN",
        "trainer.logger=[console,jsonl,wandb,tensorboard]", f"trainer.project_name={CANARY}",
        f"trainer.experiment_name={CANARY}", "trainer.total_training_steps=2", "trainer.save_freq=1",
        "trainer.test_freq=1", "trainer.group_log_freq=1",
    ]  # fmt: skip
    printed: dict[str, str] = {}

    def run(name: str, *arguments: str, code: int = 0) -> None:
        command = [sys.executable, "-m", "ups_rm", *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        printed[name] = done.stdout
        assert done.returncode == code, done.stdout

    scorer = RewardScorer.load(rm_folder, dtype="float32")
    with RewardServer([scorer], name="rm", token=RM_TOKEN) as server:
        url = f"reward_model.model.url={server.url}"
        run("train", "train", "--recipe", str(recipe), *given, url)
        wrong = [*given, url, f"trainer.default_local_dir={folder / 'other'}"]
        wrong[wrong.index("reward_model.model.token_env=OUR_RM_TOKEN")] = (
            "reward_model.model.token_env=UPS_RM_JUDGE_KEY"
        )
        run("wrong token", "train", "--debug", "--recipe", str(recipe), *wrong, code=2)
        in_url = server.url.replace("http://", f"http://:{RM_TOKEN}@")
        run("token in the address", "train", "--debug", "--recipe", str(recipe), *given,
            f"reward_model.model.url={in_url}", code=2)  # fmt: skip
        run("token as its own name", "train", "--debug", "--recipe", str(recipe), *given, url,
            f"reward_model.model.token_env={RM_TOKEN}", code=2)  # fmt: skip
    run("report", "report", str(folder / "run"))
    run("replies", "groups", str(folder / "run"))
    run("dry run", "train", "--dry-run", "--recipe", str(recipe), *given, url)
    (folder / ".git/config").unlink()  # the password stands there by our own doing
    return Output(folder, printed)


def test_the_search_finds_what_is_there(output: Output) -> None:
    """Name of the run: in recipe, checkpoints, wandb's and tensorboard's files, and in the report's packed data."""
    found = {str(path) for path, data in contents(output.folder) if CANARY.encode() in data}
    for part in ("run/recipe.yaml", "run/global_step_2/state.json", ".wandb", "run/tensorboard/", "report.html"):
        assert any(part in path for path in found), (part, sorted(found))
    paths = {str(path) for path, _ in contents(output.folder)}
    for part in ("metrics.jsonl", "groups/step_000002.jsonl", "made_with.json", "manifest.json", "training.pt"):
        assert any(part in path for path in paths), part
    assert "report.html" in output.printed["report"]


@pytest.mark.parametrize("name", [*SECRETS, "password of the git remote"])
def test_no_secret_is_written_or_printed(output: Output, name: str) -> None:
    secret = SECRETS.get(name, GIT_PASSWORD)
    for form in forms(secret):
        written = [str(path) for path, data in contents(output.folder) if form in data]
        assert written == [], f"{name} stands in {written}"
        for command, text in output.printed.items():
            assert form not in text.encode(), f"{name} is printed by: {command}"


def test_a_token_in_the_wrong_place_is_refused_with_the_right_one(output: Output) -> None:
    assert "url has a user or a token before the host" in output.printed["token in the address"]
    assert "token_env=NAME of an environment variable" in output.printed["token in the address"]
    assert "token_env is not the name of an environment variable" in output.printed["token as its own name"]
    assert "HTTP 401" in output.printed["wrong token"]
