"""What a model folder must not hold, looked at before anything in it is read: folders come from strangers.

Nobody's Python runs without `trust_remote_code` (every `from_pretrained` of ours is told so), and weights are read by
safetensors or by torch's weights-only unpickler. This module refuses the rest: files named outside of the folder, text
that is a link to another place (a private key as chat template would be copied into every folder made from it), and
attention code from a hub, which transformers would fetch because config.json says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ups_rm.durable import MANIFEST, damage
from ups_rm.errors import UpsRmError

TEXTS = frozenset({".json", ".jinja", ".txt", ".md", ".py", ".model", ".yaml"})
"""What is read as text and may be copied into folders that are made from this one. Weights may lie on another disk."""
KERNEL = re.compile(r"[^/]+/[^/]+")
"""How config.json names attention code that transformers fetches from a hub; ours are single words."""
FOREIGN = re.compile(r"GLOBAL ([\w.]+)|Unsupported operand")
"""In torch's message: the name that a pickle file asks for, or an instruction that torch.save never writes."""


def check_manifest(folder: Path | str, error: type[UpsRmError]) -> None:
    """Refuse a model folder of ours whose files are not as they were written; one without a manifest passes.

    Raises:
        error: with the file that is torn, missing or has other bytes, and the way out.
    """
    path = Path(folder).expanduser()
    if not (path / MANIFEST).is_file():
        return
    stats = {file.name: file.stat() for file in sorted(path.iterdir())}
    stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())
    if (wrong := _damage(path.resolve(), stamps)) is not None:
        raise error(
            f"{path} is damaged: {wrong}\n  fix: make or copy it again; where the change was meant, remove "
            f"{path / MANIFEST}"
        )


@cache
def _damage(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str | None:
    """`durable.damage`; a process reads a folder once (policy and reference are one), and again when a file changed."""
    return damage(path)


def check_model_folder(folder: Path | str, error: type[UpsRmError], *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that reaches out of itself; a hub id (no such folder here) passes.

    Raises:
        error: with the file, the entry, and the way out.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        return
    for file in _texts(path):
        if not _inside(file.resolve(), _home(path)):
            raise error(
                f"{file} is a link out of its folder, to {file.resolve()}: it could be any file of yours, and would be "
                "copied into what is made from it\n  fix: put the file itself there"
            )
    for index in sorted(path.glob("*.index.json")):
        for name, shard in _weight_map(index):
            if not is_plain_name(shard):
                raise error(
                    f"{index}: {name} is said to be in {shard!r}, which is no file of this folder\n"
                    "  fix: name the shard as it lies beside the index"
                )
    if not trust_remote_code and (code := _hub_attention(path / "config.json")):
        raise error(
            f"{path}/config.json: attn_implementation {code!r} is code from a hub, which is not run\n"
            "  fix: remove that entry; or trust_remote_code=True, if you trust it"
        )


def is_plain_name(name: Any) -> bool:
    """Whether `name` names a file at or below where it is looked for: no absolute path, no `..`, on any system."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A panic of the tokenizers library, which damaged files raise and which is no Exception, as a ValueError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise ValueError(f"{type(panic).__name__}: {panic}") from panic


def refused_pickle(error: BaseException) -> str | None:
    """What a pickle file asked for that was refused, if `error` or what it came from says so; else None.

    torch's own message recommends to load such a file without protection; ours does not.
    """
    from pickle import UnpicklingError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UnpicklingError) and (foreign := FOREIGN.search(str(seen))):
            wanted = foreign.group(1)
            what = f"holds more than tensors ({wanted})" if wanted else "is damaged, or not written by torch.save"
            return (
                f"a pickle file in it {what}; nothing of it was run\n"
                "  fix: ask its author for safetensors; do not load it by other means"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _texts(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "additional_chat_templates/*"):
        yield from (file for file in sorted(folder.glob(pattern)) if file.suffix in TEXTS)


def _home(folder: Path) -> Path:
    """Where links of this folder may lead: into itself; in a hub's cache, to the blobs that all its snapshots share."""
    resolved = folder.resolve()
    return resolved.parent.parent if resolved.parent.name == "snapshots" else resolved


def _inside(file: Path, folder: Path) -> bool:
    return file == folder or folder in file.parents


def _weight_map(index: Path) -> Iterator[tuple[str, Any]]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        yield from listed.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # not an index; whoever reads it says so


def _hub_attention(config: Path) -> str | None:
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        values = [told.get(key) for key in ("attn_implementation", "_attn_implementation", "experts_implementation")]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # whoever reads it says what is wrong
    names = [name for value in values for name in (value.values() if isinstance(value, dict) else [value])]
    return next((name for name in names if isinstance(name, str) and KERNEL.search(name)), None)
