#!/usr/bin/env python3
"""Writes docs/recipe.md from the recipe's dataclasses, and the values in the READMEs' tables of key settings.

    python scripts/recipe_docs.py            write
    python scripts/recipe_docs.py --check    exit code 1 if something is stale (a test does this)

The text under a field in src/ups_rm/recipe.py is its meaning here. In the READMEs only the columns with values are
written; the meanings there are by hand, in two languages.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from ups_rm import recipe as recipe_module
from ups_rm.recipe import Recipe, load_recipe

REPO = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
TABLE_ROW = re.compile(r"^\| `([a-z_.]+)` \|[^|]*\|[^|]*\|")
HEAD = """# Every key of the recipe

Written by `scripts/recipe_docs.py` from `src/ups_rm/recipe.py`; don't edit by hand.

A recipe is a YAML file over the defaults below; `key=value` on the command line comes last:
`ups-rm run --recipe my.yaml trainer.total_training_steps=20`. Keys that verl also has carry verl's names and mean what
they mean in verl 0.9.1; `prepare`, `reward_training`, `evaluation` and `monitor` are ours. An unknown key, or a value
that the local engine can't honour, is an error. `ups-rm train --dry-run` prints the resolved recipe.

The third column is what `recipes/quickstart.yaml`, the recipe of `ups-rm run`, sets where it differs from the default.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: dotted name, default, meaning ("" if the field has no text)."""

    name: str
    default: Any
    meaning: str


def meanings(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found


def keys(section: Any, prefix: str = "") -> Iterator[Key]:
    """All keys of a section in the order of the file, its own before those of its sub-sections."""
    hints, texts = get_type_hints(type(section)), meanings(type(section))
    names = [field.name for field in dataclasses.fields(section)]
    for name in sorted(names, key=lambda name: dataclasses.is_dataclass(hints[name])):
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", value, texts.get(name, ""))


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "" or value == []:
        return "(empty)"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`" if isinstance(value, list) else f"`{value}`"


def recipe_page() -> str:
    """docs/recipe.md."""
    quickstart = {key.name: key.default for key in keys(load_recipe("quickstart"))}
    parts = [HEAD]
    for section in dataclasses.fields(Recipe):
        value = getattr(Recipe(), section.name)
        note = inspect.getdoc(type(value)) or ""
        note = "" if note.startswith(f"{type(value).__name__}(") else note  # what @dataclass writes by itself
        parts.append(f"\n## {section.name}\n" + (f"\n{note}\n" if note else ""))
        parts.append("\n| Key | Default | Quickstart | Meaning |\n|---|---|---|---|\n")
        for key in keys(value, f"{section.name}."):
            if not key.meaning:
                raise SystemExit(f"{recipe_module.__file__}: {key.name} has no text under its field")
            differs = shown(quickstart[key.name]) if quickstart[key.name] != key.default else ""
            meaning = key.meaning.replace("|", "&#124;")
            parts.append(f"| `{key.name}` | {shown(key.default)} | {differs} | {meaning} |\n")
    return "".join(parts)


def readme_page(text: str) -> str:
    """A README with the values of its key tables (| `key` | default | quickstart | ...) as they are now."""
    defaults = {key.name: key.default for key in keys(Recipe())}
    quickstart = {key.name: key.default for key in keys(load_recipe("quickstart"))}
    lines = text.split("\n")
    for i, line in enumerate(lines):
        row = TABLE_ROW.match(line)
        if row and row[1] in defaults:
            name = row[1]
            lines[i] = f"| `{name}` | {shown(defaults[name])} | {shown(quickstart[name])} |" + line[row.end() :]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    found = {REPO / "docs" / "recipe.md": recipe_page()}
    for name in READMES:
        found[REPO / name] = readme_page((REPO / name).read_text(encoding="utf-8"))
    return found


def main() -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(REPO)} is stale\n  fix: python scripts/recipe_docs.py")
        else:
            path.write_text(pages()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(REPO)}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
