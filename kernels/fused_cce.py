"""Full softmax with its gradient taken in the forward pass, for shards that fit in a cache.

With all logits of some positions in the cache at once their softmax is known at once, so that three
products do the work of four and every exponential is taken once. The gradient of the loss with
respect to each position's loss must be known beforehand: it is, for a mean or a sum.
"""

from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.exchange import Exchange
from shardrec.kernels.problem import Problem
from shardrec.kernels.streaming import combine_shards

__all__ = ["fits_cache", "fused_cross_entropy", "group_size"]

# Logits of one group of positions, 48 MiB at most: every group reads the rows and their gradient,
# so on two cores at V = 100,000 half as many took 1.4 times as long; twice as many gained 2 %.
GROUP_LOGITS = 12 << 20
MOST_POSITIONS = 256
LEAST_POSITIONS = 64
LINE_LOGITS = 1 << 20


def fits_cache(problem: Problem) -> bool:
    """Whether the fused pass serves: float32 on a CPU, a shard of at most 196,608 rows.

    Every rank must come to the same answer, so it looks at the largest shard a rank can have.
    """
    on_cpu = problem.states.device.type == "cpu" and problem.states.dtype == torch.float32
    return on_cpu and group_size(problem.exchange.largest_shard) >= LEAST_POSITIONS


def fused_cross_entropy(problem: Problem, coefficients: Tensor) -> Tensor:
    """() float32 sum over this rank's positions of coefficient times loss.

    The workspace is one group of logits, at most 48 MiB. Backward may be called once.

    Args:
        problem: The batch and the table.
        coefficients: (N,) float32.

    Collectives: per group of positions a gather of states, targets and coefficients, a maximum, a
    sum and a reduce-scatter of state gradients; none in backward.
    """
    return _FusedCrossEntropy.apply(problem.states, problem.scaled_rows(), problem, coefficients)


def group_size(num_rows: int) -> int:
    """Positions whose logits over so many rows are in the cache together."""
    return min(MOST_POSITIONS, GROUP_LOGITS // max(num_rows, 1))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, rows: Tensor, problem: Problem, coefficients: Tensor
    ) -> Tensor:
        exchange = problem.exchange
        num_groups = max(1, -(-exchange.num_positions // group_size(exchange.largest_shard)))
        grad_states, grad_rows = torch.empty_like(states), torch.zeros_like(rows)
        total = torch.zeros((), device=states.device)
        buffer = torch.empty(0, device=states.device)
        for chunk in exchange.chunks(exchange.even_chunks(num_groups)):
            group_states = exchange.gather(states, chunk)
            targets = problem.row_ids.find(exchange.gather(problem.targets, chunk))
            weights = exchange.gather(coefficients, chunk)
            shape = targets.numel(), rows.shape[0]
            if buffer.numel() < shape[0] * shape[1]:
                buffer = torch.empty(shape[0] * shape[1], device=states.device)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(group_states, rows.T, out=logits)
            losses, factors, slopes = _softmax_losses(logits, targets, weights, exchange)
            total += (losses * weights)[chunk.own_slice].sum()
            # The factors of the lines go to the narrow operands, not over all logits.
            part = (logits @ rows).mul_(factors[:, None])
            grad_rows.addmm_(logits.T, group_states * factors[:, None])
            here = (targets >= 0).nonzero()[:, 0]
            slope = slopes[here][:, None]
            part[here] -= slope * rows[targets[here]]
            grad_rows.index_add_(0, targets[here], slope * group_states[here], alpha=-1)
            grad_states[chunk.own] = exchange.reduce_scatter(part, chunk)
        ctx.gradients = grad_states, grad_rows
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward must run once, got a second call; use reduction='none', which keeps what "
                "a second one needs"
            )
        grad_states, grad_rows = ctx.gradients
        ctx.gradients = None
        if float(grad) != 1.0:
            grad_states.mul_(grad)
            grad_rows.mul_(grad)
        return grad_states, grad_rows, None, None


def _softmax_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) losses; the (n, R) logits become the softmax of the shard's candidates.

    Also the (n,) factors that make a line its gradient, and the (n,) negative gradients of the
    target logits.
    """
    here = (targets >= 0).nonzero()[:, 0]
    target_logits = logits.new_zeros(logits.shape[0])
    target_logits[here] = logits[here, targets[here]]
    logits[here, targets[here]] = -torch.inf
    shard_logsumexp = _softmax_(logits)
    logsumexp, target_logits = combine_shards(shard_logsumexp, target_logits, exchange)
    margin = logsumexp - target_logits
    slopes = weights * margin.sigmoid()
    # A line without candidates has logsumexp -inf, slope 0 and zeros for its softmax.
    share = (shard_logsumexp - logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)).exp_()
    return torch.nn.functional.softplus(margin), slopes * share, slopes


def _softmax_(logits: Tensor) -> Tensor:
    """(n,) log-sum-exp of each line, which becomes its softmax: zeros where all are -inf."""
    if not logits.shape[1]:
        return logits.new_full((logits.shape[0],), -torch.inf)
    # A few lines at a time stay in a core's own cache between the passes.
    lines = max(2, LINE_LOGITS // logits.shape[1])
    return torch.cat([_softmax_lines_(part) for part in logits.split(lines)])


def _softmax_lines_(logits: Tensor) -> Tensor:
    largest = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    empty = largest == -torch.inf
    if bool(empty.any()):
        logits[empty] = 0.0
    # The largest probability is at least 1 / R, so its logarithm is precise.
    return (largest - logits.amax(1).log_()).masked_fill_(empty, -torch.inf)
