"""Triton kernels of listed blocks, with positions and rows by index, and their launchers.

A program reads its work from a table of tiles (``schedule.py``). FLOP of products: 2 D forward and
8 D backward for each (position, row) of a block, rounded up to whole tiles. Memory traffic: every
block reads its rows once for each tile of its positions; the gradient of rows is written once per
entry of ``items`` and read once to sum it by row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.gpu.add_rows import add_rows
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream
from shardrec.kernels.block_logsumexp.gpu.tables import pair_tiles, row_tiles
from shardrec.kernels.block_logsumexp.gpu.tile_math import (
    LN2,
    LOG2E,
    add_exponentials,
    load_tile,
    met_before,
    streamed_logits,
)
from shardrec.kernels.block_logsumexp.schedule import entries_at_once
from shardrec.kernels.device.tiles import Tile

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "forward",
    "listed_forward_kernel",
    "listed_rows_backward_kernel",
    "listed_states_backward_kernel",
    "rows_backward",
    "states_backward",
]


@triton.jit
def _load_pairs(pair_positions, pair_slots, targets, o_pairs, end):
    """Positions, slots, targets and mask of the pairs ``o_pairs`` before ``end``."""
    m_pairs = o_pairs < end
    b_positions = tl.load(pair_positions + o_pairs, mask=m_pairs, other=0)
    b_slots = tl.load(pair_slots + o_pairs, mask=m_pairs, other=0)
    b_targets = tl.load(targets + b_positions, mask=m_pairs, other=-1)
    return b_positions, b_slots, b_targets, m_pairs


@triton.jit
def _load_cover(covers, pair_starts, block_rounds, round_of_all, cover):
    """First and end pair and round of a cover; see ``listed_rows_backward_kernel``."""
    block = cover
    if covers is not None:
        block = tl.load(covers + cover)
    round_index = round_of_all
    if block_rounds is not None:
        round_index = tl.load(block_rounds + block).to(tl.int32)
    return tl.load(pair_starts + block), tl.load(pair_starts + block + 1), round_index


@triton.jit(do_not_specialize=["num_tiles"])
def listed_forward_kernel(
    states, rows, pair_positions, pair_slots, items, targets, offsets,
    position_chunks, item_chunks, tiles, logsumexp, num_tiles, width, num_rounds, reach,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Adds the candidates of a tile of pairs to the (num_slots,) float32 log-sum-exps.

    Grid: tiles. ``tiles`` is (5, num_tiles) int64: first and end pair, first and end entry, round.
    No two pairs of one launch share a slot, so that each slot has one writer.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_tile = tl.program_id(0)
    end_pair = tl.load(tiles + num_tiles + i_tile)
    first, end = tl.load(tiles + 2 * num_tiles + i_tile), tl.load(tiles + 3 * num_tiles + i_tile)
    round_index = tl.load(tiles + 4 * num_tiles + i_tile).to(tl.int32)
    o_pairs = tl.load(tiles + i_tile) + tl.arange(0, POSITIONS)
    b_positions, b_slots, b_targets, m_pairs = _load_pairs(
        pair_positions, pair_slots, targets, o_pairs, end_pair
    )
    b_max = tl.full((POSITIONS,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((POSITIONS,), dtype=tl.float32)
    for entry in range(first, end, ITEMS):
        o_entries = entry + tl.arange(0, ITEMS)
        m_entries = o_entries < end
        b_items = tl.load(items + o_entries, mask=m_entries, other=0)
        b_logits = streamed_logits(
            states, b_positions, m_pairs, rows, b_items, m_entries, width,
            POSITIONS, ITEMS, WIDTH, PRECISION,
        )  # fmt: skip
        if OFFSETS:
            b_logits -= tl.load(offsets + o_entries, mask=m_entries, other=0.0)[None, :]
        keep = m_entries[None, :] & (b_items[None, :] != b_targets[:, None])
        if ROUNDS:
            keep = keep & ~met_before(
                position_chunks, b_positions, m_pairs, item_chunks, b_items, m_entries,
                round_index, num_rounds, reach, POSITIONS, ITEMS,
            )  # fmt: skip
        b_logits = tl.where(keep, b_logits * LOG2E, -float("inf"))
        b_max, b_sum = add_exponentials(b_max, b_sum, b_logits)
    b_before = tl.load(logsumexp + b_slots, mask=m_pairs, other=-float("inf")) * LOG2E
    b_new = tl.maximum(b_max, b_before)
    b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.exp2(b_before - b_shift)
    tl.store(logsumexp + b_slots, (b_new + tl.log2(b_sum)) * LN2, mask=m_pairs)


@triton.jit(do_not_specialize=["num_tiles"])
def listed_states_backward_kernel(
    states, rows, pair_positions, pair_slots, items, targets, offsets,
    position_chunks, item_chunks, tiles, logsumexp, grad_logsumexp, scale, grad_states,
    num_tiles, width, num_rounds, reach,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr, OFFSETS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of a tile of pairs to the (N, D) float32 gradient of their states.

    Grid: (tiles, parts of the width); ``tiles`` as in the forward. No two pairs of one launch share
    a position, so that each output element has one writer.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_tile = tl.program_id(0)
    first_column = tl.program_id(1) * OUT
    end_pair = tl.load(tiles + num_tiles + i_tile)
    first, end = tl.load(tiles + 2 * num_tiles + i_tile), tl.load(tiles + 3 * num_tiles + i_tile)
    round_index = tl.load(tiles + 4 * num_tiles + i_tile).to(tl.int32)
    o_pairs = tl.load(tiles + i_tile) + tl.arange(0, POSITIONS)
    b_positions, b_slots, b_targets, m_pairs = _load_pairs(
        pair_positions, pair_slots, targets, o_pairs, end_pair
    )
    b_shift = tl.load(logsumexp + b_slots, mask=m_pairs, other=0.0)
    b_grad = tl.load(grad_logsumexp + b_slots, mask=m_pairs, other=0.0)
    o_columns = first_column + tl.arange(0, OUT)
    o_out = b_positions[:, None] * width + o_columns[None, :]
    mask = m_pairs[:, None] & (o_columns < width)[None, :]
    b_total = tl.load(grad_states + o_out, mask=mask, other=0.0)
    if scale is not None:
        b_total /= tl.load(scale)
    for entry in range(first, end, ITEMS):
        o_entries = entry + tl.arange(0, ITEMS)
        m_entries = o_entries < end
        b_items = tl.load(items + o_entries, mask=m_entries, other=0)
        b_logits = streamed_logits(
            states, b_positions, m_pairs, rows, b_items, m_entries, width,
            POSITIONS, ITEMS, WIDTH, PRECISION,
        )  # fmt: skip
        if OFFSETS:
            b_logits -= tl.load(offsets + o_entries, mask=m_entries, other=0.0)[None, :]
        keep = m_entries[None, :] & (b_items[None, :] != b_targets[:, None])
        if ROUNDS:
            keep = keep & ~met_before(
                position_chunks, b_positions, m_pairs, item_chunks, b_items, m_entries,
                round_index, num_rounds, reach, POSITIONS, ITEMS,
            )  # fmt: skip
        b_logits = tl.where(keep, (b_logits - b_shift[:, None]) * LOG2E, -float("inf"))
        b_rows = load_tile(rows, b_items, m_entries, first_column, width, OUT)
        b_share = (tl.exp2(b_logits) * b_grad[:, None]).to(b_rows.dtype)
        b_total = tl.dot(b_share, b_rows, b_total, input_precision=PRECISION)
    if scale is not None:
        b_total *= tl.load(scale)
    tl.store(grad_states + o_out, b_total, mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "first_entry", "end_entry", "round_of_all"])
def listed_rows_backward_kernel(
    states, rows, pair_positions, pair_slots, items, targets, offsets,
    position_chunks, item_chunks, tiles, covers, pair_starts, block_rounds,
    logsumexp, grad_logsumexp, scale, total,
    num_tiles, first_entry, end_entry, round_of_all, width, num_rounds, reach,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr, OFFSETS: tl.constexpr, ROUNDS: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    """The gradient of each entry of ``items``, summed over the blocks that contain it.

    Grid: (tiles, parts of the width); one writer per element. ``tiles`` is (4, num_tiles) int64:
    first and end entry, first and end cover; a cover is an index into ``covers``, the list of
    blocks, or a block if that is None. ``total`` is (.., D) float32, a line for each entry from
    ``first_entry`` to ``end_entry``, and is written. BY_ROW: no row occurs twice in ``items``, and
    its gradient is added to the (R, D) ``total``.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_tile = tl.program_id(0)
    first_column = tl.program_id(1) * OUT
    first, end = tl.load(tiles + i_tile), tl.load(tiles + num_tiles + i_tile)
    if (first >= end_entry) | (end <= first_entry):
        return
    o_entries = first + tl.arange(0, ITEMS)
    m_entries = o_entries < end
    b_items = tl.load(items + o_entries, mask=m_entries, other=0)
    if OFFSETS:
        b_offsets = tl.load(offsets + o_entries, mask=m_entries, other=0.0)
    b_total = tl.zeros((ITEMS, OUT), dtype=tl.float32)
    first_cover = tl.load(tiles + 2 * num_tiles + i_tile)
    for cover in range(first_cover, tl.load(tiles + 3 * num_tiles + i_tile)):
        first_pair, end_pair, round_index = _load_cover(
            covers, pair_starts, block_rounds, round_of_all, cover
        )
        for pair in range(first_pair, end_pair, POSITIONS):
            b_positions, b_slots, b_targets, m_pairs = _load_pairs(
                pair_positions, pair_slots, targets, pair + tl.arange(0, POSITIONS), end_pair
            )
            b_shift = tl.load(logsumexp + b_slots, mask=m_pairs, other=0.0)
            b_grad = tl.load(grad_logsumexp + b_slots, mask=m_pairs, other=0.0)
            b_logits = streamed_logits(
                rows, b_items, m_entries, states, b_positions, m_pairs, width,
                ITEMS, POSITIONS, WIDTH, PRECISION,
            )  # fmt: skip
            if OFFSETS:
                b_logits -= b_offsets[:, None]
            keep = m_pairs[None, :] & (b_items[:, None] != b_targets[None, :])
            if ROUNDS:
                keep = keep & ~met_before(
                    item_chunks, b_items, m_entries, position_chunks, b_positions, m_pairs,
                    round_index, num_rounds, reach, ITEMS, POSITIONS,
                )  # fmt: skip
            b_logits = tl.where(keep, (b_logits - b_shift[None, :]) * LOG2E, -float("inf"))
            b_states = load_tile(states, b_positions, m_pairs, first_column, width, OUT)
            b_share = (tl.exp2(b_logits) * b_grad[None, :]).to(b_states.dtype)
            b_total = tl.dot(b_share, b_states, b_total, input_precision=PRECISION)
    o_columns = first_column + tl.arange(0, OUT)
    if BY_ROW:
        o_lines, m_lines = b_items, m_entries
    else:
        o_lines = o_entries - first_entry
        m_lines = m_entries & (o_lines >= 0) & (o_entries < end_entry)
    o_out = o_lines[:, None] * width + o_columns[None, :]
    mask = m_lines[:, None] & (o_columns < width)[None, :]
    if BY_ROW:
        if scale is not None:
            b_total *= tl.load(scale)
        b_total += tl.load(total + o_out, mask=mask, other=0.0)
    tl.store(total + o_out, b_total, mask=mask)


