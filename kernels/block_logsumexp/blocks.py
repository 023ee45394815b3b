"""The list of tiles of the logit matrix that a loss looks at."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Blocks", "RowIds", "Rounds", "every_pair"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rule that counts a candidate once although several rounds of blocks contain it.

    Item j is a candidate of position i in round q when their chunks of that round are at most
    ``reach`` apart. A block of round q keeps the pairs that no earlier round had, so a pair enters
    the sum once. That is the union of the rounds, the same value as lowering a logit by the log of
    the number of rounds in which it occurs.

    Attributes:
        position_chunks: (N, r) int32, chunk of each position in each round.
        item_chunks: (R, r) uint8, int16 or int32, chunk of each row in each round.
        reach: Number of neighbouring chunks on each side.
        block_rounds: (T,) int64, round of each block.
    """

    position_chunks: Tensor
    item_chunks: Tensor
    reach: int
    block_rounds: Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """T blocks, each a set of positions times a set of rows; never their logits.

    Block t holds the pairs ``pair_positions[pair_starts[t]:pair_starts[t + 1]]`` and the rows
    ``items[item_starts[t]:item_ends[t]]``. Pair p adds its log-sum-exp to slot ``pair_slots[p]``.
    Within a round no slot stands in two blocks.

    Attributes:
        pair_positions: (P,) int64 row of ``states`` of each pair; None: pair p is position p.
        pair_starts: (T + 1,) int64.
        items: (Q,) int64 rows, in any order, repeats allowed; None: entry q is row q. Plain PyTorch
            takes int32 too.
        item_starts: (T,) int64 into ``items``; ranges of different blocks may overlap.
        item_ends: (T,) int64 into ``items``.
        targets: (N,) int64 row of each position's target, which is never its candidate; -1 where
            the target is not among the rows.
        num_slots: Length of the output.
        pair_slots: (P,) int64; None: the slot of a pair is its position.
        offsets: (Q,) float32 subtracted from the logits of an entry of ``items``; None: zero.
        rounds: Rule against counting a candidate twice; None: blocks count as they are listed.
    """

    pair_positions: Tensor | None
    pair_starts: Tensor
    items: Tensor | None
    item_starts: Tensor
    item_ends: Tensor
    targets: Tensor
    num_slots: int
    pair_slots: Tensor | None = None
    offsets: Tensor | None = None
    rounds: Rounds | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks T."""
        return self.item_starts.numel()


def every_pair(num_rows: int, targets: Tensor) -> Blocks:
    """One block of all N positions times all R rows: the full softmax."""
    device = targets.device
    return Blocks(
        pair_positions=None,
        pair_starts=torch.tensor([0, targets.numel()], device=device),
        items=None,
        item_starts=torch.zeros(1, dtype=torch.int64, device=device),
        item_ends=torch.full((1,), num_rows, dtype=torch.int64, device=device),
        targets=targets,
        num_slots=targets.numel(),
    )


@dataclass(frozen=True, slots=True)
class RowIds:
    """Which global items the rows of a tensor are, in ascending order.

    Attributes:
        first: Item of row 0, when the rows are a contiguous range of the catalog.
        count: Number of rows.
        sparse: (count,) int64 ascending items, when they are not a range; None for a range.
        places: (n,) int32 row of each item from ``first`` on, -1 for none, which is faster than a
            search among ``sparse``; None searches.
    """

    first: int
    count: int
    sparse: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, within: "RowIds") -> "RowIds":
        """Some of the rows of a range.

        They are found by a table of the whole range where they are at least a sixteenth of it: it
        takes a sixteenth of the memory of float32 rows of width 16 then, and of wider ones less.

        Args:
            rows: (count,) int64 ascending rows of ``within``.
            within: A range.

        >>> some = RowIds.of(torch.tensor([1, 3]), RowIds(first=5, count=4))
        >>> some.find(torch.tensor([4, 6, 7, 8, 9]))
        tensor([-1,  0, -1,  1, -1])
        """
        places = None
        if 16 * rows.numel() >= within.count:
            places = torch.full((within.count,), -1, dtype=torch.int32, device=rows.device)
            places[rows] = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
        return cls(within.first, rows.numel(), rows + within.first, places)

    def find(self, items: Tensor) -> Tensor:
        """Row of each global item, -1 where it is not among the rows; of the shape of ``items``.

        >>> RowIds(first=5, count=3).find(torch.tensor([4, 5, 9]))
        tensor([-1,  0, -1])
        """
        if self.sparse is None:
            inside = (items >= self.first) & (items < self.first + self.count)
            return torch.where(inside, items - self.first, -1)
        if self.places is not None and self.places.numel():
            offsets = items - self.first
            inside = (offsets >= 0) & (offsets < self.places.numel())
            return torch.where(inside, self.places[torch.where(inside, offsets, 0)].long(), -1)
        if not self.count:
            return torch.full_like(items, -1)
        place = torch.searchsorted(self.sparse, items).clamp_(max=self.count - 1)
        return torch.where(self.sparse[place] == items, place, -1)
