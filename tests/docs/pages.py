"""Reads Markdown pages as the tests here need them: commands, headings, links. Makes a workspace to run commands in."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted(
    [REPO / name for name in (*READMES, "CHANGELOG.md")]
    + [page for folder in ("docs", "examples") for page in (REPO / folder).rglob("*.md")]
    + [REPO / "src/ups_rm/data" / name / "README.md" for name in ("sample", "eval_prompts")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Heading:
    """One heading and the anchor that GitHub gives it."""

    level: int
    text: str
    anchor: str


def fences(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(block: str) -> list[str]:
    """The commands of a bash block: comments dropped, continued lines joined."""
    lines = block.replace("\\\n", " ").split("\n")
    return [" ".join(line.split()) for line in (re.sub(r"(^|\s)#\s.*$", "", line) for line in lines) if line.strip()]


def prose(page: Path) -> str:
    """The page without fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def headings(page: Path) -> list[Heading]:
    """All headings; anchors as GitHub makes them."""
    found: list[Heading] = []
    for marks, text in re.findall(r"^(#+) (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        same = sum(heading.anchor == slug or heading.anchor.startswith(f"{slug}-") for heading in found)
        found.append(Heading(len(marks), text.strip(), f"{slug}-{same}" if same else slug))
    return found


def links(page: Path) -> list[str]:
    """Targets of all links and pictures outside code."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def make_workspace(folder: Path) -> dict[str, str]:
    """A folder that looks like a checkout where nothing was run yet, with tiny models; returns the environment.

    The default model's place in the cache holds a tiny policy, so that `smollm2-135m-instruct` is that one, and the
    names that the pages use for the reader's own files exist. Nothing here can reach the network: no hub, no wandb.
    """
    from tiny import tiny_policy, tiny_rm
    from ups_rm.data.prepare import prepare
    from ups_rm.data.sample import sample_root

    folder.mkdir(parents=True)
    for name in ("scripts", "recipes", "examples", "docs", "src", "pyproject.toml", "constraints.txt", "README.md"):
        (folder / name).symlink_to(REPO / name)
    (folder / ".venv").symlink_to(sys.prefix)
    default = tiny_policy(folder / "cache/models/smollm2-135m-instruct")
    (default / "ups_rm_source.json").write_text("{}", encoding="utf-8")
    shutil.copytree(sample_root(), folder / "Data/PKU-SafeRLHF")
    tiny_rm(folder / "my_rm")
    tiny_policy(folder / "my_policy", seed=5)
    prepare(sample_root(), folder / "my_prompts", max_rows=20)
    (folder / "my_pairs.jsonl").write_text("\n".join(_pairs(sample_root())[:120]) + "\n", encoding="utf-8")
    environment = dict(os.environ) | {
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "UPS_RM_VENV": sys.prefix,
        "UPS_RM_CACHE": str(folder / "cache"),
        "UPS_RM_NATIVE": "0",  # they would be built anew for each page
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "140",
        "PYTHONUTF8": "1",
    }
    for name in ("POLICY_MODEL_PATH", "REWARD_MODEL_PATH", "TRAIN_DATA", "VAL_DATA", "OUTPUT_DIR", "ENGINE", "FRESH"):
        environment.pop(name, None)
    return environment


def _pairs(sample: Path) -> list[str]:
    """Rows of the sample with one safe and one unsafe reply, in the plain form."""
    found = []
    for file in sorted(sample.rglob("train.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if row["is_response_0_safe"] == row["is_response_1_safe"]:
                continue
            replies = {row[f"is_response_{i}_safe"]: row[f"response_{i}"] for i in (0, 1)}
            pair = {"prompt": row["prompt"], "safe_response": replies[True], "unsafe_response": replies[False]}
            found.append(json.dumps(pair, ensure_ascii=False))
    return found
