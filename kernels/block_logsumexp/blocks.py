"""Index lists that describe the blocks (positions times rows) of logits that a loss sums."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Blocks", "EveryPair", "RowIds", "Rounds", "blocks_of_items"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rule that counts a candidate once if it occurs in several rounds of blocks.

    Item j is a candidate of position i in round q if their chunks of that round are at most
    ``reach`` apart. A block of round q skips the candidates of earlier rounds, so each enters the
    sum once: the same value as subtracting, from each logit, the log of its number of rounds.

    Attributes:
        position_chunks: (N, r) int32, chunk of each position in each round.
        item_chunks: (R, r) uint8, int16 or int32, chunk of each row in each round.
        reach: Number of neighbouring chunks on each side.
        block_rounds: (T,) int64, round of each block; a number if it is the same for all.
    """

    position_chunks: Tensor
    item_chunks: Tensor
    reach: int
    block_rounds: Tensor | int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Index lists of T blocks of the logit matrix, each some positions times some rows.

    Block t holds the pairs ``pair_positions[pair_starts[t]:pair_starts[t + 1]]`` and the rows
    ``items[item_starts[t]:item_ends[t]]``, or those that ``borders`` names. Pair p adds its
    log-sum-exp to slot ``pair_slots[p]``. Within a round no slot occurs in two blocks.

    Attributes:
        pair_positions: (P,) int64 index into ``states`` of each pair; None: pair p is position p.
        pair_starts: (T + 1,) int64 first pair of each block, and P.
        items: (Q,) int64 rows, in any order, repeats allowed. The plain PyTorch path accepts int32
            too.
        item_starts: (T,) int64 into ``items``; ranges of different blocks may overlap. None with
            ``borders``.
        item_ends: (T,) int64 into ``items``; None with ``borders``.
        targets: (N,) int64 row of each position's target, which is never its candidate; -1 if
            the target is not among the rows.
        num_slots: Number of log-sum-exps of the output.
        pair_slots: (P,) int64 slot of each pair; None: the slot of a pair is its position.
        offsets: (Q,) float32 subtracted from the logits of each entry of ``items``; None: zero.
        rounds: Rule that counts a repeated candidate once; None: every entry counts.
        borders: (T + 1,) int64 entries; block t lists those from ``borders[max(t - e, 0)]`` to
            ``borders[min(t + e + 1, T)]``, e being ``reach``, no slot occurs twice, and no
            position with a gradient. Every block has a pair, unless there are slots or rounds.
            Triton then has nothing to look for on the device.
    """

    pair_positions: Tensor | None
    pair_starts: Tensor
    items: Tensor
    item_starts: Tensor | None
    item_ends: Tensor | None
    targets: Tensor
    num_slots: int
    pair_slots: Tensor | None = None
    offsets: Tensor | None = None
    rounds: Rounds | None = None
    borders: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks T."""
        return self.pair_starts.numel() - 1

    @property
    def reach(self) -> int:
        """e: how many blocks on either side list the entries between two ``borders`` too."""
        return 0 if self.rounds is None else self.rounds.reach

    def item_ranges(self) -> tuple[Tensor, Tensor]:
        """First and end entry of each block, both (T,) int64."""
        if self.borders is None:
            assert self.item_starts is not None and self.item_ends is not None
            return self.item_starts, self.item_ends
        if not self.reach:
            return self.borders[:-1], self.borders[1:]
        block = torch.arange(self.num_blocks, device=self.borders.device)
        starts = self.borders[(block - self.reach).clamp_(min=0)]
        return starts, self.borders[(block + 1 + self.reach).clamp_(max=self.num_blocks)]


