"""Triton kernels of blocks of one pair: every position has a candidate list of its own.

There is no matrix product: a program owns one pair, gathers the rows of its candidates one tile at
a time and takes inner products with its state. Memory traffic: forward and backward read a row for
each entry, K D elements per position; the gradient of rows reads a state for each entry, most of
them from the cache, and writes each row once. FLOP: 2 D per entry forward, 6 D backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem
from shardrec.kernels.block_logsumexp.gpu.tile_math import LN2, LOG2E, load_tile
from shardrec.kernels.device.backend import alignment

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "backward",
    "forward",
    "gathered_forward_kernel",
    "gathered_rows_backward_kernel",
    "gathered_states_backward_kernel",
]


@triton.jit
def _load_candidates(rows, items, offsets, o_entries, end, target, width, b_state,
                     WIDTH: tl.constexpr, OFFSETS: tl.constexpr):  # fmt: skip
    """(ITEMS, WIDTH) float32 rows of some entries and their (ITEMS,) base-2 logits."""
    m_entries = o_entries < end
    b_items = tl.load(items + o_entries, mask=m_entries, other=0)
    b_rows = load_tile(rows, b_items, m_entries, 0, width, WIDTH).to(tl.float32)
    b_logits = tl.sum(b_rows * b_state[None, :], 1)
    if OFFSETS:
        b_logits -= tl.load(offsets + o_entries, mask=m_entries, other=0.0)
    keep = m_entries & (b_items != target)
    return b_rows, tl.where(keep, b_logits * LOG2E, -float("inf"))


@triton.jit
def gathered_forward_kernel(
    states, rows, pair_positions, items, item_starts, item_ends, targets, offsets, logsumexp,
    width, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exp of each pair to (N,) float32. Grid: pairs; one writer per slot.

    WIDTH is at least D, so that a row is read once.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_pair = tl.program_id(0)
    position = tl.load(pair_positions + i_pair)
    target, end = tl.load(targets + position), tl.load(item_ends + i_pair)
    o_columns = tl.arange(0, WIDTH)
    b_state = tl.load(states + position * width + o_columns, mask=o_columns < width, other=0.0)
    b_state = b_state.to(tl.float32)
    # Each lane keeps the sum of its own entries; they are combined once, at the end.
    b_max = tl.full((ITEMS,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((ITEMS,), dtype=tl.float32)
    for entry in range(tl.load(item_starts + i_pair), end, ITEMS):
        _, b_logits = _load_candidates(
            rows, items, offsets, entry + tl.arange(0, ITEMS), end, target, width, b_state,
            WIDTH, OFFSETS,
        )  # fmt: skip
        b_new = tl.maximum(b_max, b_logits)
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.exp2(b_logits - b_shift)
        b_max = b_new
    largest = tl.max(b_max, 0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(b_sum * tl.exp2(b_max - shift), 0)
    tl.store(logsumexp + position, (shift + tl.log2(total)) * LN2)


@triton.jit
def gathered_states_backward_kernel(
    states, rows, pair_positions, items, item_starts, item_ends, targets, offsets, logsumexp,
    grad_logsumexp, shares, grad_states, width,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Adds to the (N, D) gradient of states; writes (Q,) float32 shares, dL/dlogit of each entry.

    Grid: pairs; one writer per output element, as no two pairs share a position.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_pair = tl.program_id(0)
    position = tl.load(pair_positions + i_pair)
    target, end = tl.load(targets + position), tl.load(item_ends + i_pair)
    o_columns = tl.arange(0, WIDTH)
    m_columns = o_columns < width
    b_state = tl.load(states + position * width + o_columns, mask=m_columns, other=0.0)
    b_state = b_state.to(tl.float32)
    shift = tl.load(logsumexp + position) * LOG2E
    shift = tl.where(shift == -float("inf"), 0.0, shift)  # no candidates
    grad = tl.load(grad_logsumexp + position)
    o_out = position * width + o_columns
    b_total = tl.load(grad_states + o_out, mask=m_columns, other=0.0)
    for entry in range(tl.load(item_starts + i_pair), end, ITEMS):
        o_entries = entry + tl.arange(0, ITEMS)
        b_rows, b_logits = _load_candidates(
            rows, items, offsets, o_entries, end, target, width, b_state, WIDTH, OFFSETS
        )
        b_share = tl.exp2(b_logits - shift) * grad
        tl.store(shares + o_entries, b_share, mask=o_entries < end)
        b_total += tl.sum(b_rows * b_share[:, None], 0)
    tl.store(grad_states + o_out, b_total, mask=m_columns)


@triton.jit
def gathered_rows_backward_kernel(
    states, entry_positions, shares, order, sorted_rows, run_ends, grad_rows, width,
    ITEMS: tl.constexpr, OUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds the sum of share times state, over the entries of each row, to the (R, D) row gradient.

    Grid: (entries, parts of the width). Entries are sorted by row; the program of a row's first
    entry sums all entries of the row in order and the others return, so each row has one writer.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_entry = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + i_entry)
    before = tl.load(sorted_rows + i_entry - 1, mask=i_entry > 0, other=-1)
    if row == before:
        return
    first_column = tl.program_id(1) * OUT
    o_columns = first_column + tl.arange(0, OUT)
    m_columns = o_columns < width
    end = tl.load(run_ends + i_entry)
    o_out = row * width + o_columns
    b_total = tl.load(grad_rows + o_out, mask=m_columns, other=0.0)
    for entry in range(i_entry, end, ITEMS):
        o_entries = entry + tl.arange(0, ITEMS)
        m_entries = o_entries < end
        b_lines = tl.load(order + o_entries, mask=m_entries, other=0)
        b_shares = tl.load(shares + b_lines, mask=m_entries, other=0.0)
        b_positions = tl.load(entry_positions + b_lines, mask=m_entries, other=0)
        b_states = load_tile(states, b_positions, m_entries, first_column, width, OUT)
        b_total += tl.sum(b_states.to(tl.float32) * b_shares[:, None], 0)
    tl.store(grad_rows + o_out, b_total, mask=m_columns)


def forward(problem: LaunchProblem, blocks: Blocks, logsumexp: Tensor) -> None:
    """Writes the log-sum-exps of the positions that have a block to (N,) float32 ``logsumexp``."""
    tile, width = problem.tile("gathered_forward"), problem.width
    gathered_forward_kernel[(blocks.num_blocks,)](
        problem.states,
        problem.rows,
        *_lists(blocks),
        logsumexp,
        width,
        ITEMS=tile.items,
        WIDTH=_whole(width),
        ALIGN=alignment(width),
        OFFSETS=blocks.offsets is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def backward(
    problem: LaunchProblem,
    blocks: Blocks,
    shift: Tensor,
    grad_logsumexp: Tensor,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> None:
    """Adds to the (N, D) and (R, D) float32 gradients; the workspace is a few (Q,) tensors."""
    tile, width = problem.tile("gathered_states_backward"), problem.width
    pair_positions, items, starts, ends, *_ = _lists(blocks)
    shares = torch.empty(items.numel(), device=items.device)
    gathered_states_backward_kernel[(blocks.num_blocks,)](
        problem.states,
        problem.rows,
        *_lists(blocks),
        shift,
        grad_logsumexp.float().contiguous(),
        shares,
        grad_states,
        width,
        ITEMS=tile.items,
        WIDTH=_whole(width),
        ALIGN=alignment(width),
        OFFSETS=blocks.offsets is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if not items.numel():
        return
    positions = pair_positions.repeat_interleave(ends - starts, output_size=items.numel())
    tile = problem.tile("gathered_rows_backward")
    sorted_rows, order = items.sort(stable=True)
    run_ends = torch.searchsorted(sorted_rows, sorted_rows, right=True)
    gathered_rows_backward_kernel[(items.numel(), triton.cdiv(width, tile.out))](
        problem.states,
        positions,
        shares,
        order,
        sorted_rows,
        run_ends,
        grad_rows,
        width,
        ITEMS=tile.items,
        OUT=tile.out,
        ALIGN=alignment(width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _whole(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _lists(blocks: Blocks) -> tuple[Tensor, ...]:
    """Positions, items, where the list of each pair starts and ends, targets, offsets."""
    assert blocks.pair_positions is not None
    item_starts, item_ends = blocks.item_ranges()
    unused = blocks.targets
    return (
        blocks.pair_positions,
        blocks.items,
        item_starts,
        item_ends,
        blocks.targets,
        unused if blocks.offsets is None else blocks.offsets,
    )
