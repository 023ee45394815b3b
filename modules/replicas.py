"""Copies of a sharded table, and the exact sum of their gradients.

With R copies of S shards, rank r * S + s holds shard s of copy r. Each copy works on its own
micro-batches of a step; before the update their gradients are summed, on every rank that holds the
row, to the same bits. So equal copies stay equal: the optimizer sees the same numbers on each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.row_updates import merged_pairs, sparse_gradient

__all__ = ["Replicas"]


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which ranks hold the same rows, and which hold any.

    Attributes:
        group: the ranks that hold the rows of this rank, one of each copy.
        all_ranks: of all copies.
    """

    group: dist.ProcessGroup
    all_ranks: dist.ProcessGroup

    @property
    def index(self) -> int:
        """Number of the copy that this rank belongs to, from 0."""
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """Number of copies."""
        return dist.get_world_size(self.group)

    def part(self, num_rows: int) -> slice:
        """This copy's part of the ``num_rows`` rows that its ranks have in common."""
        return slice(*(num_rows * one // self.count for one in (self.index, self.index + 1)))

    @torch.no_grad()
    def sum_gradients(self, gradient: Tensor | None, rows: Tensor) -> Tensor | None:
        """The sum of a gradient over the copies, bit by bit the same on all of them.

        Args:
            gradient: of this copy: None, dense (R, D) or coalesced COO, whatever the others have.
                A dense one is overwritten.
            rows: (R, D), of which it is the gradient.

        Returns:
            None if no copy has one, dense if a copy's is dense, else coalesced COO.

        Collectives: an all-gather of two numbers; then, of dense gradients, an all-reduce, and of
        sparse ones an all-gather each of rows and of values, or, where that is fewer bytes, an
        all-reduce each of (R,) and of (R, D) numbers.
        """
        if not rows.shape[0]:
            return gradient
        ranks, is_dense = Communicator(self.group), gradient is not None and not gradient.is_sparse
        number = 0 if gradient is None or is_dense else gradient.values().shape[0]
        told = torch.tensor([int(is_dense), number], device=rows.device)
        dense, *counts = ranks.all_gather(told).T.tolist()
        if any(dense):
            full = _dense(gradient, rows)
            ranks.sum_(full)
            return full
        if not any(counts[0]):
            return None
        if _gathering_is_less(counts[0], *rows.shape):
            return _gathered(ranks, counts[0], gradient, rows)
        return _reduced(ranks, gradient, rows)

    @torch.no_grad()
    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """Check that 32-bit ``tensors`` are bit by bit the same on all copies, by a checksum.

        Raises:
            RuntimeError: they differ somewhere; raised on all ranks.

        Collectives: an all-gather and an all-reduce of one number.
        """
        sums = [one.view(torch.int32).sum(dtype=torch.int64) for one in tensors]
        found = Communicator(self.group).all_gather(torch.stack(sums).sum())
        differ = (found != found[0]).any().long()
        Communicator(self.all_ranks).sum_(differ)
        if differ:
            raise RuntimeError(
                f"the {self.count} replicas of the table must hold the same bits, got different "
                "ones; their machines or libraries compute differently: use parallel.shards=0, and "
                "resume from the last checkpoint"
            )


def _dense(gradient: Tensor | None, rows: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(rows)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _gathering_is_less(counts: list[int], num_rows: int, width: int) -> bool:
    """Whether (row, gradient) pairs are fewer bytes than an all-reduce of the whole shard.

    >>> [_gathering_is_less([n, n], 1000, 64) for n in (500, 1000)]
    [True, False]
    """
    others = len(counts) - 1
    gathered = others * max(counts) * (8 + 4 * width)
    return gathered < 2 * others / len(counts) * num_rows * (4 + 4 * width)


def _gathered(
    ranks: Communicator, counts: list[int], gradient: Tensor | None, rows: Tensor
) -> Tensor:
    """The sum of sparse gradients in the order of the copies, from all their pairs."""
    if gradient is None:
        own, values = torch.empty(0, dtype=torch.int64, device=rows.device), rows[:0].detach()
    else:
        own, values = gradient.indices()[0], gradient.values()
    waiting = [ranks.start_all_gather_rows(part, counts) for part in (own, values)]
    all_rows, all_values = (wait().split(counts) for wait in waiting)
    return merged_pairs(list(zip(all_rows, all_values, strict=True)), rows)


def _reduced(ranks: Communicator, gradient: Tensor | None, rows: Tensor) -> Tensor:
    """The sum of sparse gradients through dense ones; rows in none of them stay out."""
    full, there = _dense(gradient, rows), torch.zeros(rows.shape[0], device=rows.device)
    if gradient is not None:
        there[gradient.indices()[0]] = 1
    ranks.sum_(there)
    ranks.sum_(full)
    found = there.nonzero()[:, 0]
    return sparse_gradient(found, full[found], rows.shape[0])
