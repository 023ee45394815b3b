"""Which items the chunks of rece compare a position with."""

from __future__ import annotations

import torch

from shardrec.kernels.hash_chunks import (
    gather_histogram,
    hash_buckets,
    item_chunks,
    position_chunks,
)
from shardrec.kernels.ranks.communicator import Communicator


def test_positions_are_compared_with_items_of_their_own_buckets() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 16, generator=generator)
    states = rows[:10].repeat(50, 1) + 0.1 * torch.randn(500, 16, generator=generator)
    own_share = {}
    for align in ("bucket", "rank"):
        row_buckets = hash_buckets(rows, 20, 1, seed=0, step=0)
        buckets = hash_buckets(states, 20, 1, seed=0, step=0)
        alone = Communicator(None)
        of_rows, of_own = (gather_histogram(b, 20, alone) for b in (row_buckets, buckets))
        chunks = position_chunks(buckets, of_own, of_rows, 20, align, (500, 2000))
        row_chunks = item_chunks(row_buckets, of_rows, 20, 2000)
        near = chunks[:, None, 0] == row_chunks[None, :, 0]
        same = buckets[:, None, 0] == row_buckets[None, :, 0]
        own_share[align] = float((near & same).sum() / near.sum())
    assert own_share["bucket"] > own_share["rank"] + 0.2
