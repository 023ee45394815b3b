"""Log-sum-exps of a batch over a table, chunk of positions by chunk of positions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.block_logsumexp import Blocks, NearbyChunks, RowIds
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.ranks.chunks import Chunk, Exchange, Gradients, Wait, prefetched

__all__ = ["Plan", "streamed_gradients", "streamed_logsumexp"]


class Plan(ABC):
    """Which candidates each position has; the same on every rank, from what all ranks share.

    A slot is one log-sum-exp. Slots have global numbers in the order of positions. Here a slot is a
    position.

    Attributes:
        exchange: The way to the other ranks.
        num_slots: Slots of this rank.
        slot_positions: (num_slots,) int64 local position of each slot; None where they are one.
        per_position: (N, ...) tensors of this rank's positions; ``blocks`` gets those of a chunk.
    """

    def __init__(self, problem: Problem) -> None:
        """Takes a slot for every position of a problem."""
        self.exchange = problem.exchange
        self.num_slots = problem.states.shape[0]
        self.slot_positions: Tensor | None = None
        self.per_position: Sequence[Tensor] = ()

    def chunk_of(self) -> Tensor:
        """(num_positions,) int64 chunk of each global position."""
        return self.exchange.even_chunks(self.exchange.min_chunks)

    def slots(self, chunk: Chunk) -> Chunk:
        """The slots of the chunk's positions, as a chunk of slots."""
        return chunk

    @abstractmethod
    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks | NearbyChunks:
        """Blocks in terms of the chunk's positions; slot s is the s-th of ``slots``."""

    def correction(self) -> Tensor | None:
        """(num_slots,) float32 to subtract from the log-sum-exps; None: nothing."""
        return None


def streamed_logsumexp(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all shards of each slot of this rank, and the logit of each target.

    The workspace is two chunks of states, independent of the number of ranks: the states of a chunk
    travel while the one before is worked on.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32. No gradient:
        ``streamed_gradients`` takes it.

    Collectives: per chunk a gather of states and targets, a maximum and a sum of slots.
    """
    exchange, states, rows = problem.exchange, problem.states, problem.scaled_rows()
    logsumexp = states.new_full((plan.num_slots,), -torch.inf, dtype=torch.float32)
    target_logits = states.new_zeros(states.shape[0], dtype=torch.float32)
    for chunk, (chunk_states, targets, *rest) in _chunks(problem, plan):
        blocks = plan.blocks(chunk, targets, problem.row_ids, rest)
        shard = block_logsumexp.forward(chunk_states, rows, blocks, problem.backend)
        chunk_logsumexp, chunk_target_logits = _combine_shards(*shard, exchange)
        slots = plan.slots(chunk)
        logsumexp[slots.own] = chunk_logsumexp[slots.own_slice]
        target_logits[chunk.own] = chunk_target_logits[chunk.own_slice]
    return logsumexp, target_logits


def streamed_gradients(
    problem: Problem,
    plan: Plan,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, D) and (R, D) float32 gradients of ``problem.states`` and ``problem.scaled_rows()``.

    The gradients of a chunk travel while the next one is worked on.

    Args:
        problem: The batch and the table of the forward pass.
        plan: Its plan, or one that lists the same candidates.
        logsumexp: (num_slots,) float32 of the forward pass.
        grad_logsumexp: (num_slots,) float32.
        grad_target_logits: (N,) float32.

    Collectives: per chunk a gather of states, targets and the gradients of slots and targets, and a
    reduce-scatter of state gradients.
    """
    states, rows = problem.states, problem.scaled_rows()
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
    of_slots = torch.stack([shift, grad_logsumexp], dim=1)
    total = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    grad_states = Gradients(problem.exchange, total)
    grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    chunks = _chunks(problem, plan, (of_slots, grad_target_logits))
    for chunk, (chunk_states, targets, columns, of_targets, *rest) in chunks:
        part = block_logsumexp.backward(
            chunk_states,
            rows,
            plan.blocks(chunk, targets, problem.row_ids, rest),
            columns[:, 0].contiguous(),
            columns[:, 1].contiguous(),
            of_targets,
            grad_rows,
            problem.backend,
        )
        grad_states.send(part, chunk)
    return grad_states.finish(), grad_rows


def _chunks(
    problem: Problem, plan: Plan, grads: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with its states, targets and, in backward, its columns of slots and of targets.

    Behind those stand the tensors that the plan wants.
    """
    exchange = problem.exchange

    def start(chunk: Chunk) -> list[Wait]:
        waits = [exchange.start_gather(one, chunk) for one in (problem.states, problem.targets)]
        if grads is not None:
            of_slots, of_targets = grads
            waits.append(exchange.start_gather(of_slots, plan.slots(chunk)))
            waits.append(exchange.start_gather(of_targets, chunk))
        return [*waits, *(exchange.start_gather(one, chunk) for one in plan.per_position)]

    # All chunks are made first, so that no step of the loop waits for a device to count them.
    return prefetched(list(exchange.chunks(plan.chunk_of())), start)


def _combine_shards(
    logsumexp: Tensor, target_logits: Tensor, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and target logits over all shards, of the shares of each.

    Collectives: a maximum, and one sum over both.
    """
    largest = exchange.max(logsumexp)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = exchange.sum(torch.cat([(logsumexp - shift).exp_(), target_logits]))
    num_slots = logsumexp.numel()
    return sums[:num_slots].log() + shift, sums[num_slots:]
