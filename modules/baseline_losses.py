"""Baseline losses in plain PyTorch, with all logits in memory, over a tensor or a row shard.

The baselines that a model must beat (popularity, item-to-item scores) are in
``pipeline/baseline.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.cost.terms import KernelCost, LossCost, streaming_bytes
from shardrec.kernels.loss.inputs import Inputs, Scaling, prepare_inputs
from shardrec.kernels.negatives import STREAM_NEGATIVES, draw_below
from shardrec.kernels.ranks.chunks import Chunk, Layout
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.shard import RowShard

__all__ = [
    "binary_cross_entropy",
    "eager_cross_entropy",
    "eager_cross_entropy_cost",
    "generalized_binary_cross_entropy",
    "paired_cross_entropy_cost",
]


def eager_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Full softmax cross-entropy that stores the logits of all positions and rows.

    Arguments, results and errors are those of ``cut_cross_entropy``, except that products are in
    float32 even under autocast. Memory is O(N V / W) on each of W ranks; each rank gathers all
    states.

    Collectives: none for a tensor. For a shard, in forward one all-gather of five integers per
    rank, all-gathers of targets and of (N, D) states, all-reduces of the maximum and of the sums,
    and those of the reduction; in backward an all-reduce and a reduce-scatter of state gradients.
    """
    scaling = Scaling(normalize, temperature)
    inputs = prepare_inputs(
        states, table, targets, weights=weights, reduction=reduction, scaling=scaling
    )
    layout = inputs.layout
    chunk = _whole_batch(layout)
    all_states = _Gather.apply(inputs.states, layout, chunk)
    rows = inputs.row_ids.find(layout.gather_all(inputs.targets))
    with torch.autocast(all_states.device.type, enabled=False):
        logits = all_states.float() @ inputs.scaled_rows().float().T
    shard_logsumexp = (
        torch.logsumexp(logits, 1) if logits.shape[1] else logits.new_full(rows.shape, -torch.inf)
    )
    shares = torch.stack([shard_logsumexp, _pick(logits, rows[:, None])[:, 0]])
    loss = _CrossEntropyOverRanks.apply(shares, inputs.ranks)[chunk.own_slice]
    return inputs.reduce(loss, reduction)


def binary_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_negatives: int = 1,
    seed: int,
    step: int = 0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of the target against the mean over K uniform negatives.

    ``loss_i = -log sigmoid(s_iy) - mean_k log(1 - sigmoid(s_in_k))``; with K = 1 the loss of SASRec
    (Kang and McAuley, arXiv 1808.09781). Stores (N, K + 1, D) rows. Arguments, results and errors
    are as in ``sampled_cross_entropy``.

    Collectives: none for a tensor. For a shard those of ``eager_cross_entropy``, with an all-reduce
    of (N, K + 1) logits in forward and in backward instead of its all-reduces.
    """
    _require_negatives(num_negatives)
    scaling = Scaling(normalize, temperature)
    inputs = prepare_inputs(
        states, table, targets, weights=weights, reduction=reduction, scaling=scaling
    )
    positive, negative = _sampled_logits(inputs, num_negatives, seed, step)
    loss = F.softplus(-positive) + F.softplus(negative).mean(1)
    return inputs.reduce(loss, reduction)


def generalized_binary_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_negatives: int = 256,
    calibration: float = 0.75,
    seed: int,
    step: int = 0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Binary cross-entropy with the positive probability raised to the power beta (gBCE).

    ``loss_i = -beta log sigmoid(s_iy) - sum_k log(1 - sigmoid(s_in_k))`` with
    ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)`` and ``alpha = K / (V - 1)`` (Petrov and
    Macdonald, arXiv 2308.07192, equation 9); ``calibration`` is t. Stores (N, K + 1, D) rows. Other
    arguments, results and errors are as in ``binary_cross_entropy``.

    Collectives: those of ``binary_cross_entropy``.
    """
    _require_negatives(num_negatives)
    scaling = Scaling(normalize, temperature)
    inputs = prepare_inputs(
        states, table, targets, weights=weights, reduction=reduction, scaling=scaling
    )
    positive, negative = _sampled_logits(inputs, num_negatives, seed, step)
    alpha = num_negatives / max(inputs.num_items - 1, 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    loss = beta * F.softplus(-positive) + F.softplus(negative).sum(1)
    return inputs.reduce(loss, reduction)


def _require_negatives(num_negatives: int) -> None:
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}; raise it")


