"""What sce and rece choose by comparing floats is the same on 1, 2 and 3 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels.hash_chunks import (
    gather_histogram,
    hash_buckets,
    item_chunks,
    position_chunks,
)
from shardrec.kernels.problem import Scaling, pose
from shardrec.kernels.sce import fill_buckets, mixed_centres
from shardrec.modules.shard import RowShard

NUM_ITEMS, WIDTH, NUM_POSITIONS = 83, 8, 41
POSITION_ENDS = {1: (41,), 2: (30, 41), 3: (17, 17, 41)}


def choices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What sce and rece choose: bucket positions and items, chunks of positions and of rows."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(n, WIDTH, generator=generator) for n in (NUM_POSITIONS, NUM_ITEMS))
    ends = POSITION_ENDS[num_ranks]
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    block = -(-NUM_ITEMS // num_ranks)
    shard = RowShard(
        table[rank * block : (rank + 1) * block], rank * block, NUM_ITEMS, dist.group.WORLD
    )
    problem = pose(
        states[own],
        shard,
        torch.zeros(own.stop - own.start, dtype=torch.int64),
        weights=None,
        reduction="mean",
        scaling=Scaling(normalize=False, temperature=1.0),
    )
    exchange = problem.exchange
    centres = exchange.sum(
        mixed_centres(problem.states, exchange.first_position, 7, seed=1, step=1)
    )
    buckets = fill_buckets(problem, centres, 9, 12)
    hashed = [hash_buckets(part, 16, 3, seed=1, step=1) for part in (states[own], shard.rows)]
    own_counts, row_counts = (gather_histogram(part, 16, exchange) for part in hashed)
    chunks = position_chunks(hashed[0], own_counts, row_counts, 10, "bucket")
    return buckets.positions, buckets.items, chunks, item_chunks(hashed[1], row_counts, 10)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sce_and_rece_choose_the_same_on_any_number_of_ranks(ranks: Ranks, num_ranks: int) -> None:
    positions, items, chunks, row_chunks = ranks(1).run(choices)[0]
    results = ranks(num_ranks).run(choices)
    for result in results:
        assert torch.equal(result[0], positions) and torch.equal(result[1], items)
    assert torch.equal(torch.cat([result[2] for result in results]), chunks)
    assert torch.equal(torch.cat([result[3] for result in results]), row_chunks)
