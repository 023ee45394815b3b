"""Rows that travel to the states, where these are more bytes than the rows that they need."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.cost.workload import Workload, cheaper, row_traffic, state_traffic
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.ranks.chunks import Alone, Chunk, Exchange

__all__ = ["RowTrip", "fetch_rows", "return_gradients", "with_fetched_rows"]


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

    @property
    def leaving(self) -> Tensor:
        """Items that some rank fetches; those of other shards among them."""
        return torch.cat([self.shared, self.wanted])

    def pack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The trip as tensors: items, and (2, W) int64 counts on the CPU."""
        counts = torch.tensor([self.sent_counts, self.received_counts])
        return self.shared, self.fetched, self.wanted, counts

    @classmethod
    def unpack(cls, shared: Tensor, fetched: Tensor, wanted: Tensor, counts: Tensor) -> "RowTrip":
        """The trip that was packed; how much all ranks fetch is forgotten."""
        sent_counts, received_counts = counts.tolist()
        return cls(shared, fetched, wanted, sent_counts, received_counts, num_fetched=0)


def fetch_rows(problem: Problem, trip: RowTrip) -> Tensor:
    """(M + T, D) rows that this rank's positions need, by ascending item.

    Args:
        problem: The problem over the rows of this shard that leave it.
        trip: Which rows travel.

    Collectives: a gather of the shared rows and an all-to-all of the others.
    """
    chunk = _shared_chunk(problem, trip)
    sent = problem.rows[problem.row_ids.find(trip.wanted)]
    shared = problem.exchange.start_gather(problem.rows, chunk)
    fetched = problem.exchange.swap(sent, trip.sent_counts, trip.received_counts)
    return torch.cat([shared(), fetched])[_order(trip)]


def with_fetched_rows(problem: Problem, trip: RowTrip, rows: Tensor) -> Problem:
    """The problem of this rank's positions alone, over rows that were fetched."""
    items = torch.cat([trip.shared, trip.fetched])[_order(trip)]
    return replace(
        problem,
        rows=rows,
        row_ids=RowIds(first=0, count=items.numel(), sparse=items),
        exchange=Alone(problem.states.shape[0], items.numel(), items.device),
    )


def return_gradients(problem: Problem, trip: RowTrip, grad: Tensor) -> Tensor:
    """(U, D) float32 gradient of the rows that left this shard, summed over the ranks.

    Args:
        problem: The problem over those rows.
        trip: Which rows travelled.
        grad: (M + T, D) float32 gradient of the rows that were fetched.

    Collectives: a reduce-scatter of the shared rows and an all-to-all of the others.
    """
    chunk, exchange = _shared_chunk(problem, trip), problem.exchange
    unsorted = torch.empty_like(grad)
    unsorted[_order(trip)] = grad
    parts = unsorted.split([trip.shared.numel(), trip.fetched.numel()])
    summed = exchange.start_reduce_scatter(parts[0], chunk)
    back = exchange.swap(parts[1], trip.received_counts, trip.sent_counts)
    total = torch.zeros(problem.rows.shape, dtype=torch.float32, device=grad.device)
    total[chunk.own] = summed()
    # Rank by rank, so that no two lines of an addition are the same row.
    rows = problem.row_ids.find(trip.wanted).split(trip.sent_counts)
    for lines, part in zip(rows, back.split(trip.sent_counts), strict=True):
        total[lines] += part
    return total


def _order(trip: RowTrip) -> Tensor:
    return torch.cat([trip.shared, trip.fetched]).argsort()


def _shared_chunk(problem: Problem, trip: RowTrip) -> Chunk:
    """The shared rows as a chunk, of which this rank's own are told as rows of the problem."""
    exchange = problem.exchange
    chunk = Chunk.of(trip.shared, exchange.row_borders, exchange.rank)
    return replace(chunk, own=problem.row_ids.find(trip.shared[chunk.own_slice]))
