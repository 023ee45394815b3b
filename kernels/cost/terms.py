"""What a loss costs a rank: each kernel's FLOP and bytes, and the terms of a loss made of them.

FLOP are those of products, two for a multiply-add. Bytes are what a kernel reads and writes where
nothing but its own tile stays in a cache; what does stay is read faster than memory gives it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardrec.kernels.ranks.traffic import Workload, num_chunks

__all__ = [
    "KernelCost",
    "LossCost",
    "accumulator_bytes",
    "expected_distinct",
    "full_cost",
    "listed_cost",
    "select_cost",
    "streaming_bytes",
]


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Arithmetic and traffic of kernels; they add up, and multiply by a number of calls.

    Attributes:
        flops: Of products.
        bytes: Read and written.
    """

    flops: float
    bytes: float

    def __add__(self, other: "KernelCost") -> "KernelCost":
        """Both, one after the other."""
        return KernelCost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "KernelCost":
        """So many calls."""
        return KernelCost(times * self.flops, times * self.bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """What one step of a loss costs one rank.

    Attributes:
        touched_rows: rows of this shard that get a gradient.
        is_dense: whether that gradient is (R, D) and not one vector a touched row.
        workspace_bytes: most memory in addition to states and the rows' gradient, in either pass.
        work: of its kernels, forward and backward.
        received: bytes that arrive from other ranks, by what they are.
        table_bytes: of what its proposal keeps from step to step.
    """

    touched_rows: int
    is_dense: bool
    workspace_bytes: int
    work: KernelCost
    received: Mapping[str, float]
    table_bytes: int = 0

    @property
    def flops(self) -> float:
        """Of products, forward and backward."""
        return self.work.flops


def full_cost(products: int, positions: int, work: Workload) -> KernelCost:
    """The block log-sum-exp of all positions times all rows on a CPU, forward and backward.

    Args:
        products: 3 where the gradient is taken in forward, 4 where either pass makes the logits.
        positions: Of a tile; the rows are read, and their gradient is read and written, once a
            tile.
        work: Sizes.
    """
    pairs = float(work.num_positions) * work.num_rows
    tiles = -(-work.num_positions // max(1, positions))
    states = work.num_positions * work.width * (work.element_bytes * (products - 1) + 4)
    rows = work.num_rows * work.width * (work.element_bytes * (products - 1) + 8)
    return KernelCost(2 * products * pairs * work.width, states + tiles * rows)


def listed_cost(
    pairs: float,
    pairs_per_row: float,
    work: Workload,
    *,
    products: int = 4,
    kept: float = 1.0,
) -> KernelCost:
    """The block log-sum-exp of listed blocks on a CPU, forward and backward.

    A row of a block is copied for its pairs, and its gradient is added up.

    Args:
        pairs: Of positions and rows, over all blocks.
        pairs_per_row: How many of them share a copied row: the positions of a block.
        work: Sizes.
        products: 3 where the gradient is taken in forward, else 4.
        kept: Share of the pairs that backward looks at.
    """
    in_backward = kept * 3 if products == 4 else 2
    copies = pairs / max(1.0, pairs_per_row) * work.width
    passes = products - 2
    return KernelCost(
        2 * pairs * work.width * (1 + in_backward),
        copies * (passes * 2 * work.element_bytes + 3 * 4),
    )


def select_cost(directions: int, vectors: int, work: Workload) -> KernelCost:
    """A projection of vectors onto directions on a CPU; only the best entries are kept."""
    read = work.element_bytes * work.width * (vectors + directions)
    return KernelCost(2.0 * directions * vectors * work.width, read)


def accumulator_bytes(rows: int, work: Workload) -> int:
    """Bytes of the float32 gradient of rows that is rounded to their own, narrower dtype."""
    return 4 * rows * work.width * (work.element_bytes < 4)


def expected_distinct(num_draws: float, num_items: int) -> int:
    """Expected number of distinct items in uniform draws of ``num_items``.

    Example:
        >>> expected_distinct(1, 10), expected_distinct(1e9, 10), expected_distinct(1000, 1000)
        (1, 10, 632)
    """
    if num_items <= 1:
        return num_items
    return round(-num_items * math.expm1(num_draws * math.log1p(-1 / num_items)))


def streaming_bytes(work: Workload, *, listed: bool = True) -> int:
    """Workspace of the chunks of positions that are in memory, which W does not change.

    Two chunks of states, the one that is worked on and the next one, one of them once more where
    ranks have unlike shares; and of float32 gradients the one that is made, and the one before,
    padded, on its way back. One process works on its own states and copies nothing.

    Args:
        work: The step.
        listed: As in ``num_chunks``.
    """
    if work.num_ranks == 1:
        return 0
    parts = num_chunks(work.num_positions, work.width * work.element_bytes, listed=listed)
    chunk = -(-work.num_positions // parts) * work.width
    return chunk * (3 * work.element_bytes + 2 * 4)
