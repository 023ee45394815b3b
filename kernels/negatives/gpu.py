"""Triton kernels of the counter-based draws, equal to those of ``draws.py``, and launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.device.backend import (
    alignment,
    architecture_of,
    num_processors,
    operand,
    precision_of,
)
from shardrec.kernels.device.tiles import tile_for

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "draw_below",
    "draw_below_kernel",
    "fill_signs",
    "mixed_signs",
    "mixed_signs_kernel",
    "random_signs",
    "random_signs_kernel",
    "sign_tile",
]

# Signs per call of the generator: four words of 32 bits.
SIGNS = tl.constexpr(128)
_CALLS = 256


@triton.jit
def words(call, line, seed, step, stream):
    """Four uint32 random words of the counters (call, line, step, stream).

    The casts are needed because ``tl.philox`` uses another generator for 64-bit counters.
    """
    zero = (call * 0 + line * 0).to(tl.uint32)
    return tl.philox(
        seed,
        zero + call.to(tl.uint32),
        zero + line.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + stream.to(tl.uint32),
    )


@triton.jit
def scale_below(high, low, bound):
    """Int64 ``floor(bound * u)``, u the 64-bit fixed-point fraction of two words."""
    b_high, b_low = high.to(tl.int64), low.to(tl.int64)
    return (b_high * bound + ((b_low * bound) >> 32)) >> 32


@triton.jit
def sign_tile(o_lines, first_column, seed, step, stream, WIDTH: tl.constexpr):
    """(len(o_lines), WIDTH) float32 random signs of the columns from ``first_column`` on.

    WIDTH is a power of two up to 128 that divides ``first_column``, so that one call of the
    generator per line serves the tile.
    """
    call = o_lines * 0 + first_column // 128
    w0, w1, w2, w3 = words(call, o_lines, seed, step, stream)
    o_bits = first_column % 128 + tl.arange(0, WIDTH)
    word = (o_bits // 32)[None, :]
    low = tl.where(word == 0, w0[:, None], w1[:, None])
    high = tl.where(word == 2, w2[:, None], w3[:, None])
    b_words = tl.where(word < 2, low, high)
    bits = (b_words >> (o_bits % 32).to(tl.uint32)[None, :]) & 1
    return tl.where(bits == 1, -1.0, 1.0)


@triton.jit(do_not_specialize=["seed", "step", "stream", "bound", "num_draws"])
def draw_below_kernel(
    blocks, draws, seed, step, stream, bound, num_draws, CALLS: tl.constexpr
):  # fmt: skip
    """(T, K) int64 draws in [0, bound). Grid: (T, tiles of calls); one writer per draw."""
    i_line = tl.program_id(0).to(tl.int64)
    o_calls = tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    line = tl.load(blocks + i_line)
    seed, step, stream = seed.to(tl.int64), step.to(tl.int64), stream.to(tl.int64)
    w0, w1, w2, w3 = words(o_calls.to(tl.int64), line, seed, step, stream)
    o_draws = i_line * num_draws + 2 * o_calls
    tl.store(draws + o_draws, scale_below(w0, w1, bound), mask=2 * o_calls < num_draws)
    tl.store(draws + o_draws + 1, scale_below(w2, w3, bound), mask=2 * o_calls + 1 < num_draws)


@triton.jit(do_not_specialize=["seed", "step", "stream", "first_line", "num_lines"])
def random_signs_kernel(
    signs, seed, step, stream, first_line, num_lines, width, LINES: tl.constexpr,
):  # fmt: skip
    """(streams, num_lines, width) signs. Grid: (tiles of lines, calls, streams from ``stream``)."""
    o_lines = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    first_column = tl.program_id(1) * SIGNS
    i_stream = tl.program_id(2).to(tl.int64)
    seed, step, stream = seed.to(tl.int64), step.to(tl.int64), stream.to(tl.int64)
    b_signs = sign_tile(first_line + o_lines, first_column, seed, step, stream + i_stream, SIGNS)
    signs += i_stream * num_lines * width
    o_columns = first_column + tl.arange(0, SIGNS)
    mask = (o_lines < num_lines)[:, None] & (o_columns < width)[None, :]
    tl.store(signs + o_lines[:, None] * width + o_columns[None, :], b_signs, mask=mask)


@triton.jit(
    do_not_specialize=["seed", "step", "stream", "first_line", "num_positions", "num_columns"]
)
def mixed_signs_kernel(
    states, partials, seed, step, stream, first_line, num_positions, num_columns, width,
    POSITIONS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(parts, num_columns, D) float32 products of transposed signs and states.

    Grid: (tiles of 128 columns, parts of the width, parts of the positions). The signs are
    generated inside the product.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    first_column, first_feature = tl.program_id(0) * SIGNS, tl.program_id(1) * WIDTH
    i_part = tl.program_id(2).to(tl.int64)
    seed, step, stream = seed.to(tl.int64), step.to(tl.int64), stream.to(tl.int64)
    per_part = tl.cdiv(tl.cdiv(num_positions, POSITIONS), tl.num_programs(2)) * POSITIONS
    end = tl.minimum((i_part + 1) * per_part, num_positions)
    o_features = first_feature + tl.arange(0, WIDTH)
    b_total = tl.zeros((SIGNS, WIDTH), dtype=tl.float32)
    for position in range(i_part * per_part, end, POSITIONS):
        o_positions = position + tl.arange(0, POSITIONS)
        b_signs = sign_tile(first_line + o_positions, first_column, seed, step, stream, SIGNS)
        mask = (o_positions < end)[:, None] & (o_features < width)[None, :]
        o_states = o_positions[:, None] * width + o_features[None, :]
        b_states = tl.load(states + o_states, mask=mask, other=0.0)
        b_signs = tl.trans(b_signs).to(b_states.dtype)
        b_total = tl.dot(b_signs, b_states, b_total, input_precision=PRECISION)
    o_columns = first_column + tl.arange(0, SIGNS)
    o_out = (i_part * num_columns + o_columns)[:, None] * width + o_features[None, :]
    mask = (o_columns < num_columns)[:, None] & (o_features < width)[None, :]
    tl.store(partials + o_out, b_total, mask=mask)


def draw_below(
    bound: int, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int
) -> Tensor:
    """(len(blocks), num_draws) int64 in [0, bound); see ``draws.draw_below``."""
    draws = torch.empty((blocks.numel(), num_draws), dtype=torch.int64, device=blocks.device)
    grid = (blocks.numel(), triton.cdiv((num_draws + 1) // 2, _CALLS))
    if draws.numel():
        draw_below_kernel[grid](
            blocks.contiguous(), draws, *counters(seed, step, stream), bound, num_draws, _CALLS
        )
    return draws


def random_signs(
    first_line: int,
    num_lines: int,
    width: int,
    device: torch.device | str,
    *,
    seed: int,
    step: int,
    stream: int,
) -> Tensor:
    """(num_lines, width) float32 of +1 and -1; see ``draws.random_signs``."""
    signs = torch.empty((num_lines, width), dtype=torch.float32, device=device)
    return fill_signs(signs[None], first_line, seed=seed, step=step, stream=stream)[0]


def fill_signs(signs: Tensor, first_line: int, *, seed: int, step: int, stream: int) -> Tensor:
    """The (S, num_lines, width) tensor, filled with the signs of S streams from ``stream`` on."""
    num_streams, num_lines, width = signs.shape
    if signs.numel():
        random_signs_kernel[(triton.cdiv(num_lines, 16), triton.cdiv(width, 128), num_streams)](
            signs, *counters(seed, step, stream), first_line, num_lines, width, 16
        )
    return signs


def mixed_signs(
    states: Tensor, first_line: int, num_columns: int, *, seed: int, step: int, stream: int
) -> Tensor:
    """(num_columns, D) float32 sum over i of ``sign(first_line + i, column) * states[i]``.

    The signs are never in memory. Positions are split into parts that are summed in a fixed order.
    """
    num_positions, width = states.shape
    if 0 in (num_positions, num_columns, width):
        return states.new_zeros((num_columns, width), dtype=torch.float32)
    tile = tile_for("mixed_signs", width, states.dtype, architecture_of(states.device))
    grid = (triton.cdiv(num_columns, 128), triton.cdiv(width, tile.width))
    wanted = triton.cdiv(2 * num_processors(states.device), grid[0] * grid[1])
    num_parts = max(1, min(wanted, triton.cdiv(num_positions, tile.positions)))
    partials = states.new_empty((num_parts, num_columns, width), dtype=torch.float32)
    mixed_signs_kernel[(*grid, num_parts)](
        operand(states),
        partials,
        *counters(seed, step, stream),
        first_line,
        num_positions,
        num_columns,
        width,
        POSITIONS=tile.positions,
        WIDTH=tile.width,
        ALIGN=alignment(width),
        PRECISION=precision_of(states.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partials.sum(0)


def counters(seed: int, step: int, stream: int) -> tuple[int, int, int]:
    """Seed, step and stream as kernel arguments, the seed wrapped to a signed 64-bit integer."""
    seed &= (1 << 64) - 1
    return (seed - (1 << 64) if seed >> 63 else seed), step, stream
