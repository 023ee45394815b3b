"""Launches the Triton kernels of listed blocks. Importing this file imports triton."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.gpu import listed as gpu_listed
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream
from shardrec.kernels.block_logsumexp.schedule import LEAST_ENTRIES, pair_tiles, row_tiles
from shardrec.kernels.device.backend import alignment, operand

__all__ = ["add_rows", "forward", "rows_backward", "states_backward"]

_LINES = 32


def _positions(blocks: Blocks) -> Tensor:
    if blocks.pair_positions is None:
        return torch.arange(blocks.targets.numel(), device=blocks.targets.device)
    return blocks.pair_positions


def _items(problem: LaunchProblem) -> Tensor:
    if problem.blocks.items is None:
        return torch.arange(problem.rows.shape[0], device=problem.rows.device)
    return problem.blocks.items


@dataclass(frozen=True, slots=True)
class _Listed:
    """Arguments that all listed kernels share, in their order."""

    tensors: tuple[Tensor, ...]
    num_rounds: int
    reach: int
    switches: dict[str, bool]

    @staticmethod
    def of(problem: LaunchProblem) -> "_Listed":
        blocks, rounds = problem.blocks, problem.blocks.rounds
        positions, items = _positions(blocks), _items(problem)
        unused = blocks.targets
        return _Listed(
            tensors=(
                problem.states,
                problem.rows,
                positions,
                positions if blocks.pair_slots is None else blocks.pair_slots,
                items,
                blocks.targets,
                unused if blocks.offsets is None else blocks.offsets,
                unused if rounds is None else rounds.position_chunks.contiguous(),
                unused if rounds is None else rounds.item_chunks.contiguous(),
            ),
            num_rounds=0 if rounds is None else rounds.position_chunks.shape[1],
            reach=0 if rounds is None else rounds.reach,
            switches={"OFFSETS": blocks.offsets is not None, "ROUNDS": rounds is not None},
        )

    @property
    def items(self) -> Tensor:
        return self.tensors[4]


def forward(problem: LaunchProblem, logsumexp: Tensor) -> None:
    """Adds the candidates of blocks in which no slot stands twice to (num_slots,) float32."""
    tile = problem.tile("listed_forward")
    listed = _Listed.of(problem)
    tiles = pair_tiles(problem.blocks, tile.positions)
    gpu_listed.listed_forward_kernel[(tiles.shape[1],)](
        *listed.tensors,
        tiles,
        logsumexp,
        tiles.shape[1],
        problem.width,
        listed.num_rounds,
        listed.reach,
        **problem.options(tile),
        **listed.switches,
    )


def states_backward(problem: LaunchProblem, upstream: Upstream, grad_states: Tensor) -> None:
    """Adds to (N, D) float32, for blocks in which no position stands twice."""
    tile = problem.tile("listed_states_backward")
    listed = _Listed.of(problem)
    tiles = pair_tiles(problem.blocks, tile.positions)
    gpu_listed.listed_states_backward_kernel[(tiles.shape[1], problem.num_out(tile))](
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
        OUT=tile.out,
        **problem.options(tile),
        **listed.switches,
    )


def rows_backward(problem: LaunchProblem, upstream: Upstream, grad_rows: Tensor) -> None:
    """Adds to (R, D) float32: entry gradients chunk by chunk, each chunk then added up by row."""
    tile = problem.tile("listed_rows_backward")
    listed = _Listed.of(problem)
    num_entries = listed.items.numel()
    chunk = min(max(LEAST_ENTRIES, problem.states.shape[0]), max(num_entries, 1))
    plan = row_tiles(problem.blocks, num_entries, tile.items, chunk)
    workspace = torch.empty((chunk, problem.width), dtype=torch.float32, device=grad_rows.device)
    ones = torch.ones(chunk, device=grad_rows.device)
    for first_entry, end_entry, first_tile, end_tile in plan.chunks:
        if first_entry == end_entry:
            continue
        tiles = plan.tiles[:, first_tile:end_tile].contiguous()
        gpu_listed.listed_rows_backward_kernel[(tiles.shape[1], problem.num_out(tile))](
            *listed.tensors,
            tiles,
            plan.covers,
            upstream.shift,
            upstream.grad,
            workspace,
            tiles.shape[1],
            plan.covers.shape[1],
            first_entry,
            problem.width,
            listed.num_rounds,
            listed.reach,
            OUT=tile.out,
            **problem.options(tile),
            **listed.switches,
        )
        rows = listed.items[first_entry:end_entry]
        add_rows(workspace, ones, rows, grad_rows, upstream.scale)


def add_rows(
    source: Tensor, weights: Tensor, rows: Tensor, total: Tensor, scale: Tensor | None = None
) -> None:
    """Adds ``weights[e] * source[e]`` to ``total[rows[e]]``, in a fixed order."""
    if not rows.numel() or not total.numel():
        return
    width = total.shape[1]
    sorted_rows, order = rows.sort(stable=True)
    run_ends = torch.searchsorted(sorted_rows, sorted_rows, right=True)
    out = min(256, triton.next_power_of_2(width))
    gpu_listed.add_rows_kernel[(rows.numel(), triton.cdiv(width, out))](
        operand(source),
        weights.contiguous(),
        order,
        sorted_rows,
        run_ends,
        total,
        torch.ones(1, device=total.device) if scale is None else scale,
        width,
        LINES=_LINES,
        OUT=out,
        ALIGN=alignment(width),
        num_warps=4,
    )
