"""Where the positions of a batch and the rows of a table are: one process here, ranks elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Alone", "Chunk", "Exchange", "chunk_members"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A set of positions of all ranks that are worked on together.

    Attributes:
        positions: (n,) int64 global positions, ascending.
        own: (n_own,) int64 local positions of this rank among them, ascending.
        own_slice: Where this rank's positions stand in ``positions``.
        counts: Number of positions of each rank.
    """

    positions: Tensor
    own: Tensor
    own_slice: slice
    counts: tuple[int, ...]


class Exchange(Protocol):
    """What a loss needs from the other ranks. A rank's positions are one range of the global batch.

    Attributes:
        rank: Index of this rank.
        first_position: Global index of this rank's first position.
        num_positions: Positions of all ranks.
        min_chunks: Number of chunks that bounds what is in memory of other ranks.
        largest_shard: Rows of the largest shard.
    """

    rank: int
    first_position: int
    num_positions: int
    min_chunks: int
    largest_shard: int

    def even_chunks(self, num_chunks: int) -> Tensor:
        """(num_positions,) int64 chunk of each global position, an even share of every rank."""
        ...

    def chunks(self, chunk_of: Tensor) -> Iterator[Chunk]:
        """The chunks of an assignment, in the same order on every rank."""
        ...

    def gather(self, local: Tensor, chunk: Chunk) -> Tensor:
        """(n, ...) values at the chunk's positions; each rank gives (N, ...) of its own."""
        ...

    def reduce_scatter(self, full: Tensor, chunk: Chunk) -> Tensor:
        """(n_own, D) sum over ranks of (n, D) values, at this rank's positions."""
        ...

    def gather_all(self, local: Tensor) -> Tensor:
        """(num_positions, ...) values at all positions; for integers, not for states."""
        ...

    def stack(self, local: Tensor) -> Tensor:
        """(W, ...) tensors of all ranks, all of one shape."""
        ...

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks; no gradient."""
        ...

    def max(self, local: Tensor) -> Tensor:
        """Maximum over ranks; no gradient."""
        ...

    def total(self, local: Tensor) -> Tensor:
        """Sum over ranks, whose gradient for this rank's term is the gradient of the sum."""
        ...


class Alone:
    """The exchange of a single process: nothing travels."""

    rank = 0
    first_position = 0
    min_chunks = 1

    def __init__(self, num_positions: int, num_rows: int, device: torch.device) -> None:
        """Stores the number of positions N and of rows V, and where they are."""
        self.num_positions = num_positions
        self.largest_shard = num_rows
        self._device = device

    def even_chunks(self, num_chunks: int) -> Tensor:
        """(N,) int64 chunk of each position."""
        positions = torch.arange(self.num_positions, device=self._device)
        return positions * num_chunks // max(self.num_positions, 1)

    def chunks(self, chunk_of: Tensor) -> Iterator[Chunk]:
        """The chunks of an assignment."""
        for positions in chunk_members(chunk_of):
            yield Chunk(positions, positions, slice(0, positions.numel()), (positions.numel(),))

    def gather(self, local: Tensor, chunk: Chunk) -> Tensor:
        """The values at the chunk's positions; no copy when these are all."""
        return local if chunk.positions.numel() == self.num_positions else local[chunk.positions]

    def reduce_scatter(self, full: Tensor, chunk: Chunk) -> Tensor:
        """The tensor itself."""
        return full

    def gather_all(self, local: Tensor) -> Tensor:
        """The tensor itself."""
        return local

    def stack(self, local: Tensor) -> Tensor:
        """(1, ...) the tensor itself."""
        return local[None]

    def sum(self, local: Tensor) -> Tensor:
        """The tensor itself."""
        return local

    def max(self, local: Tensor) -> Tensor:
        """The tensor itself."""
        return local

    def total(self, local: Tensor) -> Tensor:
        """The tensor itself."""
        return local


def chunk_members(chunk_of: Tensor) -> Iterator[Tensor]:
    """Ascending int64 positions of each chunk in turn, empty chunks left out."""
    order = torch.argsort(chunk_of, stable=True)
    _, sizes = torch.unique_consecutive(chunk_of[order], return_counts=True)
    yield from order.split(sizes.tolist())
