"""Every command and every Python block of the READMEs and guides is run, in the order of its page, as a reader would.

Tiny models stand where the default model would be (pages.make_workspace), so most commands run exactly as printed. What
is done differently, and why, is said in the tables below and nowhere else; a command that would need another treatment
and has none fails its test.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import FENCE, READMES, REPO, commands, fences, make_workspace

# Appended to commands that train or evaluate: two steps instead of many, short replies, few prompts.
SMALL = (
    "trainer.total_training_steps=2 data.train_batch_size=2 actor_rollout_ref.actor.ppo_mini_batch_size=2 "
    "data.max_response_length=8 data.benign_share=-1 evaluation.max_unsafe_prompts=2 evaluation.max_benign_prompts=2 "
    "evaluation.n=1 evaluation.max_new_tokens=8 evaluation.n_resamples=100 reward_training.max_epochs=2"
)
APPENDED = {
    "bash scripts/run_grpo_pku_saferlhf.sh": SMALL,
    "ups-rm run": SMALL,
    "ups-rm train": f"{SMALL} trainer.save_freq=1",
    "ups-rm eval": SMALL,
    "ups-rm rm train --lora": "--lora-epochs 1 --max-epochs 2",
}
# Run in another form: the command as printed needs a login, a network, or minutes.
INSTEAD = {
    # the suite would run itself: lint and types run (their verdict is not this test's), tests are only collected
    "bash scripts/test.sh": (
        f"cd {REPO} && (bash scripts/test.sh --collect-only -q tests/grpo || true) | grep collected"
    ),
    'bash scripts/test.sh -m "not slow"': f'cd {REPO} && python -m pytest -m "not slow" --collect-only -q tests/grpo',
    "bash scripts/test.sh tests/grpo -x": f"cd {REPO} && python -m pytest tests/grpo -x --collect-only -q",
    # 49 steps over the whole sample would be most of this test's time
    "--lora --backbone smollm2-135m-instruct --data sample": (
        "--lora --backbone smollm2-135m-instruct --data my_pairs.jsonl"
    ),
    # asks for a key and talks to the server
    "wandb login": "wandb login --help",
    # uploads; that the folder is there and holds a run is checked
    "wandb sync runs/wandb-offline/wandb/offline-run-*": "ls runs/wandb-offline/wandb/offline-run-*/run-*.wandb",
    # checkpoints are at steps 1 and 2 here
    "--resume runs/mine/global_step_40": "--resume runs/mine/global_step_1",
    # the extra is installed already
    "pip install 'ups-rm[serve]'": "python -c 'import fastapi, uvicorn, httpx, prometheus_client'",
    # serves until it is asked to end
    "ups-rm rm serve my_rm --port 8500": (
        "ups-rm rm serve my_rm --port 0 >serve.log & pid=$!; "
        "until grep -q 'answers at' serve.log; do kill -0 $pid; sleep 0.3; done; "
        "kill $pid; wait $pid; grep 'all accepted requests are answered' serve.log"
    ),
    # the tiny model has two layers
    "--layers 22": "--layers 1",
    "--layers 16": "--layers 1",
    "--recipe own_rows": "--recipe own_rows reward_training.layers=1",
}
# Run by another test, in an environment of its own.
ELSEWHERE = {
    "pip wheel --no-deps --wheel-dir dist .": "tests/test_wheel.py",
    "pip install -c constraints.txt dist/ups_rm-0.1.0-py3-none-any.whl": "tests/test_wheel.py",
}
RUN_PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]


def runnable(page: Path) -> list[tuple[str, str]]:
    """(language, block) of what can be run on a page, in order."""
    return [
        (name, body) for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name in ("bash", "python")
    ]


def as_run(command: str) -> str:
    """The command as this test runs it."""
    if command in INSTEAD:
        return INSTEAD[command]
    for part, other in INSTEAD.items():
        command = command.replace(part, other) if part.startswith("--") else command
    plain = " ".join(word for word in command.split() if not _assigns(word))
    for start, more in APPENDED.items():
        if f"{plain} ".startswith(f"{start} ") and "--dry-run" not in command:
            return f"{command} {more}"
    return command


def promised(command: str) -> list[str]:
    """Files and folders that must be there after a command, besides its exit code of 0."""
    if "--dry-run" in command:
        return []
    named = re.findall(r"(?:--(?:out|plot|local_save_dir) |OUTPUT_DIR=|trainer\.default_local_dir=)(\S+)", command)
    if "run_grpo_pku_saferlhf.sh" not in command and not re.search(r"ups-rm run\b", command):
        return named
    folder = named[0] if named else "runs/ups-rm/quickstart"
    return [f"{folder}/summary.json", f"{folder}/policy", *([f"{folder}/wandb"] if '"wandb"' in command else [])]


def _assigns(word: str) -> bool:
    return word.partition("=")[0].isupper()


def test_both_readmes_have_the_same_commands():
    english, chinese = ([commands(block) for block in fences(REPO / name, "bash")] for name in READMES)
    assert english == chinese


def test_tables_of_this_test_speak_of_commands_that_are_there():
    there = [command for page in RUN_PAGES for block in fences(page, "bash") for command in commands(block)]
    for command in (*INSTEAD, *ELSEWHERE, *APPENDED):
        assert any(command in other for other in there), f"{command} is on no page any more"
    for command, file in ELSEWHERE.items():
        words = [word for word in command.split() if word.startswith("-")]
        text = (REPO / file).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words), f"{file} does not run {command}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in RUN_PAGES if runnable(page)], ids=lambda page: str(page.relative_to(REPO))
)
def test_every_command_runs_as_printed(page, tmp_path):
    workspace = tmp_path / "checkout"
    environment = make_workspace(workspace)
    kept: list[str] = []
    for language, block in runnable(page):
        if language == "python":
            run([sys.executable, "-c", block], block, workspace, environment)
            continue
        for command in commands(block):
            if command in ELSEWHERE:
                continue
            script = "\n".join(["set -euo pipefail", *kept, as_run(command)])
            output = run(["bash", "-c", script], as_run(command), workspace, environment)
            if command.startswith(("export ", "source ")):
                kept.append(command)
            for path in promised(command):
                assert (workspace / path).exists(), f"$ {as_run(command)}\nmade no {path}\n{output[-4000:]}"
    assert not list((workspace / "cache").glob("**/*.whl")), "a command fetched the default model"


def run(arguments: list[str], shown: str, workspace: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        arguments,
        cwd=workspace,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"$ {shown}\n{done.stdout[-4000:]}"
    return done.stdout
