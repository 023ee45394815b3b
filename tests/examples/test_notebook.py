"""The example notebook runs from its first cell to its last, in a real kernel, and again."""

from pathlib import Path
from typing import Any

import pytest

# A kernel that trains five models.
pytestmark = pytest.mark.slow

SMALL = "users=1_000, items=200, events=12_000"
EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "notebook.ipynb"


def outputs(notebook: Any) -> tuple[str, str]:
    """What the cells have printed, and the values they ended with."""
    found = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    values = [one["data"]["text/plain"] for one in found if one["output_type"] == "execute_result"]
    return "".join(one.get("text", "") for one in found), "\n".join(values)


def drawings(notebook: Any) -> list[str]:
    """The curves as they stand in the end."""
    found = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    data = [one["data"] for one in found if one["output_type"] == "display_data"]
    return [one["image/svg+xml"] for one in data if "image/svg+xml" in one]


def test_the_notebook_runs_and_runs_again(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("users=2_000, items=500, events=40_000", SMALL)
    assert any(SMALL in cell.source for cell in notebook.cells)
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=where)
    with client.setup_kernel():
        for is_again in (False, True):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            printed, values = outputs(notebook)
            assert "training sequences, 200 items" in values
            assert "NDCG@10 of " in values and "popularity 0." in values
            assert "Recommender(200 items of width 128" in values
            assert "options other than the defaults" not in printed, "only the bar and the curve"
            curves = drawings(notebook)
            assert all("Loss by step" in one and len(one) < 30_000 for one in curves)
            assert bool(curves) is not is_again, "the second time nothing is trained"
