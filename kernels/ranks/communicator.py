"""The exchange between the ranks of a process group."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from shardrec.kernels.cost.workload import num_chunks
from shardrec.kernels.ranks.chunks import Chunk, Wait, chunk_members

__all__ = ["Collective", "find_group", "total_over_ranks"]

# Newer releases of torch call these by other names and warn about the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Collective:
    """Exchange over a process group; each rank's positions are one range of the global batch."""

    def __init__(
        self, group: dist.ProcessGroup, layout: Tensor, device: torch.device, state_bytes: int
    ) -> None:
        """Stores how positions and rows lie on the ranks.

        Args:
            group: Ranks that hold the shards.
            layout: (W, 2) int64 on the CPU, positions and rows of each rank.
            device: Where the tensors are.
            state_bytes: Bytes of one state; decides in how many chunks the states travel.
        """
        self._group = group
        self._device = device
        self.layout: Tensor | None = layout
        self.rank = dist.get_rank(group)
        self._counts, rows = layout.T.tolist()
        self.borders: Sequence[int] = (0, *accumulate(self._counts))
        self.row_borders: Sequence[int] = (0, *accumulate(rows))
        self.first_position = self.borders[self.rank]
        self.num_positions = self.borders[-1]
        self.largest_shard = max(rows)
        self.min_chunks = num_chunks(self.num_positions, state_bytes, listed=True)
        self.full_chunks = num_chunks(self.num_positions, state_bytes, listed=False)

    @classmethod
    def meet(
        cls,
        group: dist.ProcessGroup,
        num_positions: int,
        held: range,
        num_items: int,
        device: torch.device,
        *,
        state_bytes: int = 0,
        failed: bool = False,
    ) -> "Collective":
        """The exchange, once every rank has said what it holds and that it accepts its inputs.

        Args:
            group: Ranks that hold the shards.
            num_positions: N of this rank.
            held: Rows of the table on this rank.
            num_items: V.
            device: Where the tensors are.
            state_bytes: Bytes of one state; decides in how many chunks the states travel.
            failed: Whether this rank refuses its inputs.

        Raises:
            ValueError: on every rank, where any rank refuses, or the shards are not the table.

        Collectives: one gather of five numbers.
        """
        own = [num_positions, len(held), held.start, num_items, int(failed)]
        facts = _start_stack(torch.tensor(own, device=device), group)().cpu()
        refusing = facts[:, 4].nonzero()[:, 0].tolist()
        if refusing:
            raise ValueError(
                f"inputs must be valid on every rank, got a refusal on rank {refusing[0]} of "
                f"{len(facts)}; its own message says why"
            )
        _require_whole_table(*facts[:, 1:4].T)
        return cls(group, facts[:, :2].clone(), device, state_bytes)

    def even_chunks(self, num_chunks: int) -> Tensor:
        """(num_positions,) int64 chunk of each global position, an even share of every rank."""
        parts = [
            torch.arange(count, device=self._device) * num_chunks // max(count, 1)
            for count in self._counts
        ]
        return torch.cat(parts)

    def chunks(self, chunk_of: Tensor) -> Iterator[Chunk]:
        """The chunks of an assignment, in the same order on every rank."""
        for positions in chunk_members(chunk_of):
            yield Chunk.of(positions, self.borders, self.rank)

    def gather(self, local: Tensor, chunk: Chunk) -> Tensor:
        """(n, ...) values at the chunk's positions; one all-gather padded to the largest share."""
        return self.start_gather(local, chunk)()

    def start_gather(self, local: Tensor, chunk: Chunk) -> Wait:
        """Begins a ``gather`` on the group's own stream or thread."""
        width = max(chunk.counts)
        if not width:
            return lambda: local[:0]
        sent = local.new_zeros((width, *local.shape[1:]))
        sent[: chunk.own.numel()] = local[chunk.own]
        received = local.new_empty((len(chunk.counts), *sent.shape))
        work = _all_gather(received.flatten(), sent.flatten(), group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            if min(chunk.counts) == width:
                return received.flatten(0, 1)
            return torch.cat([part[:n] for part, n in zip(received, chunk.counts, strict=True)])

        return wait

    def reduce_scatter(self, full: Tensor, chunk: Chunk) -> Tensor:
        """(n_own, D) sum over ranks at this rank's positions; one padded reduce-scatter."""
        return self.start_reduce_scatter(full, chunk)()

    def start_reduce_scatter(self, full: Tensor, chunk: Chunk) -> Wait:
        """Begins a ``reduce_scatter`` on the group's own stream or thread."""
        width = max(chunk.counts)
        if not width:
            return lambda: full
        padded = full.new_zeros((len(chunk.counts), width, *full.shape[1:]))
        for line, part in zip(padded, full.split(chunk.counts), strict=True):
            line[: part.shape[0]] = part
        received = torch.empty_like(padded[0])
        work = _reduce_scatter(received, padded.flatten(0, 1), group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return received[: chunk.own.numel()]

        return wait

    def swap(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Tensor:
        """(sum(received_counts), ...) lines of all ranks for this one; one all-to-all."""
        received = sent.new_empty((sum(received_counts), *sent.shape[1:]))
        dist.all_to_all_single(
            received, sent.contiguous(), received_counts, sent_counts, group=self._group
        )
        return received

    def gather_all(self, local: Tensor) -> Tensor:
        """(num_positions, ...) values at all positions; one padded all-gather."""
        chunk = next(self.chunks(self.even_chunks(1)), None)
        return local if chunk is None else self.gather(local, chunk)

    def stack(self, local: Tensor) -> Tensor:
        """(W, ...) tensors of all ranks, all of one shape; one all-gather."""
        return self.start_stack(local)()

    def start_stack(self, local: Tensor) -> Wait:
        """Begins a ``stack`` on the group's own stream or thread."""
        return _start_stack(local, self._group)

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks; one all-reduce, no gradient."""
        result = local.detach().clone()
        dist.all_reduce(result, group=self._group)
        return result

    def max(self, local: Tensor) -> Tensor:
        """Maximum over ranks; one all-reduce, no gradient."""
        result = local.detach().clone()
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self._group)
        return result

    def total(self, local: Tensor) -> Tensor:
        """Sum over ranks; backward hands the gradient on to this rank's term."""
        return total_over_ranks(local, self._group)


def find_group(name: str) -> dist.ProcessGroup:
    """The process group of this name: a graph can hold a word and not the group itself."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _start_stack(local: Tensor, group: dist.ProcessGroup) -> Wait:
    world_size = dist.get_world_size(group)
    sent = local.contiguous().flatten()
    received = local.new_empty((world_size * local.numel(),))
    work = _all_gather(received, sent, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return received.view(world_size, *local.shape)

    return wait


def total_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks of a tensor, with the gradient of the sum for this rank's term.

    Collectives: one all-reduce, none without a group.
    """
    return local if group is None else _TotalOverRanks.apply(local, group)


class _TotalOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        result = local.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _require_whole_table(num_rows: Tensor, first_rows: Tensor, num_items: Tensor) -> None:
    """Refuses shards that do not hold every row once, in the order of ranks; all (W,) int64."""
    starts = num_rows.cumsum(0) - num_rows
    misplaced = (first_rows != starts) & (num_rows > 0)
    if bool(misplaced.any()) or bool((num_items != num_rows.sum()).any()):
        held = zip(first_rows.tolist(), num_rows.tolist(), num_items.tolist(), strict=True)
        said = ", ".join(f"{first}:{first + count} of {total}" for first, count, total in held)
        raise ValueError(
            "shards must hold every row of the table once, in the order of ranks, got rows "
            f"{said}; check rows, first_row and num_rows of RowShard"
        )