def _positions(blocks: Blocks) -> Tensor:
    if blocks.pair_positions is None:
        return torch.arange(blocks.targets.numel(), device=blocks.targets.device)
    return blocks.pair_positions


@dataclass(frozen=True, slots=True)
class _Listed:
    """Arguments that all listed kernels share, in the order of their signatures, and the tile."""

    tile: Tile
    tensors: tuple[Tensor, ...]
    num_rounds: int
    reach: int
    options: dict[str, int | str]

    @staticmethod
    def of(kernel: str, problem: LaunchProblem, blocks: Blocks) -> "_Listed":
        rounds = blocks.rounds
        positions, unused = _positions(blocks), blocks.targets
        tile = problem.tile(kernel if rounds is None else f"{kernel}_rounds")
        switches = {"OFFSETS": blocks.offsets is not None, "ROUNDS": rounds is not None}
        return _Listed(
            tile=tile,
            tensors=(
                problem.states,
                problem.rows,
                positions,
                positions if blocks.pair_slots is None else blocks.pair_slots,
                blocks.items,
                blocks.targets,
                unused if blocks.offsets is None else blocks.offsets,
                unused if rounds is None else rounds.position_chunks.contiguous(),
                unused if rounds is None else rounds.item_chunks.contiguous(),
            ),
            num_rounds=0 if rounds is None else rounds.position_chunks.shape[1],
            reach=0 if rounds is None else rounds.reach,
            options=problem.options(tile) | switches,
        )


