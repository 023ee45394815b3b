"""Work schedules of the listed kernels: tables of tiles, one column per program, on the device.

The phases of a backward pass (a forward pass has 2 and 3 only):

1. drop the pairs that get no gradient (``without_idle_pairs``);
2. split the blocks into layers in which no slot, or no position, occurs twice (``layers``), so that
   every output element has one writer;
3. cut each layer into tiles of pairs (``gpu.tables.pair_tiles``), the programs of the forward pass
   and of the gradient of states;
4. cut the concatenated row lists into tiles of entries (``gpu.tables.row_tiles``), the programs of
   the gradient of rows, each with the list of blocks that cover it (``covers``).

Blocks with ``borders`` need no look at the device for any of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks

__all__ = [
    "Covers",
    "covers",
    "entries_at_once",
    "is_gathered",
    "layers",
    "num_pairs",
    "without_idle_pairs",
]

# Numbers in the gradients of entries that are in memory at a time in Triton: 1 GiB.
ENTRY_FLOATS = 1 << 28


@dataclass(frozen=True, slots=True)
class Covers:
    """The entries of ``items`` in segments, each with its covers: blocks that list all of it.

    Attributes:
        borders: (S + 1,) int64 entries; segment s is from ``borders[s]`` to ``borders[s + 1]``.
        starts: (S + 1,) int64 into ``blocks``, the first cover of each segment; None: segment s is
            covered by the blocks at most ``reach`` from s.
        blocks: (M,) int64 blocks, segment by segment; None with ``starts``.
        reach: e, for ``starts`` of None.
    """

    borders: Tensor
    starts: Tensor | None
    blocks: Tensor | None
    reach: int = 0


def is_gathered(blocks: Blocks) -> bool:
    """Whether every block has one pair, and the lists of the blocks do not overlap.

    Sizes are checked first and rule out nearly all other blocks, so index values are rarely read.
    """
    if blocks.pair_positions is None or blocks.rounds is not None:
        return False
    if blocks.pair_slots is not None or blocks.num_blocks != blocks.pair_positions.numel():
        return False
    if blocks.borders is not None:
        return True
    item_starts, item_ends = blocks.item_ranges()
    borders = F.pad(item_ends, (1, 0))
    alone = (blocks.pair_starts.diff() == 1) & (item_starts == borders[:-1])
    return bool(alone.all() & (borders[-1] == blocks.items.numel()))


def entries_at_once(num_entries: int, width: int) -> int:
    """Entries with gradients in memory at a time in Triton, of ``num_entries`` of D = ``width``."""
    return max(1, min(num_entries, ENTRY_FLOATS // max(1, width)))


def num_pairs(blocks: Blocks) -> int:
    """Number of pairs P, or an upper bound if pairs are positions."""
    pairs = blocks.targets if blocks.pair_positions is None else blocks.pair_positions
    return pairs.numel()


def layers(blocks: Blocks, keys: Tensor | None) -> Iterator[Blocks]:
    """Partition the pairs of the blocks into layers; keys are unique within a layer.

    A layer needs no atomics, as each key has one writer, and layers run in a fixed order. Layer n
    holds the n-th pair of every key: as many layers as rounds for rece, one for the other losses.

    Args:
        blocks: Any blocks.
        keys: (P,) int64 slot or position of each pair; None if all differ.
    """
    if blocks.borders is not None or keys is None or not keys.numel():
        yield blocks
        return
    order = torch.argsort(keys, stable=True)
    in_order = keys[order]
    occurrence = torch.empty_like(order)
    places = torch.arange(order.numel(), device=order.device)
    occurrence[order] = places - torch.searchsorted(in_order, in_order)
    num_layers = int(occurrence.max()) + 1
    for layer in range(num_layers):
        yield blocks if num_layers == 1 else keep_pairs(blocks, occurrence == layer)


def keep_pairs(blocks: Blocks, kept: Tensor) -> Blocks:
    """The blocks with only the pairs for which the (P,) bool ``kept`` is True.

    The lists of pairs keep their length, with entries at their ends that no block has: their number
    would have to be read from the device.
    """
    kept_before = F.pad(kept.cumsum(0), (1, 0))
    positions = blocks.pair_positions
    if positions is None:
        positions = torch.arange(kept.numel(), device=kept.device)
    place = torch.where(kept, kept_before[:-1], kept.numel())

    def compacted(values: Tensor) -> Tensor:
        return values.new_zeros(values.numel() + 1).scatter_(0, place, values)[:-1]

    return replace(
        blocks,
        pair_positions=compacted(positions),
        pair_slots=None if blocks.pair_slots is None else compacted(blocks.pair_slots),
        pair_starts=kept_before[blocks.pair_starts],
    )


def without_idle_pairs(blocks: Blocks, grad_logsumexp: Tensor) -> Blocks:
    """The blocks without pairs that get gradient 0, such as all but one bucket of sce."""
    if blocks.pair_slots is None:
        return blocks
    return keep_pairs(blocks, grad_logsumexp[blocks.pair_slots] != 0)


def covers(blocks: Blocks) -> Covers:
    """The segments of all entries and their covers; cut where a block starts or ends."""
    if blocks.borders is not None:
        return Covers(blocks.borders, None, None, blocks.reach)
    item_starts, item_ends = blocks.item_ranges()
    device = blocks.items.device
    whole = torch.tensor([0, blocks.items.numel()], device=device)
    borders = torch.unique(torch.cat([whole, item_starts, item_ends]))
    low = torch.searchsorted(borders, item_starts)
    counts = (torch.searchsorted(borders, item_ends) - low).clamp(min=0)
    block = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    index = torch.arange(block.numel(), device=device)
    segment = low[block] + index - (counts.cumsum(0) - counts)[block]
    segment, order = segment.sort(stable=True)
    starts = torch.searchsorted(segment, torch.arange(borders.numel(), device=device))
    return Covers(borders, starts, block[order])
