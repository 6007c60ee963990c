"""The rows that come with UPS-RM: a small set in the form of PKU-SafeRLHF, written for this project (Apache-2.0)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def sample_root() -> Path:
    """Folder of the packaged sample, in the layout `<root>/data/<subset>/{train,test}.jsonl`."""
    return Path(str(files("ups_rm") / "data" / "sample" / "PKU-SafeRLHF"))
