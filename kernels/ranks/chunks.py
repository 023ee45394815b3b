"""Which positions and rows each rank holds, and the chunks in which positions are processed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator, Pending
from shardrec.kernels.ranks.traffic import num_chunks

__all__ = ["Chunk", "Gradients", "Layout", "chunk_members", "prefetched"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A set of positions of all ranks that are processed together.

    Slots and rows can form chunks too: anything numbered globally, with one range per rank.

    Attributes:
        positions: (n,) int64 global positions, ascending.
        own: (n_own,) int64 local positions of this rank among them, ascending; a slice if the chunk
            has all positions.
        own_slice: The slice of ``positions`` that belongs to this rank.
        counts: Number of positions of each rank.
    """

    positions: Tensor
    own: Tensor | slice
    own_slice: slice
    counts: tuple[int, ...]

    @classmethod
    def of(cls, positions: Tensor, borders: Sequence[int], rank: int) -> "Chunk":
        """The chunk of the given global positions.

        Args:
            positions: (n,) int64 global positions, ascending.
            borders: W + 1 positions; rank r holds [``borders[r]``, ``borders[r + 1]``).
            rank: This rank.

        >>> Chunk.of(torch.tensor([1, 4, 5]), (0, 3, 6), 1).own.tolist()
        [1, 2]
        """
        limits = torch.tensor(borders, device=positions.device)
        splits = torch.searchsorted(positions, limits).tolist()
        own = slice(splits[rank], splits[rank + 1])
        counts = tuple(end - start for start, end in pairwise(splits))
        return cls(positions, positions[own] - borders[rank], own, counts)

    @classmethod
    def whole(cls, borders: Sequence[int], rank: int, device: torch.device) -> "Chunk":
        """The chunk of all positions, made without reading anything from the device."""
        own = slice(borders[rank], borders[rank + 1])
        counts = tuple(end - start for start, end in pairwise(borders))
        return cls(torch.arange(borders[-1], device=device), slice(0, counts[rank]), own, counts)


