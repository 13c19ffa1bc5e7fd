"""The notebook runs from top to bottom in its own folder, and is stored with its outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import small_runs

nbclient = pytest.importorskip("nbclient", reason="needs the extra: pip install 'kd[notebook]'")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "inference.ipynb"


def execute(runs_dir: Path, monkeypatch) -> nbformat.NotebookNode:
    monkeypatch.setenv("KD_RUNS_DIR", str(runs_dir))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    there = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=there).execute()
    return notebook


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def pictures_of(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))


@pytest.mark.slow
def test_it_runs_on_the_runs_that_are_there(tmp_path, monkeypatch):
    made = small_runs.make(tmp_path)
    before = {p.name for p in NOTEBOOK.parent.iterdir()}
    notebook = execute(tmp_path, monkeypatch)
    text = text_of(notebook)
    assert made["distilled"].name in text
    for role, run in (("teacher", "teacher"), ("student alone", "alone"), ("student distilled", "distilled")):
        top1 = f"{100 * made[run].record['metrics']['test/top1']:.1f}"
        assert re.search(rf"{role}\s+{re.escape(top1)}\s", text), role
    assert pictures_of(notebook) >= 3
    assert {p.name for p in NOTEBOOK.parent.iterdir()} == before  # it leaves nothing behind


@pytest.mark.slow
def test_without_runs_it_says_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="make demo"):
        execute(tmp_path / "none", monkeypatch)


def test_it_is_stored_with_its_outputs_and_without_traces_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
    assert pictures_of(notebook) >= 3 and "student distilled" in text_of(notebook)
    everything = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/", everything)
