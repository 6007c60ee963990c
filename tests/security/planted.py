"""Folders as an attacker would make them. What they would do, were it run, is to write the file `mark`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

NAMES = {
    "AutoConfig": "EvilConfig",
    "AutoModel": "EvilModel",
    "AutoModelForCausalLM": "EvilModel",
    "AutoModelForSequenceClassification": "EvilModel",
    "AutoModelForTokenClassification": "EvilModel",
}


def code(mark: Path) -> str:
    """Python that writes `mark` as soon as it is imported, and then fails."""
    return f"open({str(mark)!r}, 'w').write('ran')\nraise RuntimeError('the planted code ran')\n"


def with_code(source: Path, folder: Path, mark: Path, *, known: bool) -> Path:
    """A copy of a model folder with Python files of its own in every place where transformers looks for some.

    known: its architecture is one of transformers' own, so that it loads without them.
    """
    shutil.copytree(source, folder)
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "configuration_myrm", "modeling_myrm"):
        (folder / f"{name}.py").write_text(code(mark))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code(mark))
    modules = {
        name: f"{'configuration' if name == 'AutoConfig' else 'modeling'}_evil.{cls}" for name, cls in NAMES.items()
    }
    edit(folder / "config.json", auto_map=modules, **({} if known else {"model_type": "evil"}))
    tokenizer = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    edit(
        folder / "tokenizer_config.json", auto_map=tokenizer, **({} if known else {"tokenizer_class": "EvilTokenizer"})
    )
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Payload:
    """Unpickled without protection it writes `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)
