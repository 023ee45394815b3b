"""Cost of a loss on one rank, and the FLOP and bytes of the kernels that it is made of.

FLOP are those of matrix products, two for a multiply-add. Bytes are memory reads and writes if
nothing but a kernel's own tile stays in a cache, an upper bound.
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
    """FLOP and memory traffic of kernels; supports ``a + b`` and ``number * a``.

    Attributes:
        flops: FLOP of matrix products.
        bytes: Bytes read and written.
    """

    flops: float
    bytes: float

    def __add__(self, other: "KernelCost") -> "KernelCost":
        """The cost of both kernels, one after the other."""
        return KernelCost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "KernelCost":
        """The cost of ``times`` calls."""
        return KernelCost(times * self.flops, times * self.bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """Cost of one training step of a loss on one rank.

    Attributes:
        touched_rows: rows of this shard that get a gradient.
        is_dense: True if the gradient is (R, D), False if it has one vector per touched row.
        workspace_bytes: peak memory of forward and backward, in addition to states and the
            gradient of rows.
        work: cost of all kernels, forward and backward.
        received: bytes received from other ranks, by name.
        table_bytes: bytes of tables that the proposal keeps between steps.
    """

    touched_rows: int
    is_dense: bool
    workspace_bytes: int
    work: KernelCost
    received: Mapping[str, float]
    table_bytes: int = 0

    @property
    def flops(self) -> float:
        """FLOP of matrix products, forward and backward."""
        return self.work.flops


def full_cost(products: int, positions: int, work: Workload) -> KernelCost:
    """Cost of the full softmax on a CPU, forward and backward.

    Args:
        products: 3 if the gradient is computed in forward, 4 if both passes compute the logits.
        positions: Positions per tile; the rows are read, and their gradient is read and written,
            once per tile.
        work: Sizes of the step.
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
    """Cost of the log-sum-exp of listed blocks on a CPU, forward and backward.

    Each row of a block is copied once for all positions of the block, and its gradient is summed.

    Args:
        pairs: Number of (position, row) pairs over all blocks.
        pairs_per_row: Pairs that share one copy of a row: the positions of a block.
        work: Sizes of the step.
        products: 3 if the gradient is computed in forward, else 4.
        kept: Share of the pairs with a gradient in backward.
    """
    in_backward = kept * 3 if products == 4 else 2
    copies = pairs / max(1.0, pairs_per_row) * work.width
    passes = products - 2
    return KernelCost(
        2 * pairs * work.width * (1 + in_backward),
        copies * (passes * 2 * work.element_bytes + 3 * 4),
    )


def select_cost(directions: int, vectors: int, work: Workload) -> KernelCost:
    """Cost of projecting vectors onto directions on a CPU, without storing all scores."""
    read = work.element_bytes * work.width * (vectors + directions)
    return KernelCost(2.0 * directions * vectors * work.width, read)


def accumulator_bytes(rows: int, work: Workload) -> int:
    """Bytes that products in half precision take for rows: 0 for products in float32.

    Under autocast a copy of the float32 rows, whose gradient is the accumulator; for rows stored in
    half precision a float32 accumulator of their gradient.
    """
    size = work.element_bytes if work.is_cast else 4
    return size * rows * work.width * (work.element_bytes < 4)


def expected_distinct(num_draws: float, num_items: int) -> int:
    """Expected number of distinct items in ``num_draws`` uniform draws from ``num_items``.

    Example:
        >>> expected_distinct(1, 10), expected_distinct(1e9, 10), expected_distinct(1000, 1000)
        (1, 10, 632)
    """
    if num_items <= 1:
        return num_items
    return round(-num_items * math.expm1(num_draws * math.log1p(-1 / num_items)))


def streaming_bytes(work: Workload, *, listed: bool = True) -> int:
    """Bytes of the chunks of positions in memory at a time, the same for every W > 1.

    Counted are three chunks of states: the current one, the next one in flight, and a copy of one
    if ranks have different sizes; and two chunks of float32 gradients: the current one, and the
    padded one before, in flight. A single process uses its own states and copies nothing.

    Args:
        work: Sizes of the step.
        listed: As in ``num_chunks``.
    """
    if work.num_ranks == 1:
        return 0
    state_bytes = work.width * work.element_bytes
    parts = num_chunks(work.num_positions, state_bytes, listed=listed, on_cpu=work.on_cpu)
    chunk = -(-work.num_positions // parts) * work.width
    return chunk * (3 * work.element_bytes + 2 * 4)
