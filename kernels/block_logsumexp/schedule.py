"""Work schedules of the listed kernels: tables of tiles, one column per program, on the device.

The phases of a backward pass (a forward pass has 2 and 3 only):

1. drop the pairs that get no gradient (``without_idle_pairs``);
2. split the blocks into layers in which no slot, or no position, occurs twice (``layers``), so that
   every output element has one writer;
3. cut each layer into tiles of pairs (``pair_tiles``), the programs of the forward pass and of the
   gradient of states;
4. cut the concatenated row lists into tiles of entries (``row_tiles``), the programs of the
   gradient of rows, each with the list of blocks that cover it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks

__all__ = [
    "LEAST_ENTRIES",
    "RowTiles",
    "is_full",
    "is_gathered",
    "layers",
    "pair_tiles",
    "row_tiles",
    "without_idle_pairs",
]

# In Triton the gradients of this many entries are in memory at a time, or of N if that is more.
LEAST_ENTRIES = 1 << 14


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The schedule of row gradients: tiles of entries of ``items``, each with its blocks.

    A cover of a tile is a block that lists all entries of the tile.

    Attributes:
        tiles: (4, n) int64: first and end entry, first and end cover.
        covers: (3, M) int64: first and end pair of the block, and its round.
        chunks: For each chunk of entries, its first and end entry and first and end tile.
    """

    tiles: Tensor
    covers: Tensor
    chunks: list[tuple[int, int, int, int]]


def is_full(blocks: Blocks) -> bool:
    """Whether there is one block, of a range of positions times a range of rows, without extras."""
    extras = (blocks.pair_positions, blocks.pair_slots, blocks.items, blocks.offsets)
    return blocks.num_blocks == 1 and blocks.rounds is None and all(x is None for x in extras)


def is_gathered(blocks: Blocks) -> bool:
    """Whether every block has one pair, and the lists of the blocks do not overlap.

    Sizes are checked first and rule out nearly all other blocks, so index values are rarely read.
    """
    if blocks.items is None or blocks.pair_positions is None or blocks.rounds is not None:
        return False
    if blocks.pair_slots is not None or blocks.num_blocks != blocks.pair_positions.numel():
        return False
    borders = F.pad(blocks.item_ends, (1, 0))
    alone = (blocks.pair_starts.diff() == 1) & (blocks.item_starts == borders[:-1])
    return bool(alone.all() & (borders[-1] == blocks.items.numel()))


