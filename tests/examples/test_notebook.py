"""The example notebook runs from its first cell to its last, in a real kernel, twice."""

from pathlib import Path
from typing import Any

import pytest

# A kernel that trains five models.
pytestmark = pytest.mark.slow

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
    for _ in range(2):
        notebook = nbformat.read(EXAMPLE, as_version=4)
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
        printed, values = outputs(notebook)
        assert "training sequences, 500 items" in values
        assert "NDCG@10 of " in values and "popularity 0." in values
        assert "Recommender(500 items of width 64" in values
        assert "options other than the defaults" not in printed, "only the bar and the curve"
        (curve, *others) = drawings(notebook)
        assert "Validation NDCG@10" in curve and "Loss" in curve and len(curve) < 30_000
        assert len(others) == 3, "one for each run that trains"
