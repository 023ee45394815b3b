"""Where the positions of a batch and the rows of a table are: one process here, ranks elsewhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Alone", "Chunk", "Exchange", "Gradients", "Wait", "chunk_members", "prefetched"]

# Waits for a tensor that is under way; called once, in the order in which the tensors were sent.
Wait = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A set of positions of all ranks that are worked on together.

    Slots and rows form chunks too: whatever has global numbers of which each rank has one range.

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

    @classmethod
    def of(cls, positions: Tensor, borders: Sequence[int], rank: int) -> "Chunk":
        """The chunk of some positions.

        Args:
            positions: (n,) int64 global positions, ascending.
            borders: W + 1 positions; rank r has those from ``borders[r]`` to ``borders[r + 1]``.
            rank: This rank.

        >>> Chunk.of(torch.tensor([1, 4, 5]), (0, 3, 6), 1).own.tolist()
        [1, 2]
        """
        limits = torch.tensor(borders, device=positions.device)
        splits = torch.searchsorted(positions, limits).tolist()
        own = slice(splits[rank], splits[rank + 1])
        counts = tuple(end - start for start, end in pairwise(splits))
        return cls(positions, positions[own] - borders[rank], own, counts)


class Exchange(Protocol):
    """What a loss needs from the other ranks. A rank's positions are one range of the global batch.

    Attributes:
        rank: Index of this rank.
        first_position: Global index of this rank's first position.
        num_positions: Positions of all ranks.
        borders: W + 1 global positions, where the range of each rank begins and the last ends.
        row_borders: W + 1 global items, where each shard begins and the last ends.
        min_chunks: Number of chunks that bounds what is in memory of other ranks, with listed
            blocks.
        full_chunks: The same where every position meets all rows, and a chunk costs less.
        largest_shard: Rows of the largest shard.
        layout: (W, 2) int64 on the CPU, positions and rows of each rank; None without other ranks.
    """

    rank: int
    first_position: int
    num_positions: int
    borders: Sequence[int]
    row_borders: Sequence[int]
    min_chunks: int
    full_chunks: int
    largest_shard: int
    layout: Tensor | None

    def even_chunks(self, num_chunks: int) -> Tensor:
        """(num_positions,) int64 chunk of each global position, an even share of every rank."""
        ...

    def chunks(self, chunk_of: Tensor) -> Iterator[Chunk]:
        """The chunks of an assignment, in the same order on every rank."""
        ...

    def gather(self, local: Tensor, chunk: Chunk) -> Tensor:
        """(n, ...) values at the chunk's positions; each rank gives (N, ...) of its own."""
        ...

    def start_gather(self, local: Tensor, chunk: Chunk) -> Wait:
        """Begins a ``gather`` and goes on; what it returns waits for the values."""
        ...

    def reduce_scatter(self, full: Tensor, chunk: Chunk) -> Tensor:
        """(n_own, D) sum over ranks of (n, D) values, at this rank's positions."""
        ...

    def start_reduce_scatter(self, full: Tensor, chunk: Chunk) -> Wait:
        """Begins a ``reduce_scatter`` and goes on; what it returns waits for the sums."""
        ...

    def swap(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Tensor:
        """(sum(received_counts), ...) lines for this rank; the others get ``sent``, by rank."""
        ...

    def gather_all(self, local: Tensor) -> Tensor:
        """(num_positions, ...) values at all positions; for integers, not for states."""
        ...

    def stack(self, local: Tensor) -> Tensor:
        """(W, ...) tensors of all ranks, all of one shape."""
        ...

    def start_stack(self, local: Tensor) -> Wait:
        """Begins a ``stack`` and goes on; what it returns waits for the tensors."""
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
    full_chunks = 1
    layout: Tensor | None = None

    def __init__(self, num_positions: int, num_rows: int, device: torch.device) -> None:
        """Stores the number of positions N and of rows V, and where they are."""
        self.num_positions = num_positions
        self.borders: Sequence[int] = (0, num_positions)
        self.row_borders: Sequence[int] = (0, num_rows)
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

    def start_gather(self, local: Tensor, chunk: Chunk) -> Wait:
        """The values at the chunk's positions, taken when they are asked for."""
        return lambda: self.gather(local, chunk)

    def reduce_scatter(self, full: Tensor, chunk: Chunk) -> Tensor:
        """The tensor itself."""
        return full

    def start_reduce_scatter(self, full: Tensor, chunk: Chunk) -> Wait:
        """The tensor itself."""
        return lambda: full

    def swap(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Tensor:
        """The tensor itself."""
        return sent

    def gather_all(self, local: Tensor) -> Tensor:
        """The tensor itself."""
        return local

    def stack(self, local: Tensor) -> Tensor:
        """(1, ...) the tensor itself."""
        return local[None]

    def start_stack(self, local: Tensor) -> Wait:
        """Nothing travels."""
        return lambda: local[None]

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


def prefetched(
    chunks: Iterable[Chunk], start: Callable[[Chunk], Sequence[Wait]]
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with what was fetched for it, while that of the next chunk is under way.

    At most two chunks are in memory, whatever the number of ranks.

    Args:
        chunks: In the same order on every rank.
        start: Begins to fetch what a chunk needs, with the same collectives on every rank.

    >>> def start(chunk):
    ...     print("start", chunk.positions.tolist())
    ...     return [lambda: chunk.positions * 10]
    >>> alone = Alone(2, 1, torch.device("cpu"))
    >>> for _, (fetched,) in prefetched(alone.chunks(torch.arange(2)), start):
    ...     print(fetched.tolist())
    start [0]
    start [1]
    [0]
    [10]
    """
    under_way = ((chunk, start(chunk)) for chunk in chunks)
    current = next(under_way, None)
    while current is not None:
        following = next(under_way, None)
        chunk, waits = current
        yield chunk, [wait() for wait in waits]
        current = following


class Gradients:
    """Gradients on their way back to the ranks whose positions they are, chunk by chunk.

    Those of one chunk travel while the next one is worked on.

    Attributes:
        total: (N, D) gradient of this rank's positions; complete after ``finish``.
    """

    def __init__(self, exchange: Exchange, total: Tensor) -> None:
        """Stores the way, and the tensor that takes what arrives."""
        self.total = total
        self._exchange = exchange
        self._under_way: tuple[Chunk, Wait] | None = None

    def send(self, part: Tensor, chunk: Chunk) -> None:
        """Sends this shard's share of the (n, D) gradient of a chunk, takes in the one before.

        Collectives: one reduce-scatter, of which only the start is awaited.
        """
        sent = chunk, self._exchange.start_reduce_scatter(part, chunk)
        self.finish()
        self._under_way = sent

    def finish(self) -> Tensor:
        """Takes in what is under way; the (N, D) gradient."""
        if self._under_way is not None:
            chunk, wait = self._under_way
            self.total[chunk.own] = wait().to(self.total.dtype)
            self._under_way = None
        return self.total
