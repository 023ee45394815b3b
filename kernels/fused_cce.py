"""Full softmax with its gradient taken in the forward pass, for shards that fit in a cache.

With all logits of some positions in the cache at once their softmax is known at once, so that three
products do the work of four and every exponential is taken once: 6 N R D FLOP. Rows and their
gradient are read once for each group of positions. The gradient of the loss with respect to each
position's loss must be known beforehand: it is, for a mean or a sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp.cpu import softmax_
from shardrec.kernels.block_logsumexp.cpu_tiles import LEAST_FUSED, fused_positions
from shardrec.kernels.device.matmul import STEP, times_transposed
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.ranks.chunks import Chunk, Exchange, Gradients, Wait, prefetched

__all__ = ["fits_cache", "fused_cross_entropy"]


def fits_cache(states: Tensor, rows: Tensor, num_rows: int, num_ranks: int) -> bool:
    """Whether the fused pass serves: float32 on a CPU, 32,768 rows or fewer on a rank.

    Every rank must come to the same answer, so it looks at the average shard.

    Args:
        states: (N, D).
        rows: (R, D) of this rank.
        num_rows: V.
        num_ranks: W.
    """
    on_cpu = states.device.type == "cpu" and states.dtype == rows.dtype == torch.float32
    return on_cpu and fused_positions(-(-num_rows // num_ranks)) >= LEAST_FUSED


def fused_cross_entropy(
    problem: Problem, coefficients: Tensor, positions_at_once: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over this rank's positions of coefficient times loss, and its gradients.

    The workspace is one group of logits, at most 16 MiB twice, and two chunks of states: those of
    a chunk travel while the groups of the one before are worked on.

    Args:
        problem: The batch and the table.
        coefficients: (N,) float32.
        positions_at_once: Of a group; None goes by the rows.

    Returns:
        () float32, and (N, D) and (R, D) float32 gradients of ``problem.states`` and
        ``problem.scaled_rows()``.

    Collectives: per chunk of positions a gather of states, targets and coefficients and a
    reduce-scatter of state gradients, per group of a chunk a gather of two numbers a
    position, which travel beside a product.
    """
    states, rows, exchange = problem.states, problem.scaled_rows(), problem.exchange
    grad_states = Gradients(exchange, states.new_empty(states.shape))
    grad_rows = rows.new_zeros(rows.shape)
    total = torch.zeros((), device=states.device)
    group = positions_at_once or max(1, fused_positions(exchange.largest_shard))

    def start(chunk: Chunk) -> list[Wait]:
        local = states, problem.targets, coefficients
        return [exchange.start_gather(one, chunk) for one in local]

    chunks = list(exchange.chunks(exchange.even_chunks(exchange.full_chunks)))
    for chunk, (chunk_states, targets, weights) in prefetched(chunks, start):
        targets = problem.row_ids.find(targets)
        losses, part = torch.empty_like(weights), chunk_states.new_empty(chunk_states.shape)
        for first in range(0, targets.numel(), group):
            lines = slice(first, first + group)
            losses[lines] = _add_group(
                _Group(chunk_states[lines], targets[lines], weights[lines]),
                rows,
                exchange,
                part[lines],
                grad_rows,
            )
        total += (losses * weights)[chunk.own_slice].sum()
        grad_states.send(part, chunk)
    return total, grad_states.finish(), grad_rows


@dataclass(frozen=True, slots=True)
class _Group:
    """Positions whose logits are in the cache together: (n, D) states, (n,) rows and weights."""

    states: Tensor
    targets: Tensor
    weights: Tensor


def _add_group(
    group: _Group,
    rows: Tensor,
    exchange: Exchange,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> Tensor:
    """(n,) losses; writes (n, D) ``grad_states`` and adds to (R, D) ``grad_rows``."""
    # The rows of the shard are the same in every step.
    recurring = group.states.shape[0] % STEP == 0
    logits = times_transposed(group.states, rows, recurring=recurring)
    own = _softmax_(logits, group.targets)
    of_ranks = exchange.start_stack(own)
    # What the other ranks say is a factor of each line, so that a product fits in beside its way.
    # Factors go to the narrow operands, not over all logits.
    part = times_transposed(logits, rows.T, recurring=recurring)
    losses, factors, slopes = _losses(own[0], of_ranks(), group.weights)
    torch.mul(part, factors[:, None], out=grad_states)
    weighted = (group.states * factors[:, None]).T.contiguous()
    grad_rows += times_transposed(weighted, logits.T, recurring=recurring).T
    here = (group.targets >= 0).nonzero()[:, 0]
    targets, slope = group.targets[here], slopes[here][:, None]
    grad_states[here] -= slope * rows[targets]
    grad_rows.index_add_(0, targets, slope * group.states[here], alpha=-1)
    return losses


def _softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """(2, n) log-sum-exps of the shard's candidates, and the logits of the targets that it has.

    The (n, R) logits become the softmax of the candidates.
    """
    here = (targets >= 0).nonzero()[:, 0]
    target_logits = logits.new_zeros(logits.shape[0])
    target_logits[here] = logits[here, targets[here]]
    logits[here, targets[here]] = -torch.inf
    return torch.stack([softmax_(logits), target_logits])


def _losses(own: Tensor, of_ranks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) losses, factors and slopes.

    A factor makes a line of the shard's softmax the gradient of its logits, a slope is the negative
    gradient of the target logit.

    Args:
        own: (n,) log-sum-exps of this shard.
        of_ranks: (W, 2, n) log-sum-exps and target logits of all shards.
        weights: (n,) float32 coefficients of the losses.
    """
    logsumexp, target_logits = of_ranks[:, 0].logsumexp(0), of_ranks[:, 1].sum(0)
    margin = logsumexp - target_logits
    slopes = weights * margin.sigmoid()
    # A line without candidates has logsumexp -inf, slope 0 and zeros for its softmax.
    share = (own - logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)).exp_()
    return torch.nn.functional.softplus(margin), slopes * share, slopes
