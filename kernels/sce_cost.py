"""What scalable cross-entropy costs."""

import torch

from shardrec.kernels.block_logsumexp.cpu_tiles import cpu_tiles
from shardrec.kernels.cost.triton import (
    Listed,
    listed_bytes,
    listed_kernels,
    sign_kernels,
    topk_kernels,
)
from shardrec.kernels.cost.workload import (
    KernelCost,
    LossCost,
    Workload,
    accumulator_bytes,
    expected_distinct,
    listed_cost,
    select_cost,
    state_traffic,
    streaming_bytes,
)

__all__ = ["default_num_buckets", "scalable_cross_entropy_cost"]


def default_num_buckets(num_positions: int) -> int:
    """``2 sqrt(N)``, the paper's recommendation for both n_b and b_x, at least 1.

    >>> default_num_buckets(10000)
    200
    """
    return torch.sym_max(1, round(2 * torch.sym_sqrt(num_positions)))


def scalable_cross_entropy_cost(
    work: Workload, num_buckets: int | None, positions_per_bucket: int | None, items_per_bucket: int
) -> LossCost:
    """What hard buckets cost a rank, where every bucket chooses other items.

    Three projections are chosen from (states to centres, centres to states and to rows) and the
    buckets' blocks are computed in forward and again in backward.
    """
    default = default_num_buckets(work.num_positions)
    num_buckets, per_bucket = num_buckets or default, positions_per_bucket or default
    listed = num_buckets * min(items_per_bucket, work.num_items)
    touched = expected_distinct(listed + work.num_positions, work.num_items) / work.num_ranks
    rows = min(work.num_rows, round(touched))
    # In backward a position has one bucket left of those it is in.
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
        tiles = listed_bytes(shape.entries, work)
    return LossCost(
        touched_rows=rows,
        is_dense=False,
        workspace_bytes=rows * work.width * work.element_bytes
        + accumulator_bytes(rows, work)
        + lists
        + tiles
        + streaming_bytes(work),
        work=kernels,
        received=state_traffic(work),
    )


def _choice_kernels(
    work: Workload, num_buckets: int, per_bucket: int, items_per_bucket: int
) -> KernelCost:
    """Of the centres and of the positions and rows near them."""
    return (
        sign_kernels("mixed_signs", num_buckets, work.own_positions, work)
        + topk_kernels(num_buckets, work.own_positions, per_bucket, work)
        + topk_kernels(num_buckets, work.num_rows, items_per_bucket, work)
    )
