"""Triton kernels of the full softmax, one block of all positions and rows, and their launchers.

FLOP and bytes read by one call, with N positions, R rows, width D, E bytes per element, and P
positions and I rows per tile: forward 2 N R D FLOP and E D (N + R ceil(N / P)) bytes; gradient of
states 4 N R D FLOP and the same bytes; gradient of rows 4 N R D FLOP and E D (R + N ceil(R / I))
bytes. If D exceeds the output tile, the logits are recomputed for each part of the output width.

A kernel's rows are those from ``first_row`` to ``num_rows``: so its end can be tested alone, above
element 2**31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream
from shardrec.kernels.block_logsumexp.gpu.tile_math import (
    LN2,
    LOG2E,
    add_exponentials,
    held_logits,
    load_span,
    span_logits,
)
from shardrec.kernels.device.backend import num_processors
from shardrec.kernels.device.tiles import Tile

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "PROGRAMS_PER_PROCESSOR",
    "forward",
    "full_forward_kernel",
    "full_rows_backward_kernel",
    "full_states_backward_kernel",
    "rows_backward",
    "states_backward",
]


@triton.jit
def _part(first_line, end_line, i_part, num_parts, TILE: tl.constexpr):
    """The ``i_part``-th of ``num_parts`` ranges of whole tiles that cover the lines, int64.

    First line, end of the tiles that are whole, and end.
    """
    per_part = tl.cdiv(tl.cdiv(end_line - first_line, TILE), num_parts) * TILE
    first = first_line + i_part * per_part
    end = tl.maximum(tl.minimum(first + per_part, end_line), first)
    return first, first + (end - first) // TILE * TILE, end


@triton.jit
def _count(first, end, TILE: tl.constexpr):
    """Lines of the tile at ``first`` that are before ``end``, int32."""
    return tl.minimum(end - first, TILE).to(tl.int32)


@triton.jit
def _has_target(b_own, ITEMS: tl.constexpr):
    """Whether any of the targets is among the ITEMS rows of a tile, for which few tiles need masks.

    ``b_own`` is int32, the row of each target counted from the first row of the tile.
    """
    return tl.max(((b_own >= 0) & (b_own < ITEMS)).to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["num_positions", "first_row", "num_rows"])
def full_forward_kernel(
    states, rows, targets, partials, num_positions, first_row, num_rows, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exp of each position over one part of the rows to (parts, N) float32.

    Grid: (tiles of positions, parts of the rows). ``partials`` is (parts, N) float32.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_part = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS
    num_here = _count(position, num_positions, POSITIONS)
    first, _, end = _part(first_row, num_rows, i_part, tl.num_programs(1), ITEMS)
    o_positions, o_items = tl.arange(0, POSITIONS), tl.arange(0, ITEMS)
    m_positions = o_positions < num_here
    b_targets = tl.load(targets + position + o_positions, mask=m_positions, other=-1)
    b_max = tl.full((POSITIONS,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((POSITIONS,), dtype=tl.float32)
    if HOLD:
        b_states = load_span(states, position, num_here, 0, width, POSITIONS, WIDTH, False)
    for item in range(first, end, ITEMS):
        num_items = _count(item, end, ITEMS)
        if HOLD:
            b_rows = load_span(rows, item, num_items, 0, width, ITEMS, WIDTH, False)
            b_logits = held_logits(b_states, b_rows, PRECISION)
        else:
            b_logits = span_logits(
                states, position, num_here, rows, item, num_items, width,
                POSITIONS, ITEMS, WIDTH, PRECISION, False,
            )  # fmt: skip
        b_own = (b_targets - item).to(tl.int32)
        keep = (o_items < num_items)[None, :] & (o_items[None, :] != b_own[:, None])
        b_logits = tl.where(keep, b_logits * LOG2E, -float("inf"))
        b_max, b_sum = add_exponentials(b_max, b_sum, b_logits)
    b_logsumexp = (b_max + tl.log2(b_sum)) * LN2
    tl.store(partials + i_part * num_positions + position + o_positions, b_logsumexp, m_positions)


@triton.jit(do_not_specialize=["num_positions", "first_row", "num_rows"])
def full_states_backward_kernel(
    states, rows, targets, logsumexp, grad_logsumexp, scale, grad_states,
    num_positions, first_row, num_rows, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of states from one part of the rows to (parts, N, D) float32.

    Grid: (tiles of positions, parts of the rows, parts of the width); each output element has one
    writer.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_part = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS
    num_here = _count(position, num_positions, POSITIONS)
    first, _, end = _part(first_row, num_rows, i_part, tl.num_programs(1), ITEMS)
    first_column = tl.program_id(2) * OUT
    o_positions, o_items = tl.arange(0, POSITIONS), tl.arange(0, ITEMS)
    m_positions = o_positions < num_here
    b_targets = tl.load(targets + position + o_positions, mask=m_positions, other=-1)
    b_shift = tl.load(logsumexp + position + o_positions, mask=m_positions, other=0.0)
    b_grad = tl.load(grad_logsumexp + position + o_positions, mask=m_positions, other=0.0)
    o_columns = tl.arange(0, OUT)
    mask = m_positions[:, None] & (o_columns < width - first_column)[None, :]
    grad_states += (i_part * num_positions + position) * width + first_column
    o_out = o_positions[:, None] * width + o_columns[None, :]
    b_total = tl.load(grad_states + o_out, mask=mask, other=0.0)
    if scale is not None:
        b_total /= tl.load(scale)
    if HOLD:
        b_states = load_span(states, position, num_here, 0, width, POSITIONS, WIDTH, False)
    for item in range(first, end, ITEMS):
        num_items = _count(item, end, ITEMS)
        if HOLD:
            b_rows = load_span(rows, item, num_items, 0, width, ITEMS, WIDTH, False)
            b_logits = held_logits(b_states, b_rows, PRECISION)
        else:
            b_logits = span_logits(
                states, position, num_here, rows, item, num_items, width,
                POSITIONS, ITEMS, WIDTH, PRECISION, False,
            )  # fmt: skip
            b_rows = load_span(rows, item, num_items, first_column, width, ITEMS, OUT, False)
        b_own = (b_targets - item).to(tl.int32)
        keep = (o_items < num_items)[None, :] & (o_items[None, :] != b_own[:, None])
        b_logits = tl.where(keep, (b_logits - b_shift[:, None]) * LOG2E, -float("inf"))
        b_share = (tl.exp2(b_logits) * b_grad[:, None]).to(b_rows.dtype)
        b_total = tl.dot(b_share, b_rows, b_total, input_precision=PRECISION)
    if scale is not None:
        b_total *= tl.load(scale)
    tl.store(grad_states + o_out, b_total, mask=mask)


@triton.jit
def _rows_tile(
    b_total, b_rows, rows, item, num_items,
    states, targets, logsumexp, grad_logsumexp, position, end, first_column, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, HOLD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of rows, with that from the positions from ``position`` on."""
    o_positions, o_items = tl.arange(0, POSITIONS), tl.arange(0, ITEMS)
    num_here = _count(position, end, POSITIONS)
    if WHOLE:
        b_targets = tl.load(targets + position + o_positions)
        b_shift = tl.load(logsumexp + position + o_positions)
        b_grad = tl.load(grad_logsumexp + position + o_positions)
    else:
        m_positions = o_positions < num_here
        b_targets = tl.load(targets + position + o_positions, mask=m_positions, other=-1)
        b_shift = tl.load(logsumexp + position + o_positions, mask=m_positions, other=0.0)
        b_grad = tl.load(grad_logsumexp + position + o_positions, mask=m_positions, other=0.0)
    if HOLD:
        b_states = load_span(states, position, num_here, 0, width, POSITIONS, WIDTH, WHOLE)
        b_logits = held_logits(b_rows, b_states, PRECISION)
    else:
        b_logits = span_logits(
            rows, item, num_items, states, position, num_here, width,
            ITEMS, POSITIONS, WIDTH, PRECISION, WHOLE,
        )  # fmt: skip
        b_states = load_span(states, position, num_here, first_column, width, POSITIONS, OUT, WHOLE)
    # Masked afterwards: a position without candidates has the shift -inf. One beyond the end has
    # the gradient 0.
    b_share = tl.exp2((b_logits - b_shift[None, :]) * LOG2E) * b_grad[None, :]
    b_own = (b_targets - item).to(tl.int32)
    if _has_target(b_own, ITEMS):
        b_share = tl.where(o_items[:, None] == b_own[None, :], 0.0, b_share)
    return tl.dot(b_share.to(b_states.dtype), b_states, b_total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_positions", "first_row", "num_rows"])
def full_rows_backward_kernel(
    states, rows, targets, logsumexp, grad_logsumexp, scale, grad_rows,
    num_positions, first_row, num_rows, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of rows from one part of the positions to (parts, R, D) float32.

    Grid: (tiles of rows, parts of the positions, parts of the width); each output element has one
    writer.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_part = tl.program_id(1).to(tl.int64)
    first, whole, end = _part(0, num_positions, i_part, tl.num_programs(1), POSITIONS)
    first_column = tl.program_id(2) * OUT
    item = first_row + tl.program_id(0).to(tl.int64) * ITEMS
    num_items = _count(item, num_rows, ITEMS)
    o_items, o_columns = tl.arange(0, ITEMS), tl.arange(0, OUT)
    mask = (o_items < num_items)[:, None] & (o_columns < width - first_column)[None, :]
    grad_rows += (i_part * num_rows + item) * width + first_column
    o_out = o_items[:, None] * width + o_columns[None, :]
    b_total = tl.load(grad_rows + o_out, mask=mask, other=0.0)
    if scale is not None:
        b_total /= tl.load(scale)
    b_rows = b_total  # not used where D is read in parts
    if HOLD:
        b_rows = load_span(rows, item, num_items, 0, width, ITEMS, WIDTH, False)
    for position in range(first, whole, POSITIONS):
        b_total = _rows_tile(
            b_total, b_rows, rows, item, num_items,
            states, targets, logsumexp, grad_logsumexp, position, end, first_column, width,
            POSITIONS, ITEMS, WIDTH, OUT, PRECISION, HOLD, True,
        )  # fmt: skip
    if whole < end:
        b_total = _rows_tile(
            b_total, b_rows, rows, item, num_items,
            states, targets, logsumexp, grad_logsumexp, whole, end, first_column, width,
            POSITIONS, ITEMS, WIDTH, OUT, PRECISION, HOLD, False,
        )  # fmt: skip
    if scale is not None:
        b_total *= tl.load(scale)
    tl.store(grad_rows + o_out, b_total, mask=mask)


# Long loops are split into parts until there are this many programs per multiprocessor.
PROGRAMS_PER_PROCESSOR = 2


def _num_parts(num_programs: int, num_steps: int, device: torch.device) -> int:
    """Number of parts into which a loop of ``num_steps`` tiles is split to keep the device busy."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device)
    return max(1, min(wanted // max(num_programs, 1), num_steps))


def forward(problem: LaunchProblem) -> Tensor:
    """(N,) float32 log-sum-exp of each position over all rows but its target."""
    tile = problem.tile("full_forward")
    num_positions = problem.states.shape[0]
    num_tiles = triton.cdiv(num_positions, tile.positions)
    num_steps = triton.cdiv(problem.rows.shape[0], tile.items)
    num_parts = _num_parts(num_tiles, num_steps, problem.states.device)
    partials = problem.states.new_empty((num_parts, num_positions), dtype=torch.float32)
    full_forward_kernel[(num_tiles, num_parts)](
        problem.states,
        problem.rows,
        problem.targets,
        partials,
        num_positions,
        0,
        problem.rows.shape[0],
        problem.width,
        **problem.options(tile),
        HOLD=tile.width >= problem.width,
    )
    return partials.logsumexp(0) if num_parts > 1 else partials[0]


def states_backward(problem: LaunchProblem, upstream: Upstream, grad_states: Tensor) -> None:
    """Adds the gradient of states to (N, D) float32 ``grad_states``; one writer per element."""
    tile = problem.tile("full_states_backward")
    num_tiles = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, triton.cdiv(problem.rows.shape[0], tile.items))
    kernel = full_states_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_states, tile)


def rows_backward(problem: LaunchProblem, upstream: Upstream, grad_rows: Tensor) -> None:
    """Adds the gradient of rows to (R, D) float32 ``grad_rows``; one writer per element."""
    tile = problem.tile("full_rows_backward")
    num_tiles = triton.cdiv(problem.rows.shape[0], tile.items)
    num_steps = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, num_steps)
    kernel = full_rows_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_rows, tile)


def _full_grid(
    problem: LaunchProblem, tile: Tile, num_tiles: int, num_steps: int
) -> tuple[int, int, int]:
    """Launch grid: tiles of owned lines, parts of the loop of ``num_steps``, parts of the width."""
    num_out = problem.num_out(tile)
    return num_tiles, _num_parts(num_tiles * num_out, num_steps, problem.states.device), num_out


def _launch_full_backward(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    problem: LaunchProblem,
    upstream: Upstream,
    total: Tensor,
    tile: Tile,
) -> None:
    """Adds the result of a backward kernel to (M, D) ``total``, summing the parts of its loop."""
    num_parts = grid[1]
    partials = total if num_parts == 1 else total.new_zeros((num_parts, *total.shape))
    kernel[grid](
        problem.states,
        problem.rows,
        problem.targets,
        upstream.shift,
        upstream.grad,
        upstream.scale,
        partials,
        problem.states.shape[0],
        0,
        problem.rows.shape[0],
        problem.width,
        OUT=tile.out,
        **problem.options(tile),
        HOLD=tile.width >= problem.width,
    )
    if num_parts > 1:
        total += partials.sum(0)
