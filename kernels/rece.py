"""Reduced cross-entropy (RECE): candidates from neighbouring chunks of a random hash, over rounds.

Source: Gusak et al., "RECE: Reduced Cross-Entropy Loss for Large-Catalogue Sequential Recommenders",
arXiv 2408.02354. Positions are placed by bucket, not by rank, so that a position meets the items of its
own bucket although the histograms of positions and items differ.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, Rounds, block_logsumexp, local_rows
from shardrec.kernels.negatives import STREAM_HASH, random_signs
from shardrec.kernels.reduction import (
    candidate_loss,
    check_inputs,
    reduce_loss,
    scale_rows,
    scale_states,
)
from shardrec.kernels.select import best_direction

__all__ = [
    "Histogram",
    "RoundPlan",
    "check_options",
    "default_num_buckets",
    "hash_buckets",
    "histogram",
    "item_chunks",
    "position_chunks",
    "reduced_cross_entropy",
]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Vectors per bucket, over all ranks and over the ranks before this one.

    Attributes:
        total: (r, n_b) int64.
        before: (r, n_b) int64; zero with one process.
    """

    total: Tensor
    before: Tensor


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Chunk of every row of a shard in every round, from which blocks for any positions follow.

    Attributes:
        chunks: (R, r) int32 chunk of each row.
        num_chunks: n_c.
        reach: e; a position in chunk t meets items of chunks t - e .. t + e.
        first_row: Global index of the shard's first row.
    """

    chunks: Tensor
    num_chunks: int
    reach: int
    first_row: int

    def blocks(self, chunks: Tensor, targets: Tensor) -> Blocks:
        """Blocks of every round for positions with the given chunks.

        Args:
            chunks: (n, r) int32 chunk of each position in each round.
            targets: (n,) int64 global items.
        """
        num_rows, num_rounds = self.chunks.shape
        positions, pair_starts, items, starts, ends, rounds = [], [], [], [], [], []
        for index in range(num_rounds):
            order, first, sizes = _group(chunks[:, index])
            item_chunk, item_order = self.chunks[:, index].sort(stable=True)
            positions.append(order)
            pair_starts.append(sizes)
            items.append(item_order)
            lower, upper = first - self.reach, first + self.reach + 1
            starts.append(torch.searchsorted(item_chunk, lower) + index * num_rows)
            ends.append(torch.searchsorted(item_chunk, upper) + index * num_rows)
            rounds.append(torch.full_like(first, index, dtype=torch.int64))
        return Blocks(
            pair_positions=torch.cat(positions),
            pair_starts=F.pad(torch.cat(pair_starts).cumsum(0), (1, 0)),
            items=torch.cat(items),
            item_starts=torch.cat(starts),
            item_ends=torch.cat(ends),
            targets=local_rows(targets, self.first_row, num_rows),
            num_slots=targets.numel(),
            rounds=Rounds(chunks, self.chunks, self.reach, torch.cat(rounds)),
        )


def default_num_buckets(num_positions: int, num_items: int, reach: int) -> int:
    """``sqrt(4 min(N, V) (1 + 2 e))``: the paper's n_b with chunks as many as buckets, at least 1.

    >>> default_num_buckets(10000, 50000, 1)
    346
    """
    return max(1, round(math.sqrt(4 * min(num_positions, num_items) * (1 + 2 * reach))))


def hash_buckets(
    vectors: Tensor, num_buckets: int, num_rounds: int, *, seed: int, step: int
) -> Tensor:
    """(n, r) int32 bucket of every vector: the random sign vector of largest inner product."""
    buckets = torch.empty((vectors.shape[0], num_rounds), dtype=torch.int32, device=vectors.device)
    for index in range(num_rounds):
        directions = random_signs(
            0, num_buckets, vectors.shape[1], seed=seed, step=step, stream=STREAM_HASH + index
        )
        buckets[:, index] = best_direction(directions.to(vectors.device), vectors)
    return buckets


def histogram(buckets: Tensor, num_buckets: int) -> Tensor:
    """(r, n_b) int64 number of vectors in each bucket of each round."""
    rounds = torch.arange(buckets.shape[1], device=buckets.device)
    flat = (buckets.long() + rounds * num_buckets).flatten()
    counts = torch.bincount(flat, minlength=buckets.shape[1] * num_buckets)
    return counts.view(buckets.shape[1], num_buckets)


def item_chunks(buckets: Tensor, items: Histogram, num_chunks: int) -> Tensor:
    """(R, r) int32 chunk of every row: its place in the order by (bucket, index), cut into n_c parts.

    Args:
        buckets: (R, r) int32.
        items: Histogram of the rows of all ranks.
        num_chunks: n_c.
    """
    starts = items.total.cumsum(1) - items.total + items.before
    place = starts.T.gather(0, buckets.long()) + _within_bucket(buckets)
    return (place * num_chunks // items.total[0].sum()).int()


def position_chunks(
    buckets: Tensor, positions: Histogram, items: Histogram, num_chunks: int, align: str
) -> Tensor:
    """(n, r) int32 chunk of every position, in the coordinate of the items.

    With ``align="bucket"`` the k-th of P positions of a bucket stands where item k I / P of the I items
    of that bucket stands; with ``"rank"`` positions are cut by their own order, as published.

    Args:
        buckets: (n, r) int32.
        positions: Histogram of the positions of all ranks.
        items: Histogram of the rows of all ranks.
        num_chunks: n_c.
        align: "bucket" or "rank".
    """
    index = buckets.long()
    within = positions.before.T.gather(0, index) + _within_bucket(buckets)
    own = positions.total.T.gather(0, index)
    if align == "rank":
        starts = (positions.total.cumsum(1) - positions.total).T.gather(0, index)
        return ((starts + within) * num_chunks // positions.total[0].sum()).int()
    starts = (items.total.cumsum(1) - items.total).T.gather(0, index)
    place = starts + within * items.total.T.gather(0, index) // own
    return (place * num_chunks // items.total[0].sum()).clamp_(max=num_chunks - 1).int()


def reduced_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_buckets: int | None = None,
    num_chunks: int | None = None,
    num_rounds: int = 4,
    num_neighbor_chunks: int = 1,
    align: str = "bucket",
    seed: int,
    step: int = 0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy of every target among the rows that a random hash puts near its position.

    In each round positions and rows are ordered by the nearest of n_b random sign vectors and cut into
    n_c chunks; a position meets the rows of its chunk and of e chunks on either side. A row met in
    several rounds counts once.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype.
        targets: (N,) int64 in [0, V).
        num_buckets: n_b; ``sqrt(4 min(N, V) (1 + 2 e))`` when None.
        num_chunks: n_c; as many as buckets when None.
        num_rounds: r.
        num_neighbor_chunks: e.
        align: "bucket" places positions beside the items of their bucket, "rank" by order alone.
        seed: Key of the generator.
        step: Training step; another step draws other vectors.
        weights: (N,) float factors of the positions' losses; the mean divides by their sum.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Returns:
        () float32, or (N,) with "none". Gradients flow to ``states`` and ``table``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees, or a target or option is out of range.

    Collectives: none.
    """
    check_inputs(states, table, targets, weights, reduction, temperature)
    check_options(num_buckets, num_chunks, num_rounds, num_neighbor_chunks, align)
    if num_buckets is None:
        num_buckets = default_num_buckets(states.shape[0], table.shape[0], num_neighbor_chunks)
    num_chunks = num_buckets if num_chunks is None else num_chunks
    states, table = scale_states(states, normalize, temperature), scale_rows(table, normalize)
    with torch.no_grad():
        row_buckets = hash_buckets(table, num_buckets, num_rounds, seed=seed, step=step)
        own_buckets = hash_buckets(states, num_buckets, num_rounds, seed=seed, step=step)
        rows = _alone(histogram(row_buckets, num_buckets))
        own = _alone(histogram(own_buckets, num_buckets))
        plan = RoundPlan(
            item_chunks(row_buckets, rows, num_chunks), num_chunks, num_neighbor_chunks, 0
        )
        chunks = position_chunks(own_buckets, own, rows, num_chunks, align)
        blocks = plan.blocks(chunks, targets.long())
    logsumexp, target_logits = block_logsumexp(states, table, blocks)
    return reduce_loss(candidate_loss(logsumexp, target_logits), weights, reduction)


