"""Choices of sce and rece do not depend on rounding, and so not on the number of ranks."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture
def near_ties(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("near_ties")


def test_equal_vectors_are_chosen_alike_on_any_number_of_ranks(near_ties: ModuleType) -> None:
    counts = near_ties.count_flips("exact", range(200))
    compared = [counts[f"{name} compared"] for name in ("positions", "items", "hashes")]
    assert compared[:2] == [200 * 3 * 16] * 2 and compared[2] > 200 * 3 * 120
    assert [counts[name] for name in ("positions", "items", "hashes", "batches")] == [0] * 4


def test_vectors_that_differ_by_rounding_are_nearly_always_chosen_alike(
    near_ties: ModuleType,
) -> None:
    counts = near_ties.count_flips("near", range(100))
    assert counts["positions"] + counts["items"] < 1e-3 * 100 * 3 * 2 * 16
    assert counts["hashes"] < 1e-3 * counts["hashes compared"]


def test_products_of_equal_vectors_differ_in_the_counts(near_ties: ModuleType) -> None:
    """Otherwise the counts would show nothing."""
    generator = torch.Generator().manual_seed(0)
    vector, query = torch.randn(2, 1, 64, generator=generator)
    scores = [near_ties.times_transposed_in_some_order(vector.expand(n, -1), query) for n in (5, 6)]
    assert len(torch.cat(scores).unique()) > 2