def forward(problem: LaunchProblem, blocks: Blocks, logsumexp: Tensor) -> None:
    """Adds candidates to the (num_slots,) float32 log-sum-exps; no slot may occur twice."""
    listed = _Listed.of("listed_forward", problem, blocks)
    tiles = pair_tiles(blocks, listed.tile.positions)
    listed_forward_kernel[(tiles.shape[1],)](
        *listed.tensors,
        tiles,
        logsumexp,
        tiles.shape[1],
        problem.width,
        listed.num_rounds,
        listed.reach,
        **listed.options,
    )


def states_backward(
    problem: LaunchProblem, blocks: Blocks, upstream: Upstream, grad_states: Tensor
) -> None:
    """Adds the gradient of states to (N, D) float32; no position may occur twice in the blocks."""
    listed = _Listed.of("listed_states_backward", problem, blocks)
    tiles = pair_tiles(blocks, listed.tile.positions)
    listed_states_backward_kernel[(tiles.shape[1], problem.num_out(listed.tile))](
        *listed.tensors,
        tiles,
        upstream.shift,
        upstream.grad,
        upstream.scale,
        grad_states,
        tiles.shape[1],
        problem.width,
        listed.num_rounds,
        listed.reach,
        OUT=listed.tile.out,
        **listed.options,
    )