def pair_tiles(blocks: Blocks, tile: int) -> Tensor:
    """(5, n) int64 tiles of pairs: first and end pair, first and end entry, round.

    n is the upper bound ``P // tile + T``, known without waiting for the device; unused tiles are
    empty.

    >>> starts = torch.tensor([0, 3, 4])
    >>> ends = torch.tensor([7, 9])
    >>> targets = torch.zeros(4, dtype=torch.int64)
    >>> blocks = Blocks(None, starts, None, torch.zeros(2, dtype=torch.int64), ends, targets, 4)
    >>> pair_tiles(blocks, 2)[:4].T.tolist()
    [[0, 2, 0, 7], [2, 3, 0, 7], [3, 4, 0, 9], [0, 0, 0, 0]]
    """
    starts = blocks.pair_starts
    counts = (starts[1:] - starts[:-1] + tile - 1) // tile
    tile_ends = F.pad(counts.cumsum(0), (1, 0))
    index = torch.arange(num_pairs(blocks) // tile + blocks.num_blocks, device=starts.device)
    block = torch.searchsorted(tile_ends[1:], index, right=True)
    used = block < blocks.num_blocks
    block = block.clamp(max=blocks.num_blocks - 1)
    first = starts[block] + (index - tile_ends[block]) * tile
    end = torch.minimum(first + tile, starts[block + 1])
    columns = [first, end, blocks.item_starts[block], blocks.item_ends[block]]
    return torch.stack([*columns, block_rounds(blocks)[block]]) * used


def num_pairs(blocks: Blocks) -> int:
    """Number of pairs P, or an upper bound if pairs are positions."""
    pairs = blocks.targets if blocks.pair_positions is None else blocks.pair_positions
    return pairs.numel()


def block_rounds(blocks: Blocks) -> Tensor:
    """(T,) int64 round of each block; 0 if ``rounds`` is None."""
    if blocks.rounds is None:
        return torch.zeros_like(blocks.item_starts)
    return blocks.rounds.block_rounds


def layers(blocks: Blocks, keys: Tensor | None) -> Iterator[Blocks]:
    """Partition the pairs of the blocks into layers; keys are unique within a layer.

    A layer needs no atomics, as each key has one writer, and layers run in a fixed order. Layer n
    holds the n-th pair of every key: as many layers as rounds for rece, one for the other losses.

    Args:
        blocks: Any blocks.
        keys: (P,) int64 slot or position of each pair; None if all differ.
    """
    if keys is None or not keys.numel():
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
    """The blocks with only the pairs for which the (P,) bool ``kept`` is True."""
    kept_before = F.pad(kept.cumsum(0), (1, 0))
    slots = blocks.pair_slots
    positions = blocks.pair_positions
    if positions is None:
        positions = torch.arange(kept.numel(), device=kept.device)
    return replace(
        blocks,
        pair_positions=positions[kept],
        pair_slots=None if slots is None else slots[kept],
        pair_starts=kept_before[blocks.pair_starts],
    )


def without_idle_pairs(blocks: Blocks, grad_logsumexp: Tensor) -> Blocks:
    """The blocks without pairs that get gradient 0, such as all but one bucket of sce."""
    if blocks.pair_slots is None:
        return blocks
    return keep_pairs(blocks, grad_logsumexp[blocks.pair_slots] != 0)


def row_tiles(blocks: Blocks, num_entries: int, tile: int, chunk: int) -> RowTiles:
    """Tiles of entries, each with the blocks that contain all of it, for row gradients.

    Entries are cut wherever a block starts or ends, and at every multiple of ``chunk``.

    Args:
        blocks: Any blocks.
        num_entries: Q.
        tile: Entries per tile.
        chunk: Number of entries with gradients in memory at a time.
    """
    device = blocks.item_starts.device
    grid = torch.arange(0, num_entries + chunk, chunk, device=device).clamp(max=num_entries)
    cuts = torch.unique(torch.cat([blocks.item_starts, blocks.item_ends, grid]))
    segment_starts, segment_ends = cuts[:-1], cuts[1:]
    cover_starts, covers = _covers(blocks, cuts)
    counts = (segment_ends - segment_starts + tile - 1) // tile
    segment = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    index = torch.arange(segment.numel(), device=device)
    first = segment_starts[segment] + (index - (counts.cumsum(0) - counts)[segment]) * tile
    end = torch.minimum(first + tile, segment_ends[segment])
    tiles = torch.stack([first, end, cover_starts[segment], cover_starts[segment + 1]])
    borders = grid.tolist()
    tile_borders = torch.searchsorted(first, grid).tolist()
    chunks = list(zip(borders, borders[1:], tile_borders, tile_borders[1:], strict=False))
    return RowTiles(tiles, covers, chunks)


def _covers(blocks: Blocks, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """First cover of each segment between ``cuts``, and the (3, M) covers, sorted by segment."""
    device = cuts.device
    low = torch.searchsorted(cuts, blocks.item_starts)
    counts = (torch.searchsorted(cuts, blocks.item_ends) - low).clamp(min=0)
    block = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    index = torch.arange(block.numel(), device=device)
    segment = low[block] + index - (counts.cumsum(0) - counts)[block]
    segment, order = segment.sort(stable=True)
    block = block[order]
    starts = torch.searchsorted(segment, torch.arange(cuts.numel(), device=device))
    pair_starts = blocks.pair_starts
    return starts, torch.stack(
        [pair_starts[block], pair_starts[block + 1], block_rounds(blocks)[block]]
    )
