"""Rows that travel to the states, where these are more bytes than the rows that they need."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.cost import Workload, cheaper, row_traffic, state_traffic
from shardrec.kernels.exchange import Alone, Chunk, Exchange
from shardrec.kernels.problem import Problem

__all__ = ["RowTrip", "with_fetched_rows"]


@dataclass(frozen=True, slots=True)
class RowTrip:
    """Which rows go where, counted on every rank from what all ranks know.

    Every rank gets the M shared rows, and T more that its own targets need.

    Attributes:
        shared: (M,) int64 ascending items.
        fetched: (T,) int64 ascending items of this rank, none of them shared.
        wanted: (S,) int64 items of this shard that leave it besides, by the rank that fetches them.
        sent_counts: Items of ``wanted`` for each rank.
        received_counts: Items of ``fetched`` from each rank.
        num_fetched: T of all ranks together.
    """

    shared: Tensor
    fetched: Tensor
    wanted: Tensor
    sent_counts: list[int]
    received_counts: list[int]
    num_fetched: int

    @classmethod
    def of(cls, shared: Tensor, all_targets: Tensor, exchange: Exchange) -> "RowTrip":
        """The trip for given targets.

        Args:
            shared: (M,) int64 ascending items that every rank needs.
            all_targets: (num_positions,) int64 targets of all ranks.
            exchange: The ranges of positions and rows of the ranks.
        """
        num_items, rank = exchange.row_borders[-1], exchange.rank
        limits = torch.tensor(exchange.borders, device=shared.device)
        ranks = torch.arange(limits.numel() - 1, device=shared.device)
        owner = ranks.repeat_interleave(limits.diff())
        left = RowIds(0, shared.numel(), shared).find(all_targets) < 0
        # A rank asks once for an item that several of its positions have as target.
        keys = torch.unique(owner[left] * num_items + all_targets[left])
        asking, items = keys // num_items, keys % num_items
        fetched = items[asking == rank]
        first, end = exchange.row_borders[rank : rank + 2]
        here = (items >= first) & (items < end)
        counts = torch.bincount(asking[here], minlength=ranks.numel())
        return cls(
            shared=shared,
            fetched=fetched,
            wanted=items[here],
            sent_counts=counts.tolist(),
            received_counts=list(Chunk.of(fetched, exchange.row_borders, rank).counts),
            num_fetched=keys.numel(),
        )

    def is_cheaper(self, problem: Problem) -> bool:
        """Whether fewer bytes travel than if the states did; the same answer on every rank."""
        exchange = problem.exchange
        num_ranks = len(exchange.borders) - 1
        work = Workload(
            num_positions=exchange.num_positions,
            num_items=problem.num_items,
            num_ranks=num_ranks,
            width=problem.states.shape[1],
            element_bytes=problem.states.element_size(),
        )
        rows = row_traffic(work, self.shared.numel(), self.num_fetched / num_ranks)
        return cheaper(rows, state_traffic(work))


def with_fetched_rows(problem: Problem, trip: RowTrip, sparse: bool) -> Problem:
    """The problem of this rank's positions alone, with the rows that they need beside them.

    Gradients of rows go back to the shards that own them.

    Args:
        problem: The problem of all ranks.
        trip: Which rows travel.
        sparse: Whether the table gets a sparse gradient.

    Collectives: a gather of the shared rows and an all-to-all of the others; in backward the same
    of their gradients.
    """
    exchange = problem.exchange
    used = problem.restrict(torch.cat([trip.shared, trip.wanted]), sparse)
    chunk = Chunk.of(trip.shared, exchange.row_borders, exchange.rank)
    way = _Way(
        exchange=exchange,
        shared=replace(chunk, own=used.row_ids.find(trip.shared[chunk.own_slice])),
        sent=used.row_ids.find(trip.wanted),
        sent_counts=trip.sent_counts,
        received_counts=trip.received_counts,
    )
    items, order = torch.cat([trip.shared, trip.fetched]).sort()
    rows = _FetchedRows.apply(used.rows, way)[order]
    return replace(
        problem,
        rows=rows,
        row_ids=RowIds(first=0, count=items.numel(), sparse=items),
        exchange=Alone(problem.states.shape[0], items.numel(), items.device),
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """A trip in terms of the rows of this shard that leave it."""

    exchange: Exchange
    shared: Chunk
    sent: Tensor
    sent_counts: list[int]
    received_counts: list[int]


class _FetchedRows(torch.autograd.Function):
    """(M + T, D) shared and fetched rows. One function: collectives in one order in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way, ctx.shape = way, rows.shape
        shared = way.exchange.start_gather(rows, way.shared)
        fetched = way.exchange.swap(rows[way.sent], way.sent_counts, way.received_counts)
        return torch.cat([shared(), fetched])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        way: _Way = ctx.way
        num_shared = way.shared.positions.numel()
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        summed = way.exchange.start_reduce_scatter(grad[:num_shared].float(), way.shared)
        back = way.exchange.swap(grad[num_shared:].float(), way.received_counts, way.sent_counts)
        total[way.shared.own] = summed()
        # Rank by rank, so that no two lines of an addition are the same row.
        for rows, part in zip(
            way.sent.split(way.sent_counts), back.split(way.sent_counts), strict=True
        ):
            total[rows] += part
        return total.to(grad.dtype), None
