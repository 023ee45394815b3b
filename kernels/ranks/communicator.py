"""Collectives over a process group, or none in a single process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

__all__ = ["Communicator", "Pending", "find_group"]

# Newer releases of torch call these by other names and warn about the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

Pending = Callable[[], Tensor]
"""Waits for a collective in flight and returns its result. Call each once, in the order started."""


class Communicator:
    """The collectives that the losses use; in a single process each returns its input.

    Methods named ``start_...`` return at once; the collective runs asynchronously on the stream or
    thread of the group. Only ``total`` is differentiable.

    Attributes:
        group: The process group, or None for a single process.
        rank: Index of this rank.
        size: W, the number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Looks up the size of ``group`` and the rank of this process in it."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def start_all_gather(self, local: Tensor) -> Pending:
        """Starts one all-gather; its result is (W, ...), the tensors of all ranks, of one shape."""
        if self.group is None:
            return lambda: local[None]
        received = local.new_empty((self.size * local.numel(),))
        sent = local.contiguous().flatten()
        work = _all_gather(received, sent, group=self.group, async_op=True)
        return _after(work, lambda: received.view(self.size, *local.shape))

    def all_gather(self, local: Tensor) -> Tensor:
        """(W, ...) tensors of all ranks, which have one shape; one all-gather."""
        return self.start_all_gather(local)()

    def start_all_gather_rows(self, local: Tensor, counts: Sequence[int]) -> Pending:
        """Starts one padded all-gather of ``counts[r]`` rows of each rank r: (sum(counts), ...)."""
        width = max(counts)
        if self.group is None or not width:
            return lambda: local
        gathered = self.start_all_gather(_padded(local, width))

        def wait() -> Tensor:
            received = gathered()
            if min(counts) == width:
                return received.flatten(0, 1)
            return torch.cat([part[:n] for part, n in zip(received, counts, strict=True)])

        return wait

    def start_reduce_scatter(self, full: Tensor, counts: Sequence[int]) -> Pending:
        """Starts one padded reduce-scatter: (counts[rank], ...), this rank's part of the sum."""
        width = max(counts)
        if self.group is None or not width:
            return lambda: full
        padded = full.new_zeros((self.size, width, *full.shape[1:]))
        for line, part in zip(padded, full.split(list(counts)), strict=True):
            line[: part.shape[0]] = part
        received = torch.empty_like(padded[0])
        work = _reduce_scatter(received, padded.flatten(0, 1), group=self.group, async_op=True)
        return _after(work, lambda: received[: counts[self.rank]])

    def all_to_all(
        self, sent: Tensor, sent_counts: Sequence[int], received_counts: Sequence[int]
    ) -> Tensor:
        """(sum(received_counts), ...) rows sent to this rank, in sender order; one all-to-all."""
        if self.group is None:
            return sent
        received = sent.new_empty((sum(received_counts), *sent.shape[1:]))
        dist.all_to_all_single(
            received, sent.contiguous(), list(received_counts), list(sent_counts), group=self.group
        )
        return received

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks, of the shape of ``local``, without gradient; one all-reduce."""
        return self._all_reduce(_constant(local), dist.ReduceOp.SUM)

    def sum_(self, values: Tensor) -> None:
        """Sum over ranks, in place; one all-reduce."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)

    def max(self, local: Tensor) -> Tensor:
        """Maximum over ranks, of the shape of ``local``, without gradient; one all-reduce."""
        return self._all_reduce(_constant(local), dist.ReduceOp.MAX)

    def total(self, local: Tensor) -> Tensor:
        """Differentiable sum over ranks; each rank's term gets the gradient of the sum."""
        return local if self.group is None else _Total.apply(local, self)

    def _all_reduce(self, local: Tensor, operation: Any) -> Tensor:
        if self.group is None:
            return local
        result = local.clone()
        dist.all_reduce(result, op=operation, group=self.group)
        return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Communicator) -> Tensor:
        return ranks.sum(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def find_group(name: str) -> dist.ProcessGroup:
    """The process group with this name; a traced graph can store the name but not the group."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _after(work: Any, result: Pending) -> Pending:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait


def _constant(values: Tensor) -> Tensor:
    return values.detach() if values.requires_grad else values


def _padded(rows: Tensor, length: int) -> Tensor:
    """(length, ...) the rows, padded with zeros at the end."""
    if rows.shape[0] == length:
        return rows
    padded = rows.new_zeros((length, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    return padded
