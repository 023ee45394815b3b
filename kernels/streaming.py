"""Log-sum-exps of a batch over a table, chunk of positions by chunk of positions."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.block_logsumexp import Blocks, RowIds
from shardrec.kernels.exchange import Chunk, Exchange, Gradients, Wait, prefetched
from shardrec.kernels.problem import Problem

__all__ = ["Plan", "combine_shards", "streamed_logsumexp"]


class Plan(Protocol):
    """Which candidates each position has; the same on every rank, from what all ranks share.

    A slot is one log-sum-exp. Slots have global numbers in the order of positions.

    Attributes:
        num_slots: Slots of this rank.
        per_position: (N, ...) tensors of this rank's positions; ``blocks`` gets those of a chunk.
    """

    num_slots: int
    per_position: Sequence[Tensor]

    def chunk_of(self) -> Tensor:
        """(num_positions,) int64 chunk of each global position."""
        ...

    def slots(self, chunk: Chunk) -> Chunk:
        """The slots of the chunk's positions, as a chunk of slots."""
        ...

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        """Blocks in terms of the chunk's positions; slot s is the s-th of ``slots``."""
        ...


def streamed_logsumexp(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all shards of each slot of this rank, and the logit of each target.

    The workspace is two chunks of states, independent of the number of ranks: the states of a chunk
    travel while the one before is worked on, and its gradients while the next one is.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32. Gradients flow
        to ``problem.states`` of this rank and to ``problem.rows`` of this shard.

    Collectives: per chunk a gather of states and targets, a maximum and a sum of slots; backward a
    gather, a sum of slots and a reduce-scatter of state gradients.
    """
    return _StreamedLogsumexp.apply(problem.states, problem.scaled_rows(), problem, plan)


class _StreamedLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, rows: Tensor, problem: Problem, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        exchange = problem.exchange
        logsumexp = states.new_full((plan.num_slots,), -torch.inf, dtype=torch.float32)
        target_logits = states.new_zeros(states.shape[0], dtype=torch.float32)
        for chunk, (chunk_states, targets, *rest) in _chunks(problem, plan, states):
            blocks = plan.blocks(chunk, targets, problem.row_ids, rest)
            shard = block_logsumexp.forward(chunk_states, rows, blocks, problem.backend)
            chunk_logsumexp, chunk_target_logits = combine_shards(*shard, exchange)
            slots = plan.slots(chunk)
            logsumexp[slots.own] = chunk_logsumexp[slots.own_slice]
            target_logits[chunk.own] = chunk_target_logits[chunk.own_slice]
        ctx.save_for_backward(states, rows, logsumexp)
        ctx.problem, ctx.plan = problem, plan
        return logsumexp, target_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logsumexp: Tensor, grad_target_logits: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        states, rows, logsumexp = ctx.saved_tensors
        problem, plan = ctx.problem, ctx.plan
        shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        of_slots = torch.stack([shift, grad_logsumexp], dim=1)
        grad_states = Gradients(problem.exchange, torch.zeros_like(states))
        grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        chunks = _chunks(problem, plan, states, (of_slots, grad_target_logits))
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
        return grad_states.finish(), grad_rows.to(rows.dtype), None, None


def _chunks(
    problem: Problem, plan: Plan, states: Tensor, grads: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with its states, targets and, in backward, its columns of slots and of targets.

    Behind those stand the tensors that the plan wants.
    """
    exchange = problem.exchange

    def start(chunk: Chunk) -> list[Wait]:
        waits = [exchange.start_gather(one, chunk) for one in (states, problem.targets)]
        if grads is not None:
            of_slots, of_targets = grads
            waits.append(exchange.start_gather(of_slots, plan.slots(chunk)))
            waits.append(exchange.start_gather(of_targets, chunk))
        return [*waits, *(exchange.start_gather(one, chunk) for one in plan.per_position)]

    # All chunks are made first, so that no step of the loop waits for a device to count them.
    return prefetched(list(exchange.chunks(plan.chunk_of())), start)


def combine_shards(
    logsumexp: Tensor, target_logits: Tensor, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and target logits over all shards, of the shares of each.

    Collectives: a maximum, and one sum over both.
    """
    largest = exchange.max(logsumexp.clone())
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = exchange.sum(torch.cat([(logsumexp - shift).exp_(), target_logits]))
    num_slots = logsumexp.numel()
    return sums[:num_slots].log() + shift, sums[num_slots:]
