"""The chunks of hashed vectors on a GPU: PyTorch sorts some rounds at a time, a kernel counts."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.hash_chunks.sizes import rounds_at_once

# mypy: disable-error-code="no-untyped-def"

__all__ = ["Places", "chunks_kernel", "fill_chunks"]

_VECTORS = 256


@dataclass(frozen=True, slots=True)
class Places:
    """The place of the k-th vector of a bucket: ``starts + (before + k) * times / over``.

    Attributes:
        before: (r, n_b) int64, vectors of the bucket on lower ranks.
        starts: (r, n_b) int64.
        times: (r, n_b) int64; None, as ``over``, for 1.
        over: (r, n_b) int64.
        count: Number of places.
    """

    before: Tensor
    starts: Tensor
    times: Tensor | None
    over: Tensor | None
    count: int


@triton.jit(
    do_not_specialize=["num_vectors", "num_buckets", "num_chunks", "num_places", "first_round"]
)
def chunks_kernel(
    in_order, order, borders, before, starts, times, over, chunks,
    num_vectors, num_buckets, num_chunks, num_places, first_round, num_rounds,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Writes the chunk of each vector to (n, num_rounds) integers; see ``Places``.

    Grid: (tiles of vectors, rounds from ``first_round``); one writer per chunk. ``in_order`` and
    ``order`` are (rounds, n) sorted buckets and their vectors; ``borders`` is (rounds, n_b + 1).
    """
    i_round = tl.program_id(1).to(tl.int64)
    o_vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    mask = o_vectors < num_vectors
    b_buckets = tl.load(in_order + i_round * num_vectors + o_vectors, mask=mask, other=0)
    o_buckets = (first_round + i_round) * num_buckets + b_buckets.to(tl.int64)
    o_borders = i_round * (num_buckets + 1) + b_buckets.to(tl.int64)
    b_within = o_vectors - tl.load(borders + o_borders, mask=mask, other=0)
    b_within += tl.load(before + o_buckets, mask=mask, other=0)
    if times is not None:
        b_over = tl.load(over + o_buckets, mask=mask, other=1)
        b_within = b_within * tl.load(times + o_buckets, mask=mask, other=0) // b_over
    b_places = tl.load(starts + o_buckets, mask=mask, other=0) + b_within
    b_chunks = tl.minimum(b_places * num_chunks // num_places, num_chunks - 1)
    o_lines = tl.load(order + i_round * num_vectors + o_vectors, mask=mask, other=0)
    o_chunks = o_lines * num_rounds + first_round + i_round
    tl.store(chunks + o_chunks, b_chunks.to(chunks.dtype.element_ty), mask=mask)


def fill_chunks(buckets: Tensor, places: Places, num_chunks: int, chunks: Tensor) -> None:
    """Writes the (n, r) chunk of every vector in each round, by its place in the global order.

    Args:
        buckets: (n, r) integers, a view of a contiguous (r, n).
        places: The place of every vector.
        num_chunks: n_c.
        chunks: (n, r) integers that are written.
    """
    (num_vectors, num_rounds), num_buckets = buckets.shape, places.starts.shape[1]
    if not buckets.numel():
        return
    at_once = rounds_at_once(num_vectors)
    edges = torch.arange(num_buckets + 1, dtype=torch.int32, device=buckets.device)
    for first in range(0, num_rounds, at_once):
        in_order, order = buckets.T[first : first + at_once].sort(dim=1, stable=True)
        rounds = in_order.shape[0]
        borders = torch.searchsorted(in_order.int(), edges.repeat(rounds, 1))
        chunks_kernel[(triton.cdiv(num_vectors, _VECTORS), rounds)](
            in_order,
            order,
            borders,
            places.before,
            places.starts,
            places.times,
            places.over,
            chunks,
            num_vectors,
            num_buckets,
            num_chunks,
            places.count,
            first,
            num_rounds,
            VECTORS=_VECTORS,
        )
