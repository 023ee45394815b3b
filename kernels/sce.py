"""Scalable cross-entropy (SCE): each bucket pairs the positions and rows nearest a random centre.

Source: Mezentsev et al., "Scalable Cross-Entropy Loss for Sequential Recommendations with Large
Item Catalogs", arXiv 2409.18721.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, RowIds, blocks_of_items
from shardrec.kernels.block_logsumexp.cpu_tiles import cpu_tiles
from shardrec.kernels.buckets import bucket_centres, default_num_buckets, fill_buckets
from shardrec.kernels.cost.terms import (
    KernelCost,
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
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.shard import RowShard

__all__ = ["scalable_cross_entropy", "scalable_cross_entropy_cost"]


def scalable_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_buckets: int | None = None,
    positions_per_bucket: int | None = None,
    items_per_bucket: int = 256,
    mix: bool = True,
    seed: int,
    step: int = 0,
    sparse_grad: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of every target among the rows of its position's hardest bucket.

    For each of n_b random centres the b_x positions and the b_y rows of largest inner product form
    a bucket (ties: the lower index first). A position's loss is the largest over its buckets; a
    position in no bucket is not covered and has loss 0. The mean is over the covered positions.
    Source: Mezentsev et al., arXiv 2409.18721.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        num_buckets: n_b; ``2 sqrt(N)``, N over all ranks, when None.
        positions_per_bucket: b_x; ``2 sqrt(N)`` when None; at most N are used.
        items_per_bucket: b_y; at most V are used.
        mix: True: centres are random-sign combinations of all states; False: random sign vectors.
        seed: Key of the random generator, a signed 64-bit integer.
        step: Training step; another step draws other centres.
        sparse_grad: Give ``table`` a sparse COO gradient over the rows in use.
        weights: (N,) float weight of each position's loss, not negative; None for ones. The mean
            divides by the sum of the weights.
        reduction: "mean", "sum" or "none".
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.
        backend: "auto" chooses by device and dtype; "torch" or "triton" forces one.

    Returns:
        () float32; with "none" (N,) weighted losses and the (N,) bool mask of covered positions.
        Gradients flow to ``states`` and to the rows, not through the choice of the buckets. With a
        shard, mean and sum are over all ranks; backward must run on all ranks, and gives each rank
        the gradient of this global loss for its own states and rows.

    Raises:
        TypeError: states and table differ in dtype without autocast or are not float, or targets
            are not int64 or int32.
        ValueError: a shape disagrees, or a target or weight is out of range, on any rank; an option
            is out of range, or ``weights`` require a gradient.
        RuntimeError: a second derivative is taken, or a number does not fit in 64 bits.

    Collectives: none for a tensor. For a shard those of ``cut_cross_entropy`` with the gradient in
    backward, and in forward an all-reduce of (n_b, D) centres (with ``mix``), two all-gathers of
    (n_b, b_x) and two of (n_b, b_y) scores and indices, and one all-gather of the targets.
    """
    numbers = (num_buckets, positions_per_bucket, items_per_bucket)
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError(
            "num_buckets, positions_per_bucket and items_per_bucket must be positive, got "
            f"{num_buckets}, {positions_per_bucket} and {items_per_bucket}; None takes the default"
        )
    common = Common(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
        sparse_grad=sparse_grad,
    )
    candidates = HardBuckets(
        num_buckets=num_buckets,
        positions_per_bucket=positions_per_bucket,
        items_per_bucket=items_per_bucket,
        mix=mix,
        seed=seed,
        step=step,
    )
    loss, covered = _scalable_cross_entropy(states, table, targets, common, candidates)
    return (loss, covered) if reduction == "none" else loss


