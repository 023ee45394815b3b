"""Tables of tiles for the listed kernels, one column per program, written by two Triton kernels.

A block of the n pairs (or segment of entries) from s on has its tiles in the columns from
``s // TILE + i`` on, i its number. These columns are distinct, and known without a sum over blocks;
those that are left over are empty tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.schedule import covers, num_pairs

# mypy: disable-error-code="no-untyped-def"

__all__ = ["pair_tiles", "pair_tiles_kernel", "row_tiles", "row_tiles_kernel"]

# Columns that a program writes at a time.
_COLUMNS = 64


@triton.jit
def _store_ranges(
    tiles, num_tiles, o_columns, b_first, end, first_listed, end_listed, TILE: tl.constexpr
):  # fmt: skip
    """Rows 0 to 3 of a table: the range of each tile, and the range of what it is paired with."""
    mask = b_first < end
    tl.store(tiles + o_columns, b_first, mask=mask)
    tl.store(tiles + num_tiles + o_columns, tl.minimum(b_first + TILE, end), mask=mask)
    tl.store(tiles + 2 * num_tiles + o_columns, b_first * 0 + first_listed, mask=mask)
    tl.store(tiles + 3 * num_tiles + o_columns, b_first * 0 + end_listed, mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "reach", "round_of_all"])
def pair_tiles_kernel(
    starts, borders, item_starts, item_ends, block_rounds, tiles, num_tiles, reach, round_of_all,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes (5, num_tiles) int64: first and end pair, first and end entry, round. Grid: blocks."""
    i_block = tl.program_id(0)
    start, end = tl.load(starts + i_block), tl.load(starts + i_block + 1)
    if borders is None:
        first_entry, end_entry = tl.load(item_starts + i_block), tl.load(item_ends + i_block)
    else:
        first_entry = tl.load(borders + tl.maximum(i_block - reach, 0))
        end_entry = tl.load(borders + tl.minimum(i_block + reach + 1, tl.num_programs(0)))
    round_index = round_of_all
    if block_rounds is not None:
        round_index = tl.load(block_rounds + i_block)
    first_column = start // TILE + i_block
    for column in range(first_column, end // TILE + i_block + 1, COLUMNS):
        o_columns = column + tl.arange(0, COLUMNS)
        b_first = start + (o_columns - first_column) * TILE
        _store_ranges(tiles, num_tiles, o_columns, b_first, end, first_entry, end_entry, TILE)
        b_round = b_first * 0 + round_index
        tl.store(tiles + 4 * num_tiles + o_columns, b_round, mask=b_first < end)


@triton.jit(do_not_specialize=["num_tiles", "reach"])
def row_tiles_kernel(
    borders, cover_starts, tiles, num_tiles, reach, TILE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Writes (4, num_tiles) int64: first and end entry, first and end cover. Grid: segments."""
    i_segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(borders + i_segment), tl.load(borders + i_segment + 1)
    if cover_starts is None:
        first_cover = tl.maximum(i_segment - reach, 0)
        end_cover = tl.minimum(i_segment + reach + 1, tl.num_programs(0))
    else:
        first_cover = tl.load(cover_starts + i_segment)
        end_cover = tl.load(cover_starts + i_segment + 1)
    first_column = start // TILE + i_segment
    for column in range(first_column, end // TILE + i_segment + 1, COLUMNS):
        o_columns = column + tl.arange(0, COLUMNS)
        b_first = start + (o_columns - first_column) * TILE
        _store_ranges(tiles, num_tiles, o_columns, b_first, end, first_cover, end_cover, TILE)


def pair_tiles(blocks: Blocks, tile: int) -> Tensor:
    """(5, n) int64 tiles of pairs: first and end pair, first and end entry, round."""
    item_starts, item_ends = (None, None) if blocks.borders is not None else blocks.item_ranges()
    rounds = 0 if blocks.rounds is None else blocks.rounds.block_rounds
    num_tiles = num_pairs(blocks) // tile + blocks.num_blocks
    tiles = torch.zeros((5, num_tiles), dtype=torch.int64, device=blocks.pair_starts.device)
    pair_tiles_kernel[(blocks.num_blocks,)](
        blocks.pair_starts,
        blocks.borders,
        item_starts,
        item_ends,
        None if isinstance(rounds, int) else rounds,
        tiles,
        num_tiles,
        blocks.reach,
        rounds if isinstance(rounds, int) else 0,
        TILE=tile,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
    return tiles


def row_tiles(blocks: Blocks, tile: int) -> tuple[Tensor, Tensor | None]:
    """(4, n) int64 tiles of entries: first and end entry, first and end cover; and the covers.

    The covers are (M,) int64 blocks; None: cover c is block c.
    """
    found = covers(blocks)
    num_segments = found.borders.numel() - 1
    num_tiles = blocks.items.numel() // tile + num_segments
    tiles = torch.zeros((4, num_tiles), dtype=torch.int64, device=found.borders.device)
    if num_segments:
        row_tiles_kernel[(num_segments,)](
            found.borders,
            found.starts,
            tiles,
            num_tiles,
            found.reach,
            TILE=tile,
            COLUMNS=_COLUMNS,
            num_warps=1,
        )
    return tiles, found.blocks
