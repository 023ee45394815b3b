"""What a loss costs a rank: the terms, in which each loss's file says its own formula."""

import math
from dataclasses import dataclass

__all__ = ["LossCost", "Workload", "expected_distinct", "streaming_bytes"]

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One step of a loss as the busiest rank sees it.

    Attributes:
        num_positions: N over all ranks.
        num_items: V.
        num_ranks: W.
        width: D.
        element_bytes: of states and rows.
        on_cpu: whether the plain path works, with the tiles of a CPU.
    """

    num_positions: int
    num_items: int
    num_ranks: int
    width: int
    element_bytes: int = 4
    on_cpu: bool = True

    @property
    def own_positions(self) -> int:
        """N of one rank."""
        return -(-self.num_positions // self.num_ranks)

    @property
    def num_rows(self) -> int:
        """R, rows of the largest shard."""
        return -(-self.num_items // self.num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """What one step of a loss costs one rank.

    Attributes:
        touched_rows: rows of this shard that get a gradient.
        is_dense: whether that gradient is (R, D) and not one vector a touched row.
        workspace_bytes: most memory beside states and the rows' gradient, in forward or backward.
        flops: of products, forward and backward.
    """

    touched_rows: int
    is_dense: bool
    workspace_bytes: int
    flops: float


def expected_distinct(num_draws: float, num_items: int) -> int:
    """How many of ``num_items`` are met, on average, in uniform draws.

    Example:
        >>> expected_distinct(1, 10), expected_distinct(1e9, 10), expected_distinct(1000, 1000)
        (1, 10, 632)
    """
    if num_items <= 1:
        return num_items
    return round(-num_items * math.expm1(num_draws * math.log1p(-1 / num_items)))


def streaming_bytes(work: Workload) -> int:
    """Workspace of one chunk of positions: those of other ranks, and the gradient sent back.

    One process works on its own states and copies nothing.
    """
    if work.num_ranks == 1:
        return 0
    chunk = min(work.num_positions, 16_384)
    return 3 * chunk * work.width * work.element_bytes