def check_options(
    num_buckets: int | None,
    num_chunks: int | None,
    num_rounds: int,
    num_neighbor_chunks: int,
    align: str,
) -> None:
    """Raises ValueError where an option of RECE is out of range."""
    numbers = (num_buckets or 1, num_chunks or 1, num_rounds, num_neighbor_chunks + 1)
    if min(numbers) < 1 or num_buckets == 0 or num_chunks == 0:
        raise ValueError(
            "num_buckets, num_chunks and num_rounds must be positive and num_neighbor_chunks not "
            f"negative, got {num_buckets}, {num_chunks}, {num_rounds} and {num_neighbor_chunks}; "
            "None takes the default"
        )
    if align not in ("bucket", "rank"):
        raise ValueError(f"align must be 'bucket' or 'rank', got {align!r}; choose one")


def _alone(total: Tensor) -> Histogram:
    return Histogram(total, torch.zeros_like(total))


def _group(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that sorts ``keys``, the distinct keys, and how often each stands."""
    order = torch.argsort(keys, stable=True)
    distinct, sizes = torch.unique_consecutive(keys[order], return_counts=True)
    return order, distinct, sizes


def _within_bucket(buckets: Tensor) -> Tensor:
    """(n, r) int64 number of earlier vectors in the same bucket of the same round."""
    within = torch.empty(buckets.shape, dtype=torch.int64, device=buckets.device)
    for index in range(buckets.shape[1]):
        order, _, sizes = _group(buckets[:, index])
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        places = torch.arange(buckets.shape[0], device=buckets.device) - starts
        within[order, index] = places
    return within
