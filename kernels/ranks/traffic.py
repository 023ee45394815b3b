"""Communication volume between ranks: bytes of states and rows, and the number of chunks."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Workload", "num_chunks", "row_traffic", "sends_fewer_bytes", "state_traffic"]

MIB = 1 << 20
# Upper limit of the states of one chunk of positions.
MOST_CHUNK_BYTES = 16 * MIB
# Smaller chunks cost more than overlapping communication and computation saves. For the full
# softmax a chunk costs a few calls: on two CPU ranks (N=8,192, D=128) four took as long as one. For
# listed blocks, a list is built for every chunk and its blocks get smaller: four chunks of 1 MiB
# took 1.3 (sce), 1.5 (cce_minus) and 1.9 (rece) times as long as one, and saved a few ms.
LEAST_FULL_BYTES = MIB
LEAST_LISTED_BYTES = 8 * MIB
# With four chunks, a quarter of the states is sent before computation can start.
LEAST_CHUNKS = 4
# On a GPU all of these are larger: it waits for the launches of a chunk, and every chunk reads and
# writes the gradient of the rows in use once more.
GPU_TIMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The sizes of one training step, for the rank with the most positions and rows.

    Attributes:
        num_positions: N over all ranks.
        num_items: V.
        num_ranks: W.
        width: D.
        element_bytes: bytes per number of states and rows in products.
        is_cast: whether states and rows are float32 outside of products, as under autocast.
        on_cpu: True for the plain PyTorch kernels on a CPU, False for Triton.
        architecture: GPU architecture that selects the Triton tiles, 90 for sm_90; 0 for the
            interpreter.
    """

    num_positions: int
    num_items: int
    num_ranks: int
    width: int
    element_bytes: int = 4
    is_cast: bool = False
    on_cpu: bool = True
    architecture: int = 90

    @property
    def stored_bytes(self) -> int:
        """Bytes per number of states and rows outside of products."""
        return 4 if self.is_cast else self.element_bytes

    @property
    def own_positions(self) -> int:
        """Positions per rank, rounded up."""
        return -(-self.num_positions // self.num_ranks)

    @property
    def num_rows(self) -> int:
        """R, rows of the largest shard: rows per rank, rounded up."""
        return -(-self.num_items // self.num_ranks)


def num_chunks(num_positions: int, state_bytes: int, *, listed: bool, on_cpu: bool = True) -> int:
    """Number of chunks in which the states of all ranks are sent.

    Enough that no chunk exceeds ``MOST_CHUNK_BYTES``, and at least ``LEAST_CHUNKS`` as long as
    chunks stay above ``LEAST_FULL_BYTES`` or ``LEAST_LISTED_BYTES``, so that communication overlaps
    with computation.

    Args:
        num_positions: N over all ranks.
        state_bytes: Bytes of one state.
        listed: True if the loss lists blocks for each chunk, False for the full softmax.
        on_cpu: False for a GPU, whose chunks are ``GPU_TIMES`` as large.

    >>> [num_chunks(n, 256, listed=False) for n in (1_000, 10_000, 20_000, 1_000_000)]
    [1, 2, 4, 16]
    >>> [num_chunks(n, 256, listed=True) for n in (20_000, 70_000, 1_000_000)]
    [1, 2, 16]
    """
    total = num_positions * state_bytes
    times = 1 if on_cpu else GPU_TIMES
    least = times * (LEAST_LISTED_BYTES if listed else LEAST_FULL_BYTES)
    return max(1, -(-total // (times * MOST_CHUNK_BYTES)), min(LEAST_CHUNKS, total // least))


def state_traffic(work: Workload, gathers: int = 2) -> dict[str, float]:
    """Bytes of states and their gradients that a rank receives, by name.

    Args:
        work: Sizes of the step.
        gathers: How often the states are all-gathered; 2 if backward needs them again.
    """
    others = work.num_positions * (1 - 1 / work.num_ranks) * work.width
    name = "states, twice" if gathers == 2 else "states"
    return {name: gathers * work.element_bytes * others, "gradients of states": 4 * others}


def row_traffic(work: Workload, shared: float, fetched: float) -> dict[str, float]:
    """Bytes of rows and their gradients that a rank receives if it fetches rows, by name.

    Args:
        work: Sizes of the step.
        shared: Rows that every rank needs.
        fetched: Further rows that only this rank needs, of any shard.
    """
    vectors = (shared + fetched) * (1 - 1 / work.num_ranks) * work.width
    return {"candidates": work.stored_bytes * vectors, "gradients of candidates": 4 * vectors}


def sends_fewer_bytes(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """True if plan ``one`` receives fewer bytes than plan ``other``.

    >>> sends_fewer_bytes({"states": 3.0, "gradients": 2.0}, {"rows": 5.0})
    False
    """
    return sum(one.values()) < sum(other.values())