def blocks_of_items(
    order: Tensor,
    pair_starts: Tensor,
    items: Tensor,
    row_ids: "RowIds",
    targets: Tensor,
    offsets: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Blocks:
    """Blocks that compare each group of positions with the items of the group that a shard holds.

    Args:
        order: (P,) int64 positions, group by group, each once.
        pair_starts: (T + 1,) int64 first pair of each group, and P.
        items: (T, C) int64 global items of each group.
        row_ids: The global item of each row of the shard.
        targets: (N,) int64 global items.
        offsets: (T, C) float32 subtracted from the logits of an item; None: zero.
        left_out: (T, C) bool, the items that are no candidates; None: all are.
    """
    rows = row_ids.find(items)
    if row_ids.is_complete and left_out is None:
        end = items.numel() + 1
        borders = torch.arange(0, end, max(1, items.shape[1]), device=items.device)
        rows, offsets = rows.flatten(), None if offsets is None else offsets.flatten()
    else:
        held = rows >= 0 if left_out is None else (rows >= 0) & ~left_out
        borders = F.pad(held.sum(1).cumsum(0), (1, 0))
        index = held.flatten().nonzero()[:, 0]
        rows = rows.flatten()[index]
        offsets = None if offsets is None else offsets.flatten()[index]
    return Blocks(
        pair_positions=order,
        pair_starts=pair_starts,
        items=rows,
        item_starts=None,
        item_ends=None,
        targets=row_ids.find(targets),
        num_slots=order.numel(),
        offsets=offsets,
        borders=borders,
    )


@dataclass(frozen=True, slots=True)
class EveryPair:
    """The full softmax as one block: all N positions times all R rows.

    Attributes:
        num_rows: R.
        targets: (N,) int64 row of each position's target, -1 if it is not among the rows.
    """

    num_rows: int
    targets: Tensor

    @property
    def num_slots(self) -> int:
        """Number of slots: one for each position."""
        return self.targets.numel()


@dataclass(frozen=True, slots=True)
class RowIds:
    """The global item of each row of a tensor, in ascending order: a range or a sorted list.

    Attributes:
        first: First item of the range; with ``lookup``, the item of ``lookup[0]``.
        count: Number of rows.
        sparse: (count,) int64 ascending items, if they are not a range; None for a range.
        lookup: (n,) int32 row of each item from ``first`` on, or -1; a faster lookup table for
            ``sparse``. None: binary search in ``sparse``.
        is_complete: Whether every item that is looked up has a row, so that none is looked for in
            vain: those of the whole table, or all that are in use in a single process.
    """

    first: int
    count: int
    sparse: Tensor | None = None
    lookup: Tensor | None = None
    is_complete: bool = False

    @classmethod
    def of(cls, rows: Tensor, within: "RowIds") -> "RowIds":
        """The ``RowIds`` of selected rows of a range.

        If they are at least a sixteenth of the range, a lookup table over the whole range is built.
        It takes 4 bytes per row of the range, at most as much memory as the selected rows
        themselves in float32 with D = 16.

        Args:
            rows: (count,) int64 ascending rows of ``within``.
            within: The global items of all rows; a range.

        >>> some = RowIds.of(torch.tensor([1, 3]), RowIds(first=5, count=4))
        >>> some.find(torch.tensor([4, 6, 7, 8, 9]))
        tensor([-1,  0, -1,  1, -1])
        """
        lookup = None
        if 16 * rows.numel() >= within.count:
            lookup = torch.full((within.count,), -1, dtype=torch.int32, device=rows.device)
            lookup[rows] = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
        items = rows + within.first if within.first else rows
        return cls(within.first, rows.numel(), items, lookup, within.is_complete)

    def find(self, items: Tensor) -> Tensor:
        """Row of each global item, -1 if it has none; int64 of the shape of ``items``.

        >>> RowIds(first=5, count=3).find(torch.tensor([4, 5, 9]))
        tensor([-1,  0, -1])
        """
        if self.is_complete:
            return self._find_present(items)
        if self.sparse is None:
            inside = (items >= self.first) & (items < self.first + self.count)
            return torch.where(inside, items - self.first, -1)
        if self.lookup is not None and self.lookup.numel():
            offsets = items - self.first
            inside = (offsets >= 0) & (offsets < self.lookup.numel())
            return torch.where(inside, self.lookup[torch.where(inside, offsets, 0)].long(), -1)
        if not self.count:
            return torch.full_like(items, -1)
        place = torch.searchsorted(self.sparse, items).clamp_(max=self.count - 1)
        return torch.where(self.sparse[place] == items, place, -1)

    def _find_present(self, items: Tensor) -> Tensor:
        offsets = items - self.first if self.first else items
        if self.sparse is None:
            return offsets
        if self.lookup is not None and self.lookup.numel():
            return self.lookup[offsets].long()
        return torch.searchsorted(self.sparse, items)
