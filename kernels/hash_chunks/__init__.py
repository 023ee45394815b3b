"""Chunks of a random hash (RECE), the same on any number of ranks.

In each round vectors are sorted by the nearest of n_b random sign vectors and cut into n_c chunks.
The phases: ``hash_buckets`` hashes, ``gather_histogram`` counts the buckets of all ranks, and
``item_chunks`` and ``position_chunks`` turn a vector's place in the global order into its chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.hash_chunks.sizes import sort_bytes
from shardrec.kernels.negatives import STREAM_HASH
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.select import best_sign_direction

__all__ = [
    "Histogram",
    "gather_histogram",
    "hash_buckets",
    "index_dtype",
    "item_chunks",
    "position_chunks",
    "sort_bytes",
]

# Vectors hashed or sorted at a time: meanwhile their buckets and places are int64.
_KEYS_AT_ONCE = 1 << 16
# Vectors counted at a time on a GPU: 2**23 int64 for each round.
_COUNTED_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class Histogram:
    """Number of vectors in each bucket of each round, over all ranks and over the lower ranks.

    Attributes:
        total: (r, n_b) int64 numbers over all ranks.
        before: (r, n_b) int64 numbers over the ranks below this one; 0 in a single process.
    """

    total: Tensor
    before: Tensor


def index_dtype(count: int) -> torch.dtype:
    """The narrowest of uint8, int16 and int32 that holds indices below ``count``.

    >>> index_dtype(256), index_dtype(257), index_dtype(40_000)
    (torch.uint8, torch.int16, torch.int32)
    """
    if count <= 1 << 8:
        return torch.uint8
    return torch.int16 if count <= 1 << 15 else torch.int32


def hash_buckets(
    vectors: Tensor,
    num_buckets: int,
    num_rounds: int,
    *,
    seed: int,
    step: int,
    backend: str = "auto",
) -> Tensor:
    """(n, r) bucket of every vector in each round: the random sign vector of largest inner product.

    The dtype is ``index_dtype(num_buckets)``, narrow because catalogs have many rows.
    """
    shape = (vectors.shape[0], num_rounds)
    if choose_backend(vectors, backend) == "triton":
        from shardrec.kernels.select import gpu

        buckets = torch.empty(shape[::-1], dtype=index_dtype(num_buckets), device=vectors.device)
        gpu.best_sign_direction(
            vectors, buckets, num_buckets, seed=seed, step=step, stream=STREAM_HASH
        )
        return buckets.T
    buckets = torch.empty(shape, dtype=index_dtype(num_buckets), device=vectors.device)
    for index in range(num_rounds):
        for first in range(0, vectors.shape[0], _KEYS_AT_ONCE):
            part = slice(first, first + _KEYS_AT_ONCE)
            buckets[part, index] = best_sign_direction(
                vectors[part],
                num_buckets,
                seed=seed,
                step=step,
                stream=STREAM_HASH + index,
                backend=backend,
            )
    return buckets


def gather_histogram(
    buckets: Tensor, num_buckets: int, ranks: Communicator, backend: str = "auto"
) -> Histogram:
    """Number of vectors in each bucket of each round, over all ranks and over the lower ranks.

    Args:
        buckets: (n, r) integer buckets of this rank's vectors.
        num_buckets: n_b.
        ranks: The communicator.
        backend: "auto", "torch" or "triton", as for the vectors that were hashed.

    Collectives: one all-gather of (r, n_b) counts.
    """
    if choose_backend(buckets, backend) == "triton":
        shape = (buckets.shape[1], num_buckets)
        counts = torch.zeros(shape, dtype=torch.int64, device=buckets.device)
        for first in range(0, len(buckets), _COUNTED_AT_ONCE):
            part = buckets.T[:, first : first + _COUNTED_AT_ONCE].long()
            # Unlike a bincount this does not read its length from the device.
            counts.scatter_add_(1, part, torch.ones_like(part[:1, :1]).expand_as(part))
    else:
        columns = [torch.bincount(column, minlength=num_buckets) for column in buckets.T]
        counts = torch.stack(columns)
    if ranks.group is None:
        return Histogram(counts, torch.zeros_like(counts))
    by_rank = ranks.all_gather(counts)
    return Histogram(by_rank.sum(0), by_rank[: ranks.rank].sum(0))


def item_chunks(
    buckets: Tensor, items: Histogram, num_chunks: int, num_items: int, backend: str = "auto"
) -> Tensor:
    """(R, r) chunk of every row in each round: rows sorted by (bucket, index), cut into n_c parts.

    The dtype is ``index_dtype(num_chunks)``.

    Args:
        buckets: (R, r) integers.
        items: Histogram of the rows of all ranks.
        num_chunks: n_c.
        num_items: V.
        backend: "auto", "torch" or "triton", as for the vectors that were hashed.
    """
    starts = items.total.cumsum(1) - items.total
    chunks = torch.empty(buckets.shape, dtype=index_dtype(num_chunks), device=buckets.device)
    if choose_backend(buckets, backend) == "triton":
        from shardrec.kernels.hash_chunks import gpu

        where = gpu.Places(items.before, starts, None, None, num_items)
        gpu.fill_chunks(buckets, where, num_chunks, chunks)
        return chunks
    starts += items.before
    for index in range(buckets.shape[1]):
        for part, places in _places(buckets[:, index], starts[index]):
            chunks[part, index] = places * num_chunks // num_items
    return chunks


def position_chunks(
    buckets: Tensor,
    positions: Histogram,
    items: Histogram,
    num_chunks: int,
    align: str,
    counts: tuple[int, int],
    backend: str = "auto",
) -> Tensor:
    """(n, r) int32 chunk of every position in each round, in the chunk numbers of the items.

    With ``align="bucket"`` the k-th of P positions of a bucket gets the place of item k I / P of
    the I items of that bucket; with ``"rank"`` positions are cut by their own order, as published.

    Args:
        buckets: (n, r) integers.
        positions: Histogram of the positions of all ranks.
        items: Histogram of the rows of all ranks.
        num_chunks: n_c.
        align: "bucket" or "rank".
        counts: N and V, over all ranks.
        backend: "auto", "torch" or "triton", as for the vectors that were hashed.
    """
    if choose_backend(buckets, backend) == "triton":
        from shardrec.kernels.hash_chunks import gpu

        of = items if align == "bucket" else positions
        starts = of.total.cumsum(1) - of.total
        where = gpu.Places(positions.before, starts, None, None, counts[0])
        if align == "bucket":
            where = gpu.Places(positions.before, starts, of.total, positions.total, counts[1])
        chunks = torch.empty(buckets.shape, dtype=torch.int32, device=buckets.device)
        gpu.fill_chunks(buckets, where, num_chunks, chunks)
        return chunks
    index = buckets.long()
    within = torch.empty_like(index)
    for column in range(buckets.shape[1]):
        for part, places in _places(buckets[:, column], positions.before[column]):
            within[part, column] = places
    own = positions.total.T.gather(0, index)
    if align == "rank":
        starts = (positions.total.cumsum(1) - positions.total).T.gather(0, index)
        return ((starts + within) * num_chunks // max(1, counts[0])).int()
    starts = (items.total.cumsum(1) - items.total).T.gather(0, index)
    place = starts + within * items.total.T.gather(0, index) // own
    return (place * num_chunks // max(1, counts[1])).clamp_(max=num_chunks - 1).int()


def _places(keys: Tensor, starts: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Place of each vector in a stable sort by key, some vectors at a time.

    Args:
        keys: (n,) integers in [0, len(starts)).
        starts: (m,) int64 place of the first vector of each key.

    >>> [places.tolist() for _, places in _places(torch.tensor([1, 0, 1]), torch.tensor([0, 5]))]
    [[5, 0, 6]]
    """
    filled = starts.clone()
    for first in range(0, keys.numel(), _KEYS_AT_ONCE):
        part = keys[first : first + _KEYS_AT_ONCE]
        in_order, order = part.sort(stable=True)
        counts = torch.bincount(part, minlength=starts.numel())
        shift = filled - (counts.cumsum(0) - counts)
        places = torch.empty_like(order)
        places[order] = torch.arange(part.numel(), device=keys.device) + shift[in_order.long()]
        filled += counts
        yield slice(first, first + part.numel()), places
