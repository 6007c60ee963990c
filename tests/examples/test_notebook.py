"""The example notebook runs from top to bottom on tiny models, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tiny import tiny_policy, tiny_rm

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not [cell.source for cell in cells if cell.outputs or cell.execution_count is not None]


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("POLICY_MODEL_PATH", str(tiny_policy(tmp_path / "policy")))
    monkeypatch.setenv("REWARD_MODEL_PATH", str(tiny_rm(tmp_path / "rm")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    said = [_text(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "pass" in said[1]
    assert "fail" not in said[1]
    assert said[2].count("safe score") == 3
    assert "steps=4" in said[3]
    assert "image/png" in said[4]
    assert said[5].count("advantage") == 4
    assert "safe score" in said[6]
    assert not list(tmp_path.glob("ups-rm-*")), "the notebook left its folder behind"


def _text(cell: nbformat.NotebookNode) -> str:
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", "") or " ".join([*output.get("data", {}), *output.get("data", {}).values()]))
    return "".join(parts)
