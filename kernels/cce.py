"""Cut cross-entropy: the full softmax over the catalog without its logits in memory.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import EveryPair, RowIds
from shardrec.kernels.block_logsumexp.cpu_tiles import LEAST_FUSED, cpu_tiles, fused_positions
from shardrec.kernels.cost.terms import (
    KernelCost,
    LossCost,
    accumulator_bytes,
    full_cost,
    streaming_bytes,
)
from shardrec.kernels.cost.triton import full_bytes, full_kernels
from shardrec.kernels.loss.candidates import Candidates, Plan
from shardrec.kernels.loss.fused import fits_cache, fused_cross_entropy
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.loss.options import Common, autocast_dtype
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.shard import RowShard

__all__ = ["cut_cross_entropy", "cut_cross_entropy_cost"]


def cut_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of every target among all rows of ``table``: the exact full softmax.

    ``loss_i = log sum_j exp(s_ij) - s_iy`` with ``s_ij = x_i . w_j / temperature``. The (N, V)
    logits are never in memory. Source: Wijmans et al., arXiv 2411.09009.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        weights: (N,) float weight of each position's loss, not negative; None for ones. The mean
            divides by the sum of the weights.
        reduction: "mean", "sum" or "none".
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.
        backend: "auto" chooses by device and dtype; "torch" or "triton" forces one.

    Returns:
        () float32, or (N,) weighted losses with "none". Gradients flow to ``states`` and to the
        rows. With a shard, mean and sum are over all ranks; backward must run on all ranks, and
        gives each rank the gradient of this global loss for its own states and rows.

    Raises:
        TypeError: states and table differ in dtype without autocast or are not float, or targets
            are not int64 or int32.
        ValueError: a shape disagrees, or a target or weight is out of range, on any rank; an option
            is out of range, or ``weights`` require a gradient.
        RuntimeError: a second derivative is taken, or backward runs twice (see below).

    On a CPU, for float32 and shards of up to 32,768 rows, mean and sum compute their gradient in
    the forward pass, and backward may run only once; in a compiled graph backward copies it.

    Collectives: none for a tensor. For a shard, in forward one all-gather of five integers per
    rank, and per chunk of positions an all-gather each of states and targets and two all-reduces
    of float32 numbers (maximum and sum); one all-reduce for the sum of losses and, for a mean, one
    for the sum of weights. In backward, per chunk of positions, all-gathers of states, targets and
    the gradients of log-sum-exps and target logits, and a reduce-scatter of state gradients. Where
    the gradient is computed in forward, all collectives are (see ``fused_cross_entropy``).
    """
    common = Common(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
    )
    fuse = backend != "triton" and _fits_cache(states, table)
    return _cut_cross_entropy(states, table, targets, common, EveryItem(), fuse=fuse)[0]


def _fits_cache(states: Tensor, table: Tensor | RowShard) -> bool:
    if autocast_dtype(states) not in (None, torch.float32):
        return False
    if isinstance(table, Tensor):
        return fits_cache(states, table, table.shape[0], 1)
    num_ranks = 1 if table.group is None else table.group.size()
    return fits_cache(states, table.rows, table.num_rows, num_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryItem(Candidates):
    """Candidates of the full softmax: every row of the table."""

    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> "_EveryPair":
        """One block of all positions and rows."""
        return _EveryPair(local)


class _EveryPair(Plan):
    def chunk_of(self) -> Tensor | None:
        return self.layout.even_chunks(self.layout.num_chunks(listed=False))

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> EveryPair:
        return EveryPair(row_ids.count, row_ids.find(targets))


_cut_cross_entropy = Operator("cut_cross_entropy", EveryItem, fused_cross_entropy)


def cut_cross_entropy_cost(work: Workload) -> LossCost:
    """Cost of one step of the full softmax on one rank.

    On a CPU, for a shard that fits in the cache, there are three matrix products and one group of
    logits in memory. Otherwise logits exist one tile at a time and are recomputed in backward: four
    products on a CPU, five in Triton, where each of the two gradients has a pass of its own.
    """
    if work.on_cpu and work.element_bytes == 4 and fused_positions(work.num_rows) >= LEAST_FUSED:
        group = min(fused_positions(work.num_rows), work.num_positions)
        # One process has one chunk, with a gradient in addition to the one that is returned.
        chunk = work.num_positions if work.num_ranks == 1 else 0
        # A matrix product copies part of its operands: measured, half the bytes of the logits.
        logits = group * work.num_rows * 3 // 2
        held = 4 * (logits + (3 * group + chunk) * work.width)
        return _full_cost(work, held, full_cost(3, group, work), gathers=1)
    if work.on_cpu:
        # A tile of logits, and the copy that a product makes of it.
        tiles = cpu_tiles()
        held = 2 * 4 * tiles.logits
        return _full_cost(work, held, full_cost(4, tiles.positions, work), gathers=2)
    return _full_cost(work, full_bytes(work), full_kernels(work), gathers=2)


def _full_cost(work: Workload, workspace: int, kernels: KernelCost, gathers: int) -> LossCost:
    return LossCost(
        touched_rows=work.num_rows,
        is_dense=True,
        workspace_bytes=workspace
        + streaming_bytes(work, listed=False)
        + accumulator_bytes(work.num_rows, work),
        work=kernels,
        received=state_traffic(work, gathers),
    )
