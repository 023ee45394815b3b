"""rece against its dense float64 definition, and whom its chunks bring together."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.loss_cases import SIZES, batch, check, ids
from torch import Tensor

from shardrec.kernels import reduced_cross_entropy
from shardrec.kernels.hash_chunks import (
    gather_histogram,
    hash_buckets,
    item_chunks,
    position_chunks,
)
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.reference import reduced_cross_entropy_reference


@pytest.mark.parametrize("align", ["bucket", "rank"])
@pytest.mark.parametrize("reach", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES[2:-1], ids=ids)
def test_rece_equals_its_definition_with_the_same_chunks(
    size: tuple[int, int, int], reach: int, align: str
) -> None:
    states, table, targets = batch(size)
    alone = Communicator(None)
    rows = hash_buckets(table, 12, 4, seed=3, step=2)
    own = hash_buckets(states, 12, 4, seed=3, step=2)
    of_rows, of_own = (gather_histogram(buckets, 12, alone) for buckets in (rows, own))
    chunks = position_chunks(own, of_own, of_rows, 10, align)
    row_chunks = item_chunks(rows, of_rows, 10)

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return reduced_cross_entropy(
            states,
            table,
            targets,
            num_buckets=12,
            num_chunks=10,
            num_rounds=4,
            num_neighbor_chunks=reach,
            align=align,
            seed=3,
            step=2,
            reduction="none",
        )

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return reduced_cross_entropy_reference(states, table, targets, chunks, row_chunks, reach)

    check(ours, reference, (states, table, targets), torch.float32)


def test_buckets_of_positions_meet_their_own_buckets_of_items() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 16, generator=generator)
    states = rows[:10].repeat(50, 1) + 0.1 * torch.randn(500, 16, generator=generator)
    own_share = {}
    for align in ("bucket", "rank"):
        row_buckets = hash_buckets(rows, 20, 1, seed=0, step=0)
        buckets = hash_buckets(states, 20, 1, seed=0, step=0)
        alone = Communicator(None)
        of_rows, of_own = (gather_histogram(b, 20, alone) for b in (row_buckets, buckets))
        chunks = position_chunks(buckets, of_own, of_rows, 20, align)
        row_chunks = item_chunks(row_buckets, of_rows, 20)
        met = chunks[:, None, 0] == row_chunks[None, :, 0]
        same = buckets[:, None, 0] == row_buckets[None, :, 0]
        own_share[align] = float((met & same).sum() / met.sum())
    assert own_share["bucket"] > own_share["rank"] + 0.2
