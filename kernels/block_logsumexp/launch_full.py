"""Launches the Triton kernels of the full softmax. Importing this file imports triton."""

import torch
import triton
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.gpu import full as gpu_full
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream
from shardrec.kernels.device.backend import num_processors
from shardrec.kernels.device.tiles import Tile

__all__ = ["PROGRAMS_PER_PROCESSOR", "forward", "rows_backward", "states_backward"]

# Programs wanted per multiprocessor before a long loop is cut into parts.
PROGRAMS_PER_PROCESSOR = 2


def _num_parts(num_programs: int, num_steps: int, device: torch.device) -> int:
    """Into how many parts a loop of ``num_steps`` tiles is cut so that the device is busy."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device)
    return max(1, min(wanted // max(num_programs, 1), num_steps))


def _bounds(blocks: Blocks) -> Tensor:
    return torch.cat([blocks.pair_starts, blocks.item_starts, blocks.item_ends])


def forward(problem: LaunchProblem) -> Tensor:
    """(N,) float32 log-sum-exps."""
    tile = problem.tile("full_forward")
    num_positions = problem.states.shape[0]
    num_tiles = triton.cdiv(num_positions, tile.positions)
    num_steps = triton.cdiv(problem.rows.shape[0], tile.items)
    num_parts = _num_parts(num_tiles, num_steps, problem.states.device)
    partials = problem.states.new_full((num_parts, num_positions), -torch.inf, dtype=torch.float32)
    gpu_full.full_forward_kernel[(num_tiles, num_parts)](
        problem.states,
        problem.rows,
        problem.blocks.targets,
        _bounds(problem.blocks),
        partials,
        num_positions,
        problem.width,
        **problem.options(tile),
        HOLD=tile.width >= problem.width,
    )
    return partials.logsumexp(0) if num_parts > 1 else partials[0]


def states_backward(problem: LaunchProblem, upstream: Upstream, grad_states: Tensor) -> None:
    """Adds to (N, D) float32 ``grad_states``; one writer per element."""
    tile = problem.tile("full_states_backward")
    num_tiles = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, triton.cdiv(problem.rows.shape[0], tile.items))
    kernel = gpu_full.full_states_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_states, tile)


def rows_backward(problem: LaunchProblem, upstream: Upstream, grad_rows: Tensor) -> None:
    """Adds to (R, D) float32 ``grad_rows``; one writer per element."""
    tile = problem.tile("full_rows_backward")
    num_tiles = triton.cdiv(problem.rows.shape[0], tile.items)
    num_steps = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, num_steps)
    kernel = gpu_full.full_rows_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_rows, tile)


def _full_grid(
    problem: LaunchProblem, tile: Tile, num_tiles: int, num_steps: int
) -> tuple[int, int, int]:
    """Tiles of what a program owns, parts of its loop of ``num_steps``, parts of the width."""
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
    """Adds to (M, D) ``total``, directly or by a sum over the parts of the loop."""
    num_parts = grid[1]
    partials = total if num_parts == 1 else total.new_zeros((num_parts, *total.shape))
    kernel[grid](
        problem.states,
        problem.rows,
        problem.blocks.targets,
        _bounds(problem.blocks),
        upstream.shift,
        upstream.grad,
        upstream.scale,
        partials,
        total.shape[0],
        problem.width,
        OUT=tile.out,
        **problem.options(tile),
        HOLD=tile.width >= problem.width,
    )
    if num_parts > 1:
        total += partials.sum(0)
