from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from tests.modules.small_catalogs import CPU, alone
from tests.ranks import Ranks

from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import OPTIMIZERS, CatalogConfig


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "sparse_adam"])
def test_rows_without_a_gradient_stay_as_they_are(optimizer: str) -> None:
    catalog = alone(optimizer)
    before = catalog.shard.rows.detach().clone()
    for _ in range(2):
        catalog.lookup(torch.tensor([4, 7, 4])).sum().backward()
        catalog.step()
    changed = (catalog.shard.rows.detach() != before).any(1).nonzero().flatten()
    assert changed.tolist() == [4, 7]


# Pages of libraries that a step is the first to use, or that others had pushed out.
FIRST_TOUCHED = 1 << 20


def step_memory(optimizer: str, dense: bool) -> tuple[int, int]:
    """(extra bytes at the peak of step(), bytes of the shard) in a fresh heap."""
    config = CatalogConfig(optimizer=optimizer)
    catalog = Catalog(100_000, 64, config, group=None, device=CPU, seed=1)
    extra = 0
    for _ in range(2):
        catalog.lookup(torch.randint(100_000, (10_000,))).sum().backward()
        if dense:
            catalog.shard.rows.sum().backward()
        catalog.merge_gradients()
        before = start_peak()
        catalog.step(0.5)
        extra = max(extra, memory("VmHWM") - before)
    return extra, catalog.shard.rows.nbytes


def start_peak() -> int:
    """Resident bytes, after giving back what is free and resetting the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.slow
def test_a_step_needs_one_dense_gradient_and_a_tenth_of_the_shard(
    ranks: Ranks, optimizer: str, gradient: str
) -> None:
    ((extra, shard),) = ranks(1).run(step_memory, optimizer, gradient == "dense")
    # The gradient is there before step(), but adam has to make a sparse one dense.
    makes_dense = optimizer == "adam" and gradient == "sparse"
    assert extra <= (0.1 + makes_dense) * shard + FIRST_TOUCHED
