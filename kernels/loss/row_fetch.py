"""Fetch the rows in use instead of sending the states to all shards, if that is fewer bytes.

The phases: ``RowFetch.of`` derives which rank fetches which rows, the same plan on every rank
without communication; ``fetch_rows`` brings them in forward; ``with_fetched_rows`` makes each
rank's positions a problem of a single process; ``return_gradients`` sends row gradients back to
their owners in backward.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.ranks.chunks import Chunk, Layout
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.ranks.traffic import Workload, row_traffic, sends_fewer_bytes, state_traffic

__all__ = ["RowFetch", "fetch_rows", "return_gradients", "with_fetched_rows"]


@dataclass(frozen=True, slots=True)
class RowFetch:
    """The plan of which rows each rank fetches, derived on every rank from the same global data.

    Every rank fetches the M shared rows, and T more rows that only its own targets need.

    Attributes:
        shared: (M,) int64 ascending items.
        fetched: (T,) int64 ascending items of this rank, none of them shared.
        wanted: (S,) int64 items of this shard that ranks fetch for their targets, in rank order.
        sent_counts: For each rank, how many items of ``wanted`` it fetches.
        received_counts: For each rank, how many items of ``fetched`` it holds.
        num_fetched: The sum of T over all ranks.
    """

    shared: Tensor
    fetched: Tensor
    wanted: Tensor
    sent_counts: list[int]
    received_counts: list[int]
    num_fetched: int

    @classmethod
    def of(cls, shared: Tensor, all_targets: Tensor, layout: Layout) -> "RowFetch":
        """The plan for the targets of all ranks.

        Args:
            shared: (M,) int64 ascending items that every rank needs.
            all_targets: (num_positions,) int64 targets of all ranks.
            layout: The ranges of positions and rows of the ranks.
        """
        num_items, rank = layout.row_borders[-1], layout.ranks.rank
        limits = torch.tensor(layout.borders, device=shared.device)
        ranks = torch.arange(limits.numel() - 1, device=shared.device)
        owner = ranks.repeat_interleave(limits.diff())
        left = RowIds(0, shared.numel(), shared).find(all_targets) < 0
        # A rank fetches an item once, even if it is the target of several of its positions.
        keys = torch.unique(owner[left] * num_items + all_targets[left])
        fetching, items = keys // num_items, keys % num_items
        fetched = items[fetching == rank]
        first, end = layout.row_borders[rank : rank + 2]
        held = (items >= first) & (items < end)
        counts = torch.bincount(fetching[held], minlength=ranks.numel())
        return cls(
            shared=shared,
            fetched=fetched,
            wanted=items[held],
            sent_counts=counts.tolist(),
            received_counts=list(Chunk.of(fetched, layout.row_borders, rank).counts),
            num_fetched=keys.numel(),
        )

    def sends_fewer_bytes(self, inputs: Inputs) -> bool:
        """Whether fetching rows sends fewer bytes than sending states; the same on every rank."""
        work = Workload(
            num_positions=inputs.layout.num_positions,
            num_items=inputs.num_items,
            num_ranks=inputs.ranks.size,
            width=inputs.states.shape[1],
            element_bytes=inputs.states.element_size(),
            is_cast=inputs.states.dtype != inputs.rows.dtype,
        )
        rows = row_traffic(work, self.shared.numel(), self.num_fetched / inputs.ranks.size)
        return sends_fewer_bytes(rows, state_traffic(work))

    @property
    def leaving(self) -> Tensor:
        """Items to send to any rank: all shared items, and the wanted items of this shard."""
        return torch.cat([self.shared, self.wanted])

    def pack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The plan as tensors: three lists of items, and (2, W) int64 counts on the CPU."""
        counts = torch.tensor([self.sent_counts, self.received_counts])
        return self.shared, self.fetched, self.wanted, counts

    @classmethod
    def unpack(cls, shared: Tensor, fetched: Tensor, wanted: Tensor, counts: Tensor) -> "RowFetch":
        """The plan from the tensors of ``pack``; ``num_fetched`` is 0."""
        sent_counts, received_counts = counts.tolist()
        return cls(shared, fetched, wanted, sent_counts, received_counts, num_fetched=0)


def fetch_rows(inputs: Inputs, plan: RowFetch) -> Tensor:
    """(M + T, D) rows that this rank's positions need, sorted by item.

    Args:
        inputs: The inputs restricted to the rows of this shard that any rank fetches.
        plan: Which rows are fetched.

    Collectives: an all-gather of the shared rows and an all-to-all of the others.
    """
    chunk = _shared_chunk(inputs, plan)
    sent = inputs.rows[inputs.row_ids.find(plan.wanted)]
    shared = inputs.ranks.start_all_gather_rows(inputs.rows[chunk.own], chunk.counts)
    fetched = inputs.ranks.all_to_all(sent, plan.sent_counts, plan.received_counts)
    return torch.cat([shared(), fetched])[_order(plan)]


def with_fetched_rows(inputs: Inputs, plan: RowFetch, rows: Tensor) -> Inputs:
    """Inputs of a single process: this rank's positions and the (M + T, D) fetched rows."""
    items = torch.cat([plan.shared, plan.fetched])[_order(plan)]
    counts = [inputs.states.shape[0]], [items.numel()]
    return replace(
        inputs,
        rows=rows,
        row_ids=RowIds(first=0, count=items.numel(), sparse=items),
        layout=Layout(Communicator(None), *counts, items.device),
    )


def return_gradients(inputs: Inputs, plan: RowFetch, grad: Tensor) -> Tensor:
    """(U, D) float32 gradient of this shard's fetched rows, summed over the ranks.

    Args:
        inputs: The inputs restricted to those U rows.
        plan: Which rows were fetched.
        grad: (M + T, D) float32 gradient of the rows that this rank fetched.

    Collectives: a reduce-scatter of the shared rows and an all-to-all of the others.
    """
    chunk, ranks = _shared_chunk(inputs, plan), inputs.ranks
    unsorted = torch.empty_like(grad)
    unsorted[_order(plan)] = grad
    parts = unsorted.split([plan.shared.numel(), plan.fetched.numel()])
    summed = ranks.start_reduce_scatter(parts[0], chunk.counts)
    returned = ranks.all_to_all(parts[1], plan.received_counts, plan.sent_counts)
    total = torch.zeros(inputs.rows.shape, dtype=torch.float32, device=grad.device)
    total[chunk.own] = summed()
    # One addition per rank, each without repeated rows, so that the order of sums is fixed.
    rows = inputs.row_ids.find(plan.wanted).split(plan.sent_counts)
    for lines, part in zip(rows, returned.split(plan.sent_counts), strict=True):
        total[lines] += part
    return total


def _order(plan: RowFetch) -> Tensor:
    return torch.cat([plan.shared, plan.fetched]).argsort()


def _shared_chunk(inputs: Inputs, plan: RowFetch) -> Chunk:
    """The shared rows as a ``Chunk``; its ``own`` are indices into ``inputs.rows``."""
    layout = inputs.layout
    chunk = Chunk.of(plan.shared, layout.row_borders, layout.ranks.rank)
    return replace(chunk, own=inputs.row_ids.find(plan.shared[chunk.own_slice]))