def _sampled_logits(
    inputs: Inputs, num_negatives: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """(N,) target logits and (N, K) logits of negatives for this rank's positions.

    A negative equal to the target is replaced by the next item.
    """
    layout = inputs.layout
    chunk = _whole_batch(layout)
    targets = layout.gather_all(inputs.targets)
    negatives = draw_below(
        inputs.num_items,
        chunk.positions,
        num_negatives,
        seed=seed,
        step=step,
        stream=STREAM_NEGATIVES,
    )
    negatives = torch.where(
        negatives == targets[:, None], (negatives + 1) % inputs.num_items, negatives
    )
    rows = inputs.row_ids.find(torch.cat([targets[:, None], negatives], dim=1))
    all_states = _Gather.apply(inputs.states, layout, chunk)
    if inputs.rows.shape[0]:
        candidates = F.embedding(rows.clamp(min=0), inputs.scaled_rows())
        shard_logits = torch.einsum("nd,nkd->nk", all_states, candidates) * (rows >= 0)
    else:
        # An empty shard must stay in the graph: its backward takes part in the collectives.
        nothing = 0 * (all_states.sum() + inputs.rows.sum())
        shard_logits = all_states.new_zeros(rows.shape) + nothing
    logits = _SumOverRanks.apply(shard_logits.float(), inputs.ranks)[chunk.own_slice]
    return logits[:, 0], logits[:, 1:]


def _pick(logits: Tensor, rows: Tensor) -> Tensor:
    """(N, m) logits of each line at the (N, m) ``rows``, 0 for row -1."""
    if not logits.shape[1]:
        return 0 * logits.sum() + logits.new_zeros(rows.shape)
    return logits.gather(1, rows.clamp(min=0)) * (rows >= 0)


def _whole_batch(layout: Layout) -> Chunk:
    chunk = next(iter(layout.chunks(layout.even_chunks(1))), None)
    if chunk is None:
        raise ValueError("states must hold a position on some rank, got none; skip the batch")
    return chunk


class _Gather(torch.autograd.Function):
    """All-gather of the states; backward reduce-scatters the gradients to the owners."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: Layout, chunk: Chunk) -> Tensor:
        ctx.layout, ctx.chunk = layout, chunk
        return layout.start_gather(states, chunk)().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.ranks.start_reduce_scatter(grad, ctx.chunk.counts)(), None, None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce of the shares; ranks use different positions, so backward all-reduces too."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(share).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad), None


class _CrossEntropyOverRanks(torch.autograd.Function):
    """(n,) losses from each shard's (2, n) log-sum-exps and target logits.

    This is one autograd function, so that every rank runs the collectives of backward in the same
    order.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks = ranks
        largest = ranks.max(shares[0])
        sums = ranks.sum(torch.stack([(shares[0] - largest).exp(), shares[1]]))
        logsumexp = sums[0].log() + largest
        ctx.save_for_backward((shares[0] - logsumexp).exp())
        return logsumexp - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = ctx.ranks.sum(grad)
        return torch.stack([total * weight, -total]), None


def eager_cross_entropy_cost(work: Workload) -> LossCost:
    """Cost of one step on one rank, with up to five (N, R) float32 tensors of logits stored."""
    pairs = work.num_positions * work.num_rows
    return LossCost(
        touched_rows=work.num_rows,
        is_dense=True,
        workspace_bytes=5 * 4 * pairs + streaming_bytes(work),
        work=KernelCost(6.0 * pairs * work.width, 2 * 5 * 4 * pairs),
        received=state_traffic(work, gathers=1),
    )


def paired_cross_entropy_cost(work: Workload, num_negatives: int) -> LossCost:
    """Cost of one step on one rank, with K negatives per position and copies of their rows."""
    vectors = work.num_positions * (num_negatives + 1) * work.width
    return LossCost(
        touched_rows=work.num_rows,
        is_dense=True,
        workspace_bytes=2 * 4 * vectors + streaming_bytes(work),
        work=KernelCost(6.0 * vectors, 2 * 2 * 4 * vectors),
        received=state_traffic(work, gathers=1),
    )
