"""Triton kernels of the targets' logits and of their gradients, and launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.block_logsumexp.gpu.add_rows import add_rows
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem
from shardrec.kernels.block_logsumexp.gpu.tile_math import load_tile
from shardrec.kernels.device.backend import alignment

# mypy: disable-error-code="no-untyped-def"

__all__ = ["backward", "forward", "target_logits_kernel", "target_states_backward_kernel"]

_LINES, _MOST_WIDTH = 16, 128


@triton.jit(do_not_specialize=["num_positions"])
def target_logits_kernel(
    states, rows, targets, logits, num_positions, width,
    LINES: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the logit of each target to (N,) float32, 0 for target -1. Grid: tiles of positions.

    One writer per logit.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    o_positions = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    m_positions = o_positions < num_positions
    b_targets = tl.load(targets + o_positions, mask=m_positions, other=-1)
    m_targets = b_targets >= 0
    b_logits = tl.zeros((LINES,), dtype=tl.float32)
    for first_column in range(0, width, WIDTH):
        b_states = load_tile(states, o_positions, m_targets, first_column, width, WIDTH)
        b_rows = load_tile(rows, b_targets, m_targets, first_column, width, WIDTH)
        b_logits += tl.sum(b_states.to(tl.float32) * b_rows.to(tl.float32), 1)
    tl.store(logits + o_positions, b_logits, mask=m_positions)


@triton.jit(do_not_specialize=["num_positions"])
def target_states_backward_kernel(
    rows, targets, weights, grad_states, num_positions, width,
    LINES: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds weight times row of each target to the (N, D) float32 gradient of states.

    Grid: (tiles of positions, parts of the width); one writer per element.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    o_positions = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    b_targets = tl.load(targets + o_positions, mask=o_positions < num_positions, other=-1)
    m_targets = b_targets >= 0
    first_column = tl.program_id(1) * WIDTH
    b_rows = load_tile(rows, b_targets, m_targets, first_column, width, WIDTH).to(tl.float32)
    b_weights = tl.load(weights + o_positions, mask=m_targets, other=0.0)
    o_columns = first_column + tl.arange(0, WIDTH)
    o_out = o_positions[:, None] * width + o_columns[None, :]
    mask = m_targets[:, None] & (o_columns < width)[None, :]
    b_total = tl.load(grad_states + o_out, mask=mask, other=0.0) + b_rows * b_weights[:, None]
    tl.store(grad_states + o_out, b_total, mask=mask)


def forward(problem: LaunchProblem) -> Tensor:
    """(N,) float32 logit of each target, 0 if it is not among the rows."""
    num_positions, width = problem.states.shape
    logits = torch.empty(num_positions, dtype=torch.float32, device=problem.states.device)
    target_logits_kernel[(triton.cdiv(num_positions, _LINES),)](
        problem.states,
        problem.rows,
        problem.targets,
        logits,
        num_positions,
        width,
        LINES=_LINES,
        WIDTH=min(_MOST_WIDTH, triton.next_power_of_2(width)),
        ALIGN=alignment(width),
        num_warps=4,
    )
    return logits


def backward(
    problem: LaunchProblem, weights: Tensor, grad_states: Tensor, grad_rows: Tensor
) -> None:
    """Adds the gradients of ``sum of weights * target logits`` to both float32 gradients."""
    num_positions, width = problem.states.shape
    columns = min(_MOST_WIDTH, triton.next_power_of_2(width))
    target_states_backward_kernel[
        (triton.cdiv(num_positions, _LINES), triton.cdiv(width, columns))
    ](
        problem.rows,
        problem.targets,
        weights,
        grad_states,
        num_positions,
        width,
        LINES=_LINES,
        WIDTH=columns,
        ALIGN=alignment(width),
        num_warps=4,
    )
    add_rows(problem.states, problem.targets, grad_rows, weights=weights)
