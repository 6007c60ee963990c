"""What a file or folder holds, as one hash: by it a run knows whether its inputs are still the same.

Large files are hashed once and remembered by size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ups_rm.durable import file_sha256
from ups_rm.models import cache_folder


def content_hash(item: Path | str) -> str:
    """sha256 of a file, or of a folder's files with their names; of the text itself for what is not on disk."""
    path = Path(item).expanduser()
    if not path.exists():
        return hashlib.sha256(str(item).encode()).hexdigest()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    known = _Digests()
    for file in files:
        digest.update(f"{file.relative_to(path) if file != path else ''}\0{known.of(file)}\n".encode())
    known.save()
    return digest.hexdigest()


class _Digests:
    """sha256 of files, remembered in the user's cache by path, size and modification time."""

    def __init__(self) -> None:
        self.file = cache_folder() / "digests.json"
        try:
            self.known: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}
        self.changed = False

    def of(self, file: Path) -> str:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self.known:
            digest = file_sha256(file)
            if stat.st_size < 1 << 20:
                return digest  # quick to read again: not worth remembering
            self.known[key], self.changed = digest, True
        return self.known[key]

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(list(self.known.items())[-1000:])), encoding="utf-8")
            temporary.replace(self.file)
        except OSError:
            return  # only a cache: the next run hashes again
