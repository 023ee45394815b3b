"""Device functions of the Triton kernels: tiles of logits, online log-sum-exp, masks of rounds."""

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "LN2",
    "LOG2E",
    "add_exponentials",
    "held_logits",
    "load_span",
    "load_tile",
    "met_before",
    "span_logits",
    "streamed_logits",
]

# Logits are kept in base 2 inside a kernel, because the hardware has exp2 only.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(matrix, o_rows, m_rows, first_column, width, WIDTH: tl.constexpr):
    """(len(o_rows), WIDTH) tile of a (.., width) matrix at int64 lines ``o_rows``, 0 if masked."""
    o_columns = first_column + tl.arange(0, WIDTH)
    mask = m_rows[:, None] & (o_columns < width)[None, :]
    return tl.load(matrix + o_rows[:, None] * width + o_columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_span(matrix, first, count, first_column, width, LINES: tl.constexpr, WIDTH: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """(LINES, WIDTH) tile of a (.., width) matrix from line ``first`` on, 0 beyond ``count`` lines.

    WHOLE: ``count`` is LINES and not compared with. The address is an int64 scalar plus int32
    offsets, which saves registers.
    """
    o_lines = tl.arange(0, LINES)
    o_columns = tl.arange(0, WIDTH)
    mask = (o_columns < width - first_column)[None, :]
    if not WHOLE:
        mask = mask & (o_lines < count)[:, None]
    # In the interpreter ``first`` may be a Python integer: without the cast, a 32-bit product.
    tile = matrix + (first * tl.cast(width, tl.int64) + first_column)
    return tl.load(tile + (o_lines[:, None] * width + o_columns[None, :]), mask=mask, other=0.0)


@triton.jit
def held_logits(b_left, b_right, PRECISION: tl.constexpr):
    """(LEFT, RIGHT) float32 inner products of two tiles that hold the whole width."""
    return tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)


@triton.jit
def span_logits(
    left, first_left, num_left, right, first_right, num_right, width,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(LEFT, RIGHT) float32 inner products of contiguous lines, looping over parts of the width.

    WHOLE: ``num_right`` is RIGHT and not compared with.
    """
    b_logits = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    for first_column in range(0, width, WIDTH):
        b_left = load_span(left, first_left, num_left, first_column, width, LEFT, WIDTH, False)
        b_right = load_span(right, first_right, num_right, first_column, width, RIGHT, WIDTH, WHOLE)
        b_logits = tl.dot(b_left, tl.trans(b_right), b_logits, input_precision=PRECISION)
    return b_logits


@triton.jit
def streamed_logits(
    left, o_left, m_left, right, o_right, m_right, width,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(LEFT, RIGHT) float32 inner products of indexed lines, looping over parts of the width."""
    b_logits = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    for first_column in range(0, width, WIDTH):
        b_left = load_tile(left, o_left, m_left, first_column, width, WIDTH)
        b_right = load_tile(right, o_right, m_right, first_column, width, WIDTH)
        b_logits = tl.dot(b_left, tl.trans(b_right), b_logits, input_precision=PRECISION)
    return b_logits


@triton.jit
def add_exponentials(b_max, b_sum, b_logits):
    """Running maximum and sum of exponentials of each line, updated by a tile of base-2 logits."""
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    # A line without candidates so far has maximum -inf: shift by 0, which avoids inf - inf.
    b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_logits - b_shift[:, None]), 1)
    return b_new, b_sum


@triton.jit
def met_before(
    chunks_left, o_left, m_left, chunks_right, o_right, m_right, round_index, num_rounds, reach,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(LEFT, RIGHT) bool: whether a round before ``round_index`` already has this candidate."""
    found = tl.zeros((LEFT, RIGHT), dtype=tl.int1)
    for earlier in range(0, round_index):
        b_left = tl.load(chunks_left + o_left * num_rounds + earlier, mask=m_left, other=0)
        b_right = tl.load(chunks_right + o_right * num_rounds + earlier, mask=m_right, other=0)
        # Chunks of rows are stored in one or two bytes.
        b_distance = b_left.to(tl.int32)[:, None] - b_right.to(tl.int32)[None, :]
        found = found | (tl.abs(b_distance) <= reach)
    return found
