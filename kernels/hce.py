"""Hybrid cross-entropy (HCE): the hardest rows of a bucket exactly, all other rows by sampling.

SCE (arXiv 2409.18721) leaves out every row outside a position's buckets; sampled softmax misses the
few rows that dominate the sum. HCE has both parts in one sum inside the logarithm; its expectation
over the draws is the sum of the full softmax:

``loss_i = log(exp(s_iy) + sum_{j in H, j != y} exp(s_ij)
             + V / K sum_{k: n_k not in H, n_k != y} exp(s_in_k)) - s_iy``

with H the b_y rows of the bucket of position i and n_1 .. n_K the bucket's uniform draws. A
position's bucket is that of the centre nearest to its state, so that every position has one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, RowIds, blocks_of_items
from shardrec.kernels.block_logsumexp.cpu_tiles import cpu_tiles
from shardrec.kernels.buckets import best_items, bucket_centres, default_num_buckets
from shardrec.kernels.cost.terms import (
    LossCost,
    accumulator_bytes,
    expected_distinct,
    listed_cost,
    select_cost,
    streaming_bytes,
)
from shardrec.kernels.cost.triton import (
    Listed,
    listed_bytes,
    listed_kernels,
    sign_kernels,
    topk_bytes,
    topk_kernels,
)
from shardrec.kernels.loss.candidates import Candidates, Plan, Shape
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.loss.options import Common
from shardrec.kernels.negatives import STREAM_NEGATIVES, draw_below
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.select import best_direction
from shardrec.kernels.shard import RowShard

__all__ = ["hybrid_cross_entropy", "hybrid_cross_entropy_cost"]


def hybrid_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_buckets: int | None = None,
    items_per_bucket: int = 256,
    num_negatives: int = 256,
    mix: bool = True,
    seed: int,
    step: int = 0,
    sparse_grad: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of every target among its bucket's hardest rows and samples of all other rows.

    With y the target and H the b_y hardest rows of the position's bucket, ``loss_i = log(exp(s_iy)
    + sum_{j in H, j != y} exp(s_ij) + V / K sum_{k: n_k not in H, n_k != y} exp(s_in_k)) - s_iy``.
    The sum inside the logarithm is an unbiased estimate of the one of the full softmax. Source: the
    buckets are those of SCE (Mezentsev et al., arXiv 2409.18721).

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        num_buckets: n_b; ``2 sqrt(N)``, N over all ranks, when None.
        items_per_bucket: b_y, rows of largest inner product with the bucket's centre.
        num_negatives: K, uniform draws per bucket; draws among its b_y rows are left out.
        mix: True: centres are random-sign combinations of all states; False: random sign vectors.
        seed: Key of the random generator, a signed 64-bit integer.
        step: Training step; another step draws other centres and other negatives.
        sparse_grad: Give ``table`` a sparse COO gradient over the rows in use.
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
        RuntimeError: a second derivative is taken, or a number does not fit in 64 bits.

    Collectives: none for a tensor. For a shard those of ``cut_cross_entropy`` with the gradient in
    backward, and in forward an all-reduce of (n_b, D) centres (with ``mix``), two all-gathers of
    (n_b, b_y) scores and rows, and one all-gather of the targets.
    """
    numbers = (num_buckets, items_per_bucket, num_negatives)
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError(
            "num_buckets, items_per_bucket and num_negatives must be positive, got "
            f"{num_buckets}, {items_per_bucket} and {num_negatives}; raise them, or give None for "
            "the default number of buckets"
        )
    common = Common(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
        sparse_grad=sparse_grad,
    )
    candidates = HardAndSampled(
        num_buckets=num_buckets,
        items_per_bucket=items_per_bucket,
        num_negatives=num_negatives,
        mix=mix,
        seed=seed,
        step=step,
    )
    return _hybrid_cross_entropy(states, table, targets, common, candidates)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardAndSampled(Candidates):
    """Candidates of ``hybrid_cross_entropy``: the hardest items and the draws of the bucket.

    Attributes are the arguments of ``hybrid_cross_entropy``.
    """

    num_buckets: int | None
    items_per_bucket: int
    num_negatives: int
    mix: bool
    seed: int
    step: int

    def choose(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """(N,) int64 buckets of the positions, and (n_b, b_y) int64 hardest items of each bucket.

        Collectives: those of ``bucket_centres`` and ``best_items``.
        """
        num_buckets = self._num_buckets(inputs.layout.num_positions)
        centres = bucket_centres(inputs, num_buckets, self.mix, self.seed, self.step)
        hard = best_items(inputs, centres, self.items_per_bucket)
        return best_direction(F.normalize(centres), inputs.states), hard

    def choice_shapes(
        self, num_positions: int, num_rows: int
    ) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shapes and dtypes of the two tensors of ``choose``: (N,) and (n_b, b_y) int64."""
        num_items = torch.sym_min(self.items_per_bucket, num_rows)
        hard = self._num_buckets(num_positions), num_items
        return ((num_positions,), torch.int64), (hard, torch.int64)

    def used_items(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Tensor:
        """(n,) int64 hard items, draws and targets of all ranks; one all-gather of the targets."""
        _, hard = tensors
        drawn = self._draw(torch.arange(hard.shape[0], device=hard.device), inputs.num_items)
        all_targets = inputs.layout.gather_all(inputs.targets)
        return torch.cat([hard.flatten(), drawn.flatten(), all_targets])

    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> "_HybridPlan":
        """One block of logits for each bucket."""
        buckets, hard = tensors
        drawn = self._draw(torch.arange(hard.shape[0], device=hard.device), inputs.num_items)
        return _HybridPlan(local, buckets, hard, drawn)

    def _draw(self, buckets: Tensor, num_items: int) -> Tensor:
        """(len(buckets), K) int64 uniform draws."""
        return draw_below(
            num_items,
            buckets,
            self.num_negatives,
            seed=self.seed,
            step=self.step,
            stream=STREAM_NEGATIVES,
        )

    def _num_buckets(self, num_positions: int) -> int:
        return default_num_buckets(num_positions) if self.num_buckets is None else self.num_buckets


class _HybridPlan(Plan):
    """The candidates of a position are the hard and the drawn items of its bucket."""

    def __init__(self, inputs: Inputs, buckets: Tensor, hard: Tensor, drawn: Tensor) -> None:
        super().__init__(inputs)
        self.per_position = (buckets,)
        hard = hard.sort(1).values
        place = torch.searchsorted(hard, drawn).clamp_(max=hard.shape[1] - 1)
        is_hard = hard.gather(1, place) == drawn
        # Ascending items let a CPU find the targets among them by binary search; -1 is no item.
        self._items, order = torch.cat([hard, drawn.masked_fill(is_hard, -1)], 1).sort(1)
        # A draw has weight V / K in the sum: log(K / V) is subtracted from its logit.
        log_rate = math.log(drawn.shape[1] / inputs.num_items)
        self._offsets = (order >= hard.shape[1]) * log_rate

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        (buckets,) = per_position
        order = torch.argsort(buckets, stable=True)
        present, sizes = torch.unique_consecutive(buckets[order], return_counts=True)
        items, offsets = self._items[present], self._offsets[present]
        starts = F.pad(sizes.cumsum(0), (1, 0))
        left_out = items < 0
        items = items.clamp(min=0)
        return blocks_of_items(order, starts, items, row_ids, targets, offsets, left_out)


_hybrid_cross_entropy = Operator("hybrid_cross_entropy", HardAndSampled)


def hybrid_cross_entropy_cost(
    work: Workload, num_buckets: int | None, items_per_bucket: int, num_negatives: int
) -> LossCost:
    """Cost of one step of HCE on one rank, if all buckets have different items.

    There are three projections, of states onto random signs and of centres onto states and onto
    rows; the blocks of the buckets are computed in forward and recomputed in backward.
    """
    num_buckets = num_buckets or default_num_buckets(work.num_positions)
    columns = min(items_per_bucket, work.num_items) + num_negatives
    per_bucket = work.num_positions / num_buckets
    touched = expected_distinct(num_buckets * columns + work.num_positions, work.num_items)
    rows = min(work.num_rows, round(touched / work.num_ranks))
    pairs = work.num_positions * columns / work.num_ranks
    # Items, draws and their order are int64, as are the lists of a chunk.
    lists = 8 * num_buckets * 6 * columns
    if work.on_cpu:
        choices = select_cost(num_buckets, 2 * work.own_positions + work.num_rows, work)
        kernels = choices + listed_cost(pairs, per_bucket, work)
        tiles = cpu_tiles().listed_bytes(work.width, per_bucket)
    else:
        entries = num_buckets * columns / work.num_ranks
        shape = Listed(
            pairs=pairs,
            positions=per_bucket,
            rows=columns / work.num_ranks,
            entries=entries,
            touched=rows,
        )
        kernels = listed_kernels(shape, work)
        kernels += sign_kernels("mixed_signs", num_buckets, work.own_positions, work)
        kernels += topk_kernels(num_buckets, work.num_rows, items_per_bucket, work)
        kernels += select_cost(num_buckets, work.own_positions, work)
        tiles = max(listed_bytes(entries, work), topk_bytes(num_buckets, work.num_rows))
    copy = rows * work.width * work.stored_bytes
    return LossCost(
        touched_rows=rows,
        is_dense=False,
        workspace_bytes=copy
        # Under autocast the search for the nearest rows casts all of them.
        + accumulator_bytes(work.num_rows if work.is_cast else rows, work)
        + lists
        + tiles
        + streaming_bytes(work),
        work=kernels,
        received=state_traffic(work),
    )
