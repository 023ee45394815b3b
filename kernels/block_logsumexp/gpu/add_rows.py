"""Triton kernel that sums lines by row in a fixed order, without atomics, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.device.backend import alignment, operand

# mypy: disable-error-code="no-untyped-def"

__all__ = ["add_rows", "add_rows_kernel"]

_LINES = 32


@triton.jit
def add_rows_kernel(
    source, weights, order, sorted_rows, run_ends, total, scale, width,
    LINES: tl.constexpr, OUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds weighted lines of ``source`` to (R, D) float32 ``total``, each to the row of its entry.

    Grid: (entries, parts of the width). Entries are sorted by row; the program of a row's first
    entry sums all entries of the row in order and the others return, so each row has one writer.
    Entries of a negative row are skipped.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    i_entry = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + i_entry)
    before = tl.load(sorted_rows + i_entry - 1, mask=i_entry > 0, other=-1)
    if row == before:
        return
    o_columns = tl.program_id(1) * OUT + tl.arange(0, OUT)
    m_columns = o_columns < width
    end = tl.load(run_ends + i_entry)
    b_total = tl.zeros((OUT,), dtype=tl.float32)
    for entry in range(i_entry, end, LINES):
        o_entries = entry + tl.arange(0, LINES)
        m_entries = o_entries < end
        b_lines = tl.load(order + o_entries, mask=m_entries, other=0)
        b_source = tl.load(
            source + b_lines[:, None] * width + o_columns[None, :],
            mask=m_entries[:, None] & m_columns[None, :],
            other=0.0,
        ).to(tl.float32)
        if weights is not None:
            b_source *= tl.load(weights + b_lines, mask=m_entries, other=0.0)[:, None]
        b_total += tl.sum(b_source, 0)
    o_out = row * width + o_columns
    if scale is not None:
        b_total *= tl.load(scale)
    b_total += tl.load(total + o_out, mask=m_columns, other=0.0)
    tl.store(total + o_out, b_total, mask=m_columns)


def add_rows(
    source: Tensor,
    rows: Tensor,
    total: Tensor,
    *,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Adds line e of ``source`` to ``total[rows[e]]``, in a fixed order; negative rows are skipped.

    Args:
        source: (n, D) float.
        rows: (n,) int64.
        total: (R, D) float32.
        weights: (n,) float32 factor of each line; None for ones.
        scale: (1,) float32 factor of all lines; None for one.
    """
    if not rows.numel() or not total.numel():
        return
    width = total.shape[1]
    sorted_rows, order = rows.sort(stable=True)
    run_ends = torch.searchsorted(sorted_rows, sorted_rows, right=True)
    out = min(256, triton.next_power_of_2(width))
    add_rows_kernel[(rows.numel(), triton.cdiv(width, out))](
        operand(source),
        weights,
        order,
        sorted_rows,
        run_ends,
        total,
        scale,
        width,
        LINES=_LINES,
        OUT=out,
        ALIGN=alignment(width),
        num_warps=4,
    )
