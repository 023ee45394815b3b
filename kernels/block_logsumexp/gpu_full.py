"""Triton kernels of one contiguous block, the full softmax: positions and rows are ranges.

Bytes and products of one call with N positions, R rows and width D (E bytes an element), P
positions and I rows a tile: forward 2 N R D FLOP, reads E D (N + R ceil(N / P)); backward for
states 4 N R D, reads the same; backward for rows 4 N R D, reads E D (R + N ceil(R / I)). Where D
exceeds the output tile, the logits are computed again for each part of the output's width.
"""

import triton
import triton.language as tl

from shardrec.kernels.block_logsumexp.tile_math import (
    LN2,
    LOG2E,
    add_exponentials,
    held_logits,
    load_tile,
    streamed_logits,
)

__all__ = ["full_forward_kernel", "full_rows_backward_kernel", "full_states_backward_kernel"]


@triton.jit
def _part(first, end, i_part, num_parts, TILE: tl.constexpr):
    """The ``i_part``-th of ``num_parts`` ranges of whole tiles that cover [first, end)."""
    per_part = tl.cdiv(tl.cdiv(end - first, TILE), num_parts) * TILE
    part_first = first + i_part * per_part
    return part_first, tl.minimum(part_first + per_part, end)


@triton.jit
def full_forward_kernel(
    states, rows, targets, bounds, partials, num_positions, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each position over one part of the rows.

    Grid: (tiles of positions, parts of the rows). ``partials`` is (parts, N) float32; ``bounds``
    holds the first and end position and the first and end row.
    """
    i_part = tl.program_id(1).to(tl.int64)
    first_position, end_position = tl.load(bounds), tl.load(bounds + 1)
    first, end = _part(tl.load(bounds + 2), tl.load(bounds + 3), i_part, tl.num_programs(1), ITEMS)
    o_positions = first_position + tl.program_id(0).to(tl.int64) * POSITIONS
    o_positions += tl.arange(0, POSITIONS)
    m_positions = o_positions < end_position
    b_targets = tl.load(targets + o_positions, mask=m_positions, other=-1)
    b_max = tl.full((POSITIONS,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((POSITIONS,), dtype=tl.float32)
    if HOLD:
        b_states = load_tile(states, o_positions, m_positions, 0, width, WIDTH)
    for item in range(first, end, ITEMS):
        o_items = item + tl.arange(0, ITEMS)
        m_items = o_items < end
        if HOLD:
            b_rows = load_tile(rows, o_items, m_items, 0, width, WIDTH)
            b_logits = held_logits(b_states, b_rows, PRECISION)
        else:
            b_logits = streamed_logits(
                states, o_positions, m_positions, rows, o_items, m_items, width,
                POSITIONS, ITEMS, WIDTH, PRECISION,
            )  # fmt: skip
        keep = m_items[None, :] & (o_items[None, :] != b_targets[:, None])
        b_logits = tl.where(keep, b_logits * LOG2E, -float("inf"))
        b_max, b_sum = add_exponentials(b_max, b_sum, b_logits)
    b_logsumexp = (b_max + tl.log2(b_sum)) * LN2
    tl.store(partials + i_part * num_positions + o_positions, b_logsumexp, mask=m_positions)


@triton.jit
def full_states_backward_kernel(
    states, rows, targets, bounds, logsumexp, grad_logsumexp, scale, grad_states, num_positions, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Adds the states' gradient over one part of the rows to (parts, N, D) float32.

    Grid: (tiles of positions, parts of the rows, parts of the width); each output element has one
    writer.
    """
    i_part = tl.program_id(1).to(tl.int64)
    first_position, end_position = tl.load(bounds), tl.load(bounds + 1)
    first, end = _part(tl.load(bounds + 2), tl.load(bounds + 3), i_part, tl.num_programs(1), ITEMS)
    first_column = tl.program_id(2) * OUT
    o_positions = first_position + tl.program_id(0).to(tl.int64) * POSITIONS
    o_positions += tl.arange(0, POSITIONS)
    m_positions = o_positions < end_position
    b_targets = tl.load(targets + o_positions, mask=m_positions, other=-1)
    b_shift = tl.load(logsumexp + o_positions, mask=m_positions, other=0.0)
    b_grad = tl.load(grad_logsumexp + o_positions, mask=m_positions, other=0.0)
    b_total = tl.zeros((POSITIONS, OUT), dtype=tl.float32)
    if HOLD:
        b_states = load_tile(states, o_positions, m_positions, 0, width, WIDTH)
    for item in range(first, end, ITEMS):
        o_items = item + tl.arange(0, ITEMS)
        m_items = o_items < end
        if HOLD:
            b_rows = load_tile(rows, o_items, m_items, 0, width, WIDTH)
            b_logits = held_logits(b_states, b_rows, PRECISION)
        else:
            b_logits = streamed_logits(
                states, o_positions, m_positions, rows, o_items, m_items, width,
                POSITIONS, ITEMS, WIDTH, PRECISION,
            )  # fmt: skip
            b_rows = load_tile(rows, o_items, m_items, first_column, width, OUT)
        keep = m_items[None, :] & (o_items[None, :] != b_targets[:, None])
        b_logits = tl.where(keep, (b_logits - b_shift[:, None]) * LOG2E, -float("inf"))
        b_share = (tl.exp2(b_logits) * b_grad[:, None]).to(b_rows.dtype)
        b_total = tl.dot(b_share, b_rows, b_total, input_precision=PRECISION)
    o_columns = first_column + tl.arange(0, OUT)
    o_out = (i_part * num_positions + o_positions)[:, None] * width + o_columns[None, :]
    mask = m_positions[:, None] & (o_columns < width)[None, :]
    b_total = b_total * tl.load(scale) + tl.load(grad_states + o_out, mask=mask, other=0.0)
    tl.store(grad_states + o_out, b_total, mask=mask)


@triton.jit
def full_rows_backward_kernel(
    states, rows, targets, bounds, logsumexp, grad_logsumexp, scale, grad_rows, num_rows, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Adds the rows' gradient over one part of the positions to (parts, R, D) float32.

    Grid: (tiles of rows, parts of the positions, parts of the width); each output element has one
    writer.
    """
    i_part = tl.program_id(1).to(tl.int64)
    first, end = _part(tl.load(bounds), tl.load(bounds + 1), i_part, tl.num_programs(1), POSITIONS)
    first_column = tl.program_id(2) * OUT
    o_items = tl.load(bounds + 2) + tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    m_items = o_items < tl.load(bounds + 3)
    b_total = tl.zeros((ITEMS, OUT), dtype=tl.float32)
    if HOLD:
        b_rows = load_tile(rows, o_items, m_items, 0, width, WIDTH)
    for position in range(first, end, POSITIONS):
        o_positions = position + tl.arange(0, POSITIONS)
        m_positions = o_positions < end
        b_targets = tl.load(targets + o_positions, mask=m_positions, other=-1)
        b_shift = tl.load(logsumexp + o_positions, mask=m_positions, other=0.0)
        b_grad = tl.load(grad_logsumexp + o_positions, mask=m_positions, other=0.0)
        if HOLD:
            b_states = load_tile(states, o_positions, m_positions, 0, width, WIDTH)
            b_logits = held_logits(b_rows, b_states, PRECISION)
        else:
            b_logits = streamed_logits(
                rows, o_items, m_items, states, o_positions, m_positions, width,
                ITEMS, POSITIONS, WIDTH, PRECISION,
            )  # fmt: skip
            b_states = load_tile(states, o_positions, m_positions, first_column, width, OUT)
        keep = m_positions[None, :] & (o_items[:, None] != b_targets[None, :])
        b_logits = tl.where(keep, (b_logits - b_shift[None, :]) * LOG2E, -float("inf"))
        b_share = (tl.exp2(b_logits) * b_grad[None, :]).to(b_states.dtype)
        b_total = tl.dot(b_share, b_states, b_total, input_precision=PRECISION)
    o_columns = first_column + tl.arange(0, OUT)
    o_out = (i_part * num_rows + o_items)[:, None] * width + o_columns[None, :]
    mask = m_items[:, None] & (o_columns < width)[None, :]
    b_total = b_total * tl.load(scale) + tl.load(grad_rows + o_out, mask=mask, other=0.0)
    tl.store(grad_rows + o_out, b_total, mask=mask)