def rows_backward(
    problem: LaunchProblem, blocks: Blocks, upstream: Upstream, grad_rows: Tensor
) -> None:
    """Adds the gradient of rows to (R, D) float32.

    In a round of nearby chunks each row is one entry. Else entries get gradients of their own, some
    entries at a time, which are then summed by row.
    """
    listed = _Listed.of("listed_rows_backward", problem, blocks)
    num_entries = blocks.items.numel()
    if not num_entries:
        return
    tiles, covers = row_tiles(blocks, listed.tile.items)
    by_row = blocks.rounds is not None and blocks.borders is not None
    rounds = blocks.rounds.block_rounds if blocks.rounds is not None else 0
    chunk = num_entries if by_row else entries_at_once(num_entries, problem.width)
    total = grad_rows if by_row else grad_rows.new_empty((chunk, problem.width))
    for first_entry in range(0, num_entries, chunk):
        end_entry = min(first_entry + chunk, num_entries)
        listed_rows_backward_kernel[(tiles.shape[1], problem.num_out(listed.tile))](
            *listed.tensors,
            tiles,
            covers,
            blocks.pair_starts,
            None if isinstance(rounds, int) else rounds,
            upstream.shift,
            upstream.grad,
            upstream.scale,
            total,
            tiles.shape[1],
            first_entry,
            end_entry,
            rounds if isinstance(rounds, int) else 0,
            problem.width,
            listed.num_rounds,
            listed.reach,
            OUT=listed.tile.out,
            BY_ROW=by_row,
            **listed.options,
        )
        if not by_row:
            add_rows(total, blocks.items[first_entry:end_entry], grad_rows, scale=upstream.scale)
