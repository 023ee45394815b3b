"""What a loss costs a rank: each kernel's FLOP and bytes, and the terms of a loss made of them.

FLOP are those of products, two for a multiply-add. Bytes are what a kernel reads and writes where
nothing but its own tile stays in a cache; what does stay is read faster than memory gives it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "KernelCost",
    "LossCost",
    "Workload",
    "accumulator_bytes",
    "cheaper",
    "expected_distinct",
    "full_cost",
    "listed_cost",
    "num_chunks",
    "row_traffic",
    "select_cost",
    "state_traffic",
    "streaming_bytes",
]

MIB = 1 << 20
# States of a chunk: at most these are in memory for one chunk of positions.
MOST_CHUNK_BYTES = 16 * MIB
# Smaller chunks cost more than is saved by what travels beside the work of another. For the full
# softmax a chunk costs a few calls: on two CPU ranks (N=8,192, D=128) four took as long as one. A
# list of blocks is made for every chunk and its blocks get smaller: there four chunks of 1 MiB took
# 1.3 (sce), 1.5 (cce_minus) and 1.9 (rece) times as long as one, against some ms saved.
LEAST_FULL_BYTES = MIB
LEAST_LISTED_BYTES = 8 * MIB
# Entries of listed blocks whose gradients Triton holds together, where N is smaller.
LEAST_ENTRIES = 1 << 14
# With so many chunks at most a quarter of the states travels before there is work to do.
LEAST_CHUNKS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One step of a loss as the busiest rank sees it.

    Attributes:
        num_positions: N over all ranks.
        num_items: V.
        num_ranks: W.
        width: D.
        element_bytes: of states and rows.
        on_cpu: whether the plain path works, with the tiles of a CPU; else Triton does.
        architecture: whose tiles Triton takes, 90 as in sm_90; 0 is its interpreter.
    """

    num_positions: int
    num_items: int
    num_ranks: int
    width: int
    element_bytes: int = 4
    on_cpu: bool = True
    architecture: int = 90

    @property
    def own_positions(self) -> int:
        """N of one rank."""
        return -(-self.num_positions // self.num_ranks)

    @property
    def num_rows(self) -> int:
        """R, rows of the largest shard."""
        return -(-self.num_items // self.num_ranks)


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
        workspace_bytes: most memory beside states and the rows' gradient, in forward or backward.
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
    """How many of ``num_items`` are met, on average, in uniform draws.

    Example:
        >>> expected_distinct(1, 10), expected_distinct(1e9, 10), expected_distinct(1000, 1000)
        (1, 10, 632)
    """
    if num_items <= 1:
        return num_items
    return round(-num_items * math.expm1(num_draws * math.log1p(-1 / num_items)))


def num_chunks(num_positions: int, state_bytes: int, *, listed: bool) -> int:
    """In how many chunks the states of all ranks travel.

    As many as keep a chunk within ``MOST_CHUNK_BYTES``, and ``LEAST_CHUNKS`` where none of them
    falls below the least that pays: then most of the states travel while others are worked on.

    Args:
        num_positions: N over all ranks.
        state_bytes: Of one state.
        listed: Whether blocks are listed for every chunk; else it meets all rows.

    >>> [num_chunks(n, 256, listed=False) for n in (1_000, 10_000, 20_000, 1_000_000)]
    [1, 2, 4, 16]
    >>> [num_chunks(n, 256, listed=True) for n in (20_000, 70_000, 1_000_000)]
    [1, 2, 16]
    """
    total = num_positions * state_bytes
    least = LEAST_LISTED_BYTES if listed else LEAST_FULL_BYTES
    return max(1, -(-total // MOST_CHUNK_BYTES), min(LEAST_CHUNKS, total // least))


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


def state_traffic(work: Workload, gathers: int = 2) -> dict[str, float]:
    """Bytes of states and their gradients that a rank receives, by name.

    Args:
        work: The step.
        gathers: How often the states travel; 2 where backward asks for them again.
    """
    others = work.num_positions * (1 - 1 / work.num_ranks) * work.width
    name = "states, twice" if gathers == 2 else "states"
    return {name: gathers * work.element_bytes * others, "gradients of states": 4 * others}


def row_traffic(work: Workload, shared: float, fetched: float) -> dict[str, float]:
    """Bytes of rows and their gradients that a rank receives where the states stay, by name.

    Args:
        work: The step.
        shared: Rows that every rank needs.
        fetched: Rows that this rank needs besides, of any shard.
    """
    vectors = (shared + fetched) * (1 - 1 / work.num_ranks) * work.width
    return {"candidates": work.element_bytes * vectors, "gradients of candidates": 4 * vectors}


def cheaper(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether fewer bytes travel the first way.

    >>> cheaper({"states": 3.0, "gradients": 2.0}, {"rows": 5.0})
    False
    """
    return sum(one.values()) < sum(other.values())
