"""The pages hold together: links lead somewhere, both READMEs are one text, keys, paths and variables are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, READMES, REPO, fences, headings, links, prose

from ups_rm.recipe import known_keys

ALLOWED_SITES = ("https://github.com/volcengine/verl", "https://arxiv.org/")
NEVER_NAMED = re.compile(r"pypi\.org|pythonhosted|npmjs|download\.pytorch|/root/|/home/\w|/work/|/tmp/w")


def tracked() -> list[Path]:
    """Text files that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=REPO, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [REPO / name for name in done.stdout.splitlines() if (REPO / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith("http"):
            assert target.startswith(ALLOWED_SITES), f"{page.name} links {target}"
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links {target}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in {heading.anchor for heading in headings(there)}, f"{page.name} links {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_page_is_linked_from_somewhere(page):
    if page.name == "README.md":
        return
    others = [other for other in PAGES if other != page]
    assert any((o.parent / t.partition("#")[0]).resolve() == page for o in others for t in links(o) if ":" not in t)


def test_both_readmes_have_the_same_shape():
    english, chinese = ([heading.level for heading in headings(REPO / name)] for name in READMES)
    assert english == chinese
    for language in ("bash", "python"):
        counts = [len(fences(REPO / name, language)) for name in READMES]
        assert counts[0] == counts[1], language
    assert fences(REPO / READMES[0], "python") == fences(REPO / READMES[1], "python")


def test_both_readmes_have_tables_of_the_same_rows_and_the_same_numbers():
    first_cells = [
        [
            line.split("|")[1].strip()
            for line in (REPO / name).read_text(encoding="utf-8").splitlines()
            if line[:3] == "| `"
        ]
        for name in READMES
    ]
    assert first_cells[0] == first_cells[1]
    figures = [re.findall(r"\d+\.\d+", _results(name)) for name in READMES]
    assert figures[0] == figures[1]


def _results(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8").split("<!-- results -->")[1].split("<!-- /results -->")[0]


def test_the_study_s_table_is_the_same_everywhere():
    """In both READMEs and, with more beside it, on the page of objectives."""
    numbers = [re.findall(r"[+-]?\d+\.\d+", _study(name)) for name in (*READMES, "docs/objectives.md")]
    assert len(numbers[0]) > 20
    assert numbers[0] == numbers[1] == numbers[2]


def _study(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8").split("<!-- study -->")[1].split("<!-- /study -->")[0]


def test_chinese_readme_is_in_chinese():
    paragraphs = [
        part
        for part in prose(REPO / "README.zh-CN.md").split("\n\n")
        if re.search(r"[a-z]{4,} [a-z]{4,} [a-z]{4,}", part)
    ]
    untranslated = [part for part in paragraphs if not re.search(r"[\u4e00-\u9fff]", part)]
    assert not untranslated


@pytest.mark.parametrize("name", READMES)
def test_every_key_in_the_pages_is_a_key_of_the_recipe(name):
    known, text = set(known_keys()), (REPO / name).read_text(encoding="utf-8")
    for page in [text, *(guide.read_text(encoding="utf-8") for guide in (REPO / "docs").rglob("*.md"))]:
        roots = "prepare|reward_training|evaluation|data|actor_rollout_ref|algorithm|reward_model|trainer"
        for key in re.findall(rf"`((?:{roots})\.[a-z_.]+?)(?:=[^`]*)?`", page):
            if not key.endswith((".py", ".jsonl", ".parquet", ".png")):
                assert key in known, key


@pytest.mark.parametrize("name", READMES)
def test_the_folder_tree_is_that_of_the_repository(name):
    tree = next(block for block in fences(REPO / name, "text") if "src/ups_rm/" in block)
    names: list[str] = []
    for line in tree.split("\n\n")[0].splitlines():  # what a run makes stands after the blank line
        first_column = re.match(r"\s*((?:[\w./-]+(?: {1,2}|$))+)", line)
        names += first_column[1].split() if first_column else []
    for path in names:
        assert (REPO / path).exists() or (REPO / "src/ups_rm" / path).exists(), path
    assert len(names) >= 20


def test_every_environment_variable_is_in_both_readmes():
    names: set[str] = set()
    for file in [*(REPO / "src").rglob("*.py"), REPO / "tests/conftest.py"]:
        found = re.findall(r'(?:envvar=|environ\.get\(|environ\[)"([A-Z_]+)"', file.read_text(encoding="utf-8"))
        names |= set(found)
    for script in (REPO / "scripts").glob("*.sh"):
        names |= set(re.findall(r"\$\{([A-Z_]+):-", script.read_text(encoding="utf-8")))
    names -= {"PATH", "XDG_CACHE_HOME", "CI", "CUDA_VISIBLE_DEVICES"}  # of others; the last is set by the RM workers
    for name in READMES:
        text = (REPO / name).read_text(encoding="utf-8")
        assert not [variable for variable in sorted(names) if f"`{variable}`" not in text]


def test_generated_pages_are_fresh():
    done = subprocess.run(
        [sys.executable, "scripts/recipe_docs.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_names_a_registry_or_a_path_of_a_machine():
    found = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if file != Path(__file__) and NEVER_NAMED.search(text):
            found.append(f"{file.relative_to(REPO)}: {NEVER_NAMED.search(text)}")
    assert not found