@dataclass(frozen=True, slots=True, kw_only=True)
class HardBuckets(Candidates):
    """Candidates of ``scalable_cross_entropy``: the items of a position's buckets.

    A slot is a (position, bucket) pair. Attributes are the arguments of ``scalable_cross_entropy``.
    """

    num_buckets: int | None
    positions_per_bucket: int | None
    items_per_bucket: int
    mix: bool
    seed: int
    step: int

    def choose(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """(P,) position and (P,) bucket of every pair, and (n_b, b_y) items of every bucket; int64.

        Collectives: those of ``bucket_centres`` and ``fill_buckets``.
        """
        num_buckets, per_bucket = self._numbers(inputs.layout.num_positions)
        centres = bucket_centres(inputs, num_buckets, self.mix, self.seed, self.step)
        buckets = fill_buckets(inputs, centres, per_bucket, self.items_per_bucket)
        return *buckets.pairs(), buckets.items

    def choice_shapes(
        self, num_positions: int, num_rows: int
    ) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shapes and dtypes of the three tensors of ``choose``: (P,), (P,) and (n_b, b_y) int64."""
        num_buckets, _ = self._numbers(num_positions)
        pairs = (self.num_slots(num_positions, num_rows),)
        items = num_buckets, torch.sym_min(self.items_per_bucket, num_rows)
        return (pairs, torch.int64), (pairs, torch.int64), (items, torch.int64)

    def num_slots(self, num_positions: int, num_rows: int) -> int:
        """P, the number of (position, bucket) pairs."""
        num_buckets, per_bucket = self._numbers(num_positions)
        return num_buckets * torch.sym_min(per_bucket, num_positions)

    def used_items(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Tensor:
        """(n,) int64 items of all buckets and all targets; one all-gather of the targets."""
        return torch.cat([tensors[2].flatten(), inputs.layout.gather_all(inputs.targets)])

    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> "_BucketItems":
        """One block of logits for each bucket."""
        return _BucketItems(local, *tensors)

    def _numbers(self, num_positions: int) -> tuple[int, int]:
        """n_b and b_x, with the defaults filled in."""
        default = default_num_buckets(num_positions)
        numbers = (self.num_buckets, self.positions_per_bucket)
        first, second = (default if number is None else number for number in numbers)
        return first, second


class _BucketItems(Plan):
    """The candidates of a pair are the items of its bucket; a slot is a pair.

    Pairs are (P,) int64 global positions of all ranks, ascending, and (P,) int64 buckets.
    """

    def __init__(self, inputs: Inputs, positions: Tensor, buckets: Tensor, items: Tensor) -> None:
        super().__init__(inputs)
        # Ascending items let a CPU find the targets among them by binary search.
        self._positions, self._buckets, self._items = positions, buckets, items.sort(1).values
        layout = inputs.layout
        self._slot_borders = [0, positions.numel()]
        if layout.ranks.group is not None:
            borders = torch.tensor(layout.borders, device=positions.device)
            self._slot_borders = torch.searchsorted(positions, borders).tolist()
        start, end = self._slot_borders[layout.ranks.rank : layout.ranks.rank + 2]
        self.num_slots = end - start
        self.slot_positions = positions[start:end] - layout.first_position

    def slots(self, chunk: Chunk) -> Chunk:
        rank = self.layout.ranks.rank
        if isinstance(chunk.own, slice):
            return Chunk.whole(self._slot_borders, rank, self.layout.device)
        slots = (self._places(chunk) >= 0).nonzero()[:, 0]
        return Chunk.of(slots, self._slot_borders, rank)

    def _places(self, chunk: Chunk) -> Tensor:
        """(P,) int64 index in the chunk of the position of each pair, -1 for none."""
        return RowIds(0, chunk.positions.numel(), chunk.positions).find(self._positions)

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        positions, buckets = self._positions, self._buckets
        if not isinstance(chunk.own, slice):
            place = self._places(chunk)
            slots = (place >= 0).nonzero()[:, 0]
            positions, buckets = place[slots], buckets[slots]
        in_order, order = buckets.sort(stable=True)
        numbers = torch.arange(self._items.shape[0] + 1, device=order.device)
        starts = torch.searchsorted(in_order, numbers)
        blocks = blocks_of_items(positions[order], starts, self._items, row_ids, targets)
        return replace(blocks, pair_slots=order)


_scalable_cross_entropy = Operator("scalable_cross_entropy", HardBuckets)


def scalable_cross_entropy_cost(
    work: Workload, num_buckets: int | None, positions_per_bucket: int | None, items_per_bucket: int
) -> LossCost:
    """Cost of one step of SCE on one rank, if all buckets choose different items.

    There are three projections, of states onto random signs and of centres onto states and onto
    rows; the blocks of the buckets are computed in forward and recomputed in backward.
    """
    default = default_num_buckets(work.num_positions)
    num_buckets, per_bucket = num_buckets or default, positions_per_bucket or default
    listed = num_buckets * min(items_per_bucket, work.num_items)
    touched = expected_distinct(listed + work.num_positions, work.num_items) / work.num_ranks
    rows = min(work.num_rows, round(touched))
    # Backward needs one bucket per position: the one with the largest loss.
    per_bucket = min(per_bucket, work.num_positions)
    pairs = listed * per_bucket / work.num_ranks
    kept = min(1.0, work.num_positions / (num_buckets * per_bucket))
    lists = 24 * num_buckets * (per_bucket + items_per_bucket)
    if work.on_cpu:
        choices = select_cost(num_buckets, 2 * work.own_positions + work.num_rows, work)
        kernels = choices + listed_cost(pairs, per_bucket, work, kept=kept)
        tiles = cpu_tiles().listed_bytes(work.width, per_bucket)
    else:
        shape = Listed(
            pairs=pairs,
            positions=per_bucket,
            rows=listed / num_buckets / work.num_ranks,
            entries=listed / work.num_ranks,
            touched=rows,
            kept=kept,
        )
        kernels = _choice_kernels(work, num_buckets, per_bucket, items_per_bucket)
        kernels += listed_kernels(shape, work)
        tiles = max(listed_bytes(shape.entries, work), topk_bytes(num_buckets, work.num_rows))
    return LossCost(
        touched_rows=rows,
        is_dense=False,
        workspace_bytes=rows * work.width * work.stored_bytes
        # Under autocast the search for the nearest rows casts all of them.
        + accumulator_bytes(work.num_rows if work.is_cast else rows, work)
        + lists
        + tiles
        + streaming_bytes(work),
        work=kernels,
        received=state_traffic(work),
    )


def _choice_kernels(
    work: Workload, num_buckets: int, per_bucket: int, items_per_bucket: int
) -> KernelCost:
    """Cost of the centres, and of the choice of positions and rows near them, in Triton."""
    return (
        sign_kernels("mixed_signs", num_buckets, work.own_positions, work)
        + topk_kernels(num_buckets, work.own_positions, per_bucket, work)
        + topk_kernels(num_buckets, work.num_rows, items_per_bucket, work)
    )