class Layout:
    """The ranges of global positions and rows that each rank holds, in rank order.

    Attributes:
        ranks: The communicator.
        borders: W + 1 global positions; rank r holds [``borders[r]``, ``borders[r + 1]``).
        row_borders: W + 1 global items, likewise.
        device: Device of the tensors that the methods create.
        state_bytes: Bytes of one state; decides in how many chunks the states are sent.
    """

    def __init__(
        self,
        ranks: Communicator,
        positions: Sequence[int],
        rows: Sequence[int],
        device: torch.device,
        state_bytes: int = 0,
    ) -> None:
        """Takes the number of positions and of rows of each rank."""
        self.ranks = ranks
        self.borders: Sequence[int] = (0, *accumulate(positions))
        self.row_borders: Sequence[int] = (0, *accumulate(rows))
        self.device = device
        self.state_bytes = state_bytes

    @classmethod
    def gathered(
        cls,
        group: dist.ProcessGroup,
        num_positions: int,
        held: range,
        num_items: int,
        device: torch.device,
        *,
        state_bytes: int = 0,
        failed: bool = False,
    ) -> "Layout":
        """The layout of a process group, from the sizes of all ranks.

        Args:
            group: Ranks that hold the shards.
            num_positions: N of this rank.
            held: Global rows of the table on this rank.
            num_items: V.
            device: Device of the tensors.
            state_bytes: Bytes of one state.
            failed: Whether the inputs of this rank are invalid.

        Raises:
            ValueError: on every rank, if the inputs of any rank are invalid, or the shards do not
                cover the table once.

        Collectives: one all-gather of five integers per rank.
        """
        own = [num_positions, len(held), held.start, num_items, int(failed)]
        ranks = Communicator(group)
        sizes = ranks.all_gather(torch.tensor(own, device=device)).cpu()
        refusing = sizes[:, 4].nonzero()[:, 0].tolist()
        if refusing:
            raise ValueError(
                f"inputs must be valid on every rank, got a refusal on rank {refusing[0]} of "
                f"{len(sizes)}; read the error of that rank"
            )
        _require_whole_table(*sizes[:, 1:4].T)
        positions, rows = sizes[:, :2].T.tolist()
        return cls(ranks, positions, rows, device, state_bytes)

    @property
    def first_position(self) -> int:
        """Global index of this rank's first position."""
        return self.borders[self.ranks.rank]

    @property
    def num_positions(self) -> int:
        """Number of positions of all ranks."""
        return self.borders[-1]

    @property
    def largest_shard(self) -> int:
        """Number of rows of the largest shard."""
        return max(end - start for start, end in pairwise(self.row_borders))

    def sizes(self) -> Tensor:
        """(W, 2) int64 on the CPU: number of positions and of rows of each rank."""
        return torch.tensor([self.borders, self.row_borders]).diff(dim=1).T.contiguous()

    def num_chunks(self, *, listed: bool) -> int:
        """Number of chunks in which the states are sent; see ``traffic.num_chunks``."""
        if self.ranks.group is None:
            return 1
        on_cpu = self.device.type == "cpu"
        return num_chunks(self.num_positions, self.state_bytes, listed=listed, on_cpu=on_cpu)

    def even_chunks(self, count: int) -> Tensor | None:
        """(num_positions,) int64 chunk of each global position; each rank's are split evenly.

        None for one chunk of all positions.
        """
        if count == 1:
            return None
        parts = [
            torch.arange(end - start, device=self.device) * count // max(end - start, 1)
            for start, end in pairwise(self.borders)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def chunks(self, chunk_of: Tensor | None) -> Iterator[Chunk]:
        """The chunks of a (num_positions,) int64 assignment, in the same order on every rank.

        None is one chunk of all positions.
        """
        if chunk_of is None:
            if self.num_positions:
                yield Chunk.whole(self.borders, self.ranks.rank, self.device)
            return
        for positions in chunk_members(chunk_of):
            if self.ranks.group is None:  # nothing to read from the device, which would wait
                count = positions.numel()
                yield Chunk(positions, positions, slice(0, count), (count,))
            else:
                yield Chunk.of(positions, self.borders, self.ranks.rank)

    def start_gather(self, local: Tensor, chunk: Chunk) -> Pending:
        """Starts to gather the (n, ...) values at the chunk's positions, from (N, ...) per rank.

        A single process copies its values when it waits for them, and not at all if the chunk has
        all of its positions.

        Collectives: one all-gather with a group, else none.
        """

        def own() -> Tensor:
            return local if isinstance(chunk.own, slice) else local[chunk.own]

        return (
            own
            if self.ranks.group is None
            else self.ranks.start_all_gather_rows(own(), chunk.counts)
        )

    def gather_all(self, local: Tensor) -> Tensor:
        """(num_positions, ...) values of all ranks, integers and not states; one all-gather."""
        counts = [end - start for start, end in pairwise(self.borders)]
        return self.ranks.start_all_gather_rows(local, counts)()


def chunk_members(chunk_of: Tensor) -> Iterator[Tensor]:
    """Ascending int64 positions of each chunk in turn; empty chunks are skipped."""
    order = torch.argsort(chunk_of, stable=True)
    _, sizes = torch.unique_consecutive(chunk_of[order], return_counts=True)
    yield from order.split(sizes.tolist())


def prefetched(
    chunks: Iterable[Chunk], start: Callable[[Chunk], Sequence[Pending]]
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with the tensors fetched for it; those of the next chunk are in flight meanwhile.

    At most two chunks are in memory, whatever the number of ranks.

    Args:
        chunks: The chunks, in the same order on every rank.
        start: Starts to fetch the tensors of a chunk, with the same collectives on every rank.

    >>> def start(chunk):
    ...     print("start", chunk.positions.tolist())
    ...     return [lambda: chunk.positions * 10]
    >>> layout = Layout(Communicator(None), [2], [1], torch.device("cpu"))
    >>> for _, (fetched,) in prefetched(layout.chunks(torch.arange(2)), start):
    ...     print(fetched.tolist())
    start [0]
    start [1]
    [0]
    [10]
    """
    in_flight = ((chunk, start(chunk)) for chunk in chunks)
    current = next(in_flight, None)
    while current is not None:
        following = next(in_flight, None)
        chunk, pending = current
        yield chunk, [wait() for wait in pending]
        current = following


class Gradients:
    """Reduce-scatters state gradients to the ranks that own the positions, chunk by chunk.

    The gradients of one chunk are in flight while the next chunk is processed.

    """

    def __init__(self, ranks: Communicator, states: Tensor) -> None:
        """Stores the communicator, and the (N, D) states whose gradient is collected."""
        self._ranks = ranks
        self._states = states
        self._total: Tensor | None = None
        self._in_flight: tuple[Chunk, Pending] | None = None

    def send(self, part: Tensor, chunk: Chunk) -> None:
        """Starts a reduce-scatter of this shard's (n, D) gradient; waits for the chunk before.

        Collectives: one reduce-scatter.
        """
        sent = chunk, self._ranks.start_reduce_scatter(part, chunk.counts)
        self._receive()
        self._in_flight = sent

    def finish(self) -> Tensor:
        """Waits for the reduce-scatter in flight and returns the (N, D) float32 gradient."""
        self._receive()
        return self._empty() if self._total is None else self._total

    def _receive(self) -> None:
        if self._in_flight is None:
            return
        chunk, wait = self._in_flight
        self._in_flight = None
        if isinstance(chunk.own, slice):
            self._total = wait().float()
            return
        # Every position is in one chunk, so that all of it is written.
        self._total = self._empty() if self._total is None else self._total
        self._total[chunk.own] = wait().float()

    def _empty(self) -> Tensor:
        return self._states.new_empty(self._states.shape, dtype=torch.float32)


def _require_whole_table(num_rows: Tensor, first_rows: Tensor, num_items: Tensor) -> None:
    """Raises ValueError unless the shards hold every row once, in rank order; all (W,) int64."""
    starts = num_rows.cumsum(0) - num_rows
    misplaced = (first_rows != starts) & (num_rows > 0)
    if bool(misplaced.any()) or bool((num_items != num_rows.sum()).any()):
        held = zip(first_rows.tolist(), num_rows.tolist(), num_items.tolist(), strict=True)
        said = ", ".join(f"{first}:{first + count} of {total}" for first, count, total in held)
        raise ValueError(
            "shards must hold every row of the table once, in the order of ranks, got rows "
            f"{said}; check rows, first_row and num_rows of RowShard"
        )
