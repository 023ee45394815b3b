"""Batches of listed blocks: blocks are cut into pieces that fit a tile, similar sizes are batched.

Batching pays because a 20 x 1000 product takes less time than the overhead of its calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles

__all__ = ["Batch", "batches", "take"]

# A batch is padded to its largest piece; a piece below this share of it starts a new batch.
LEAST_FILL = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """G pieces of blocks, padded to p pairs and q items by repeating the last pair and item.

    Attributes:
        positions: (G, p) int64 indices into ``states``.
        slots: (G, p) int64; ``num_slots`` for padding.
        items: (G, q) int64 rows.
        offsets: (G, q) float32 subtracted from the logits of an item; None: zero.
        padding: (G, q) float32: 0 for an item, infinite for padding.
        narrowest: Smallest number of items of a piece.
        round: Round of the blocks.
    """

    positions: Tensor
    slots: Tensor
    items: Tensor
    offsets: Tensor | None
    padding: Tensor
    narrowest: int
    round: int


def batches(blocks: Blocks, width: int, tiles: CpuTiles) -> Iterator[Batch]:
    """The pieces of all blocks in batches: one round, one part of the item lists, similar size."""
    pieces = _cut(blocks, tiles)
    # Stable sorts, the least significant key first.
    pieces = pieces.pick(torch.argsort(pieces.first_pair - pieces.end_pair, stable=True))
    pieces = pieces.pick(torch.argsort(pieces.item_part, stable=True))
    pieces = pieces.pick(torch.argsort(pieces.round, stable=True))
    shapes = zip(
        pieces.round.tolist(),
        pieces.item_part.tolist(),
        (pieces.end_pair - pieces.first_pair).tolist(),
        (pieces.end_item - pieces.first_item).tolist(),
        strict=True,
    )
    for start, end in _runs(list(shapes), tiles.logits, tiles.listed_rows(width)):
        members = torch.arange(start, end, device=pieces.round.device)
        yield _padded(blocks, pieces.pick(members))


def take(source: Tensor, index: Tensor) -> Tensor:
    """``source[index]``, floats cast to float32; a third of the time of indexing on a CPU."""
    taken = source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:])
    return taken.float() if taken.is_floating_point() else taken


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Pieces of blocks, each small enough for a tile; all (T,) int64."""

    first_pair: Tensor
    end_pair: Tensor
    first_item: Tensor
    end_item: Tensor
    round: Tensor
    item_part: Tensor

    def pick(self, index: Tensor) -> "_Pieces":
        return _Pieces(*(getattr(self, name)[index] for name in self.__slots__))


def _cut(blocks: Blocks, tiles: CpuTiles) -> _Pieces:
    """The pieces of all blocks with at least one pair and item."""
    heights = blocks.pair_starts.diff()
    item_starts, item_ends = blocks.item_ranges()
    widths = item_ends - item_starts
    rounds = torch.zeros_like(widths)
    if blocks.rounds is not None:
        rounds += blocks.rounds.block_rounds
    most_pairs = (tiles.logits // widths.clamp(1, tiles.items)).clamp(max=tiles.positions)
    pair_parts = -(-heights // most_pairs)
    item_parts = -(-widths // tiles.items)
    of_block = torch.repeat_interleave(pair_parts * item_parts)
    first_piece = (pair_parts * item_parts).cumsum(0) - pair_parts * item_parts
    number = torch.arange(of_block.numel(), device=of_block.device) - first_piece[of_block]
    pair_part, item_part = number // item_parts[of_block], number % item_parts[of_block]
    first_pair = blocks.pair_starts[:-1][of_block] + pair_part * most_pairs[of_block]
    first_item = item_starts[of_block] + item_part * tiles.items
    return _Pieces(
        first_pair=first_pair,
        end_pair=torch.minimum(first_pair + most_pairs[of_block], blocks.pair_starts[1:][of_block]),
        first_item=first_item,
        end_item=torch.minimum(first_item + tiles.items, item_ends[of_block]),
        round=rounds[of_block],
        item_part=item_part,
    )


def _runs(
    shapes: list[tuple[int, int, int, int]], most_logits: int, most_items: int
) -> Iterator[tuple[int, int]]:
    """Runs of (round, item part, height, width) that fit one tile when padded to their largest.

    Heights descend within a round and part.

    >>> shapes = [(0, 0, 8, 4), (0, 0, 7, 4), (0, 0, 2, 4), (1, 0, 2, 4)]
    >>> list(_runs(shapes, most_logits=999, most_items=99))
    [(0, 2), (2, 3), (3, 4)]
    """
    start = width = 0
    for index, (round_, part, height, piece_width) in enumerate(shapes):
        first_round, first_part, first_height, _ = shapes[start]
        wider = max(width, piece_width)
        num_items = (index - start + 1) * wider
        fits = num_items * first_height <= most_logits and num_items <= most_items
        alike = (round_, part) == (first_round, first_part) and height >= LEAST_FILL * first_height
        if index > start and not (fits and alike):
            yield start, index
            start, wider = index, piece_width
        width = wider
    if shapes:
        yield start, len(shapes)


def _padded(blocks: Blocks, pieces: _Pieces) -> Batch:
    pairs, is_pair = _ranges(pieces.first_pair, pieces.end_pair)
    entries, is_item = _ranges(pieces.first_item, pieces.end_item)
    positions = pairs if blocks.pair_positions is None else blocks.pair_positions[pairs]
    slots = positions if blocks.pair_slots is None else blocks.pair_slots[pairs]
    padding = torch.zeros(entries.shape, device=entries.device)
    return Batch(
        positions=positions,
        slots=slots.masked_fill(~is_pair, blocks.num_slots),
        items=take(blocks.items, entries).long(),
        offsets=None if blocks.offsets is None else take(blocks.offsets, entries),
        padding=padding.masked_fill_(~is_item, torch.inf),
        narrowest=int((pieces.end_item - pieces.first_item).min()),
        round=int(pieces.round[0]),
    )


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(G, longest) members of ranges, the last one repeated as padding, and which are real.

    >>> _ranges(torch.tensor([3, 7]), torch.tensor([5, 8]))[0].tolist()
    [[3, 4], [7, 7]]
    """
    steps = torch.arange(int((ends - starts).max()), device=starts.device)
    members = starts[:, None] + steps
    return torch.minimum(members, ends[:, None] - 1), members < ends[:, None]
