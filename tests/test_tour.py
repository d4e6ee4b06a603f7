"""The notebook runs from top to bottom, and is stored without what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
UPDATES = "updates = 200"
PICTURES = 4


def test_the_tour_is_stored_without_outputs() -> None:
    cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_the_tour_runs_and_draws_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "pip install nbclient nbformat ipykernel, or make test, which does"
    nbformat: Any = pytest.importorskip("nbformat", reason=why)
    nbclient: Any = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its runs go
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    assert UPDATES in tour.cells[2].source
    tour.cells[2].source = tour.cells[2].source.replace(UPDATES, "updates = 2")
    where = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(tour, kernel_name="python3", timeout=240, resources=where).execute()
    outputs = [output for cell in tour.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert sorted(path.name for run in tmp_path.glob("fcmae-tour-*") for path in run.iterdir()) == ["V1", "V2"]
