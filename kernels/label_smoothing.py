"""Label smoothing over the whole catalog, as a term beside a cross-entropy.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv
1512.00567, section 7, with the uniform distribution over the V items of the table.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.loss.inputs import Inputs, Scaling, prepare_inputs
from shardrec.kernels.ranks.chunks import Chunk, Gradients, prefetched
from shardrec.kernels.ranks.communicator import Pending
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.shard import RowShard

__all__ = ["label_smoothing", "with_label_smoothing"]


def label_smoothing(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    share: float,
    drawn: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """What label smoothing adds to a mean cross-entropy: () float32, with gradients.

    ``share * mean_i (s_iy - mean_j s_ij)``: the cross-entropy with the share 1 - ``share`` at the
    target and ``share`` spread over all items is that of the target alone and this term. It is
    linear in the rows, so ``mean_j s_ij = x_i . mean_j w_j``: no logits are computed. With
    ``drawn`` items, the mean over the catalog is estimated by that over them, which is unbiased,
    and only rows that are drawn or a target get a gradient.

    Args:
        states: (N, D) float.
        table: (V, D), or this rank's shard of it.
        targets: (N,) integer items.
        share: epsilon, in [0, 1).
        drawn: (K,) int64 items drawn uniformly, with repetitions, the same on every rank; None for
            the whole catalog. With them the gradient of the rows is sparse COO.
        weights: (N,) float weight of each position, or None for ones.
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.

    Raises:
        TypeError, ValueError: as ``cut_cross_entropy``.

    Collectives: none for a tensor. For a shard, all in forward: an all-gather of five integers,
    one all-reduce each of the sum of weights, of (D,) sums of rows and of states, and of the
    result; per chunk of positions an all-gather each of states, targets and coefficients and a
    reduce-scatter of state gradients; with ``drawn`` an all-gather of the targets.
    """
    shard = table if isinstance(table, RowShard) else RowShard(table, 0, table.shape[0])
    dtype = torch.promote_types(states.dtype, shard.rows.dtype)
    scaling = Scaling(normalize, temperature, dtype)
    term = _Term(shard, targets, weights, scaling, drawn)
    with torch.autocast(states.device.type, enabled=False):
        mean: Tensor = _Smoothing.apply(states, shard.rows, term)  # type: ignore[no-untyped-call]
    return share * mean


@dataclass(frozen=True, slots=True)
class _Term:
    """The arguments of ``label_smoothing`` without gradients."""

    shard: RowShard
    targets: Tensor
    weights: Tensor | None
    scaling: Scaling
    drawn: Tensor | None


class _Smoothing(torch.autograd.Function):
    """The mean of (target logit - mean logit); forward computes its gradients, which are sums."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, term: _Term) -> Tensor:
        scaling = term.scaling
        inputs = prepare_inputs(
            states,
            replace(term.shard, rows=rows),
            term.targets,
            weights=term.weights,
            reduction="mean",
            scaling=scaling,
        )
        used = None
        if term.drawn is not None:
            items = torch.cat([term.drawn, inputs.layout.gather_all(inputs.targets)])
            found = inputs.row_ids.find(items)
            used = torch.unique(found[found >= 0])
            inputs = inputs.restrict(used, rows[used])
        total, grad_states, grad_rows = _smoothed(inputs, term.drawn)
        ctx.shape = rows.shape
        ctx.save_for_backward(
            scaling.states_gradient(states, grad_states),
            scaling.rows_gradient(inputs.rows, grad_rows),
            used,
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_states, grad_rows, used = ctx.saved_tensors
        grad_rows = grad * grad_rows
        if used is not None:
            grad_rows = torch.sparse_coo_tensor(
                used[None], grad_rows, ctx.shape, is_coalesced=True, check_invariants=False
            )
        return grad * grad_states, grad_rows, None


def _smoothed(inputs: Inputs, drawn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over all ranks, and its gradients for ``inputs.states`` and the scaled rows."""
    states, rows, layout = inputs.states, inputs.scaled_rows(), inputs.layout
    coefficients = inputs.coefficients("mean")
    grad_states, grad_rows = Gradients(inputs.ranks, states), rows.new_zeros(rows.shape)

    def start(chunk: Chunk) -> list[Pending]:
        return [layout.start_gather(one, chunk) for one in (states, inputs.targets, coefficients)]

    chunks = list(layout.chunks(layout.even_chunks(layout.num_chunks(listed=False))))
    for chunk, (chunk_states, targets, weights) in prefetched(chunks, start):
        found = inputs.row_ids.find(targets)
        here = (found >= 0).nonzero()[:, 0]
        found, weights = found[here], weights[here, None].to(rows)
        part = torch.zeros_like(chunk_states)
        part[here] = weights * rows[found]
        grad_rows.index_add_(0, found, weights * chunk_states[here])
        grad_states.send(part, chunk)
    of_states = grad_states.finish()
    shares = _shares(inputs, drawn).to(rows)
    of_states -= coefficients[:, None] * inputs.ranks.sum(shares @ rows)
    grad_rows -= shares[:, None] * inputs.ranks.sum(coefficients.to(states) @ states)
    return inputs.ranks.sum((states * of_states).sum().float()), of_states, grad_rows


def _shares(inputs: Inputs, drawn: Tensor | None) -> Tensor:
    """(R,) share of each row in the mean of the rows."""
    count = inputs.row_ids.count
    if drawn is None:
        return torch.full((count,), 1 / inputs.num_items, device=inputs.rows.device)
    found = inputs.row_ids.find(drawn)
    return torch.bincount(found[found >= 0], minlength=count) / drawn.numel()


def with_label_smoothing(cost: LossCost, work: Workload, drawn: int | None) -> LossCost:
    """The cost of a loss with label smoothing over the catalog, or over ``drawn`` items of it."""
    touched = cost.touched_rows if drawn is None else cost.touched_rows + drawn
    touched = min(work.num_rows, touched)
    received = dict(cost.received)
    for name, value in state_traffic(work, gathers=1).items():
        received[f"{name}, smoothing"] = value
    # Gradients of states and rows, and their products with the gradient of the loss.
    workspace = 2 * 4 * work.width * (work.own_positions + touched)
    return replace(
        cost,
        touched_rows=touched,
        workspace_bytes=cost.workspace_bytes + workspace,
        received=received,
    )
