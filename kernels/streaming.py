"""Log-sum-exps of a batch over a table, chunk of positions by chunk of positions."""

from typing import Any, Protocol

import torch
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.block_logsumexp import Blocks, RowIds
from shardrec.kernels.exchange import Chunk, Exchange
from shardrec.kernels.problem import Problem

__all__ = ["Plan", "combine_shards", "streamed_logsumexp"]


class Plan(Protocol):
    """Which candidates each position has; the same on every rank, from what all ranks share.

    A slot is one log-sum-exp. Slots have global numbers in the order of positions.

    Attributes:
        first_slot: Global number of this rank's first slot.
        num_slots: Slots of this rank.
    """

    first_slot: int
    num_slots: int

    def chunk_of(self) -> Tensor:
        """(num_positions,) int64 chunk of each global position."""
        ...

    def blocks(self, chunk: Chunk, targets: Tensor, row_ids: RowIds) -> tuple[Blocks, Tensor]:
        """Blocks in terms of the chunk's positions, and the global number of each slot."""
        ...


def streamed_logsumexp(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all shards of each slot of this rank, and the logit of each target.

    The workspace is a chunk of states, independent of the number of ranks.

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
        for chunk in exchange.chunks(plan.chunk_of()):
            targets = exchange.gather(problem.targets, chunk)
            blocks, slots = plan.blocks(chunk, targets, problem.row_ids)
            shard = block_logsumexp.forward(
                exchange.gather(states, chunk), rows, blocks, problem.backend
            )
            chunk_logsumexp, chunk_target_logits = combine_shards(*shard, exchange)
            own, local = _own_slots(slots, plan)
            logsumexp[local] = chunk_logsumexp[own]
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
        exchange = problem.exchange
        grad_states = torch.zeros_like(states)
        grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for chunk in exchange.chunks(plan.chunk_of()):
            targets = exchange.gather(problem.targets, chunk)
            blocks, slots = plan.blocks(chunk, targets, problem.row_ids)
            own, local = _own_slots(slots, plan)
            columns = torch.zeros((2, slots.numel()), device=states.device)
            columns[0, own] = logsumexp[local].masked_fill(logsumexp[local] == -torch.inf, 0.0)
            columns[1, own] = grad_logsumexp[local]
            columns = exchange.sum(columns)
            part = block_logsumexp.backward(
                exchange.gather(states, chunk),
                rows,
                blocks,
                columns[0],
                columns[1],
                exchange.gather(grad_target_logits, chunk),
                grad_rows,
                problem.backend,
            )
            grad_states[chunk.own] = exchange.reduce_scatter(part, chunk).to(states.dtype)
        return grad_states, grad_rows.to(rows.dtype), None, None


def _own_slots(slots: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Where this rank's slots stand in a chunk, and their local numbers."""
    own = ((slots >= plan.first_slot) & (slots < plan.first_slot + plan.num_slots)).nonzero()[:, 0]
    return own, slots[own] - plan.first_slot


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
