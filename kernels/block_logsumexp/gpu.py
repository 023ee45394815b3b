"""Launches the Triton kernels of the block log-sum-exp. Importing this file imports triton."""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from shardrec.kernels.block_logsumexp import gpu_full, gpu_gathered, gpu_listed
from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.schedule import (
    is_full,
    is_gathered,
    layers,
    pair_tiles,
    row_tiles,
    without_idle_pairs,
)
from shardrec.kernels.device import (
    alignment,
    architecture_of,
    num_processors,
    operand,
    precision_of,
)
from shardrec.kernels.tiles import Tile, tile_for

__all__ = ["backward", "forward"]

# Programs wanted per multiprocessor before a long loop is cut into parts.
_PROGRAMS_PER_PROCESSOR = 2
# Entries whose gradients are in memory together, where N is smaller.
_MIN_CHUNK = 1 << 14
_LINES = 32


def forward(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(num_slots,) log-sum-exps and (N,) target logits, float32; see the package's function.

    The workspace is N floats for each part that a long loop is cut into, and the table of tiles.
    """
    target_logits = _target_logits(states, rows, blocks.targets)
    logsumexp = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
    problem = _Problem.of(states, rows, blocks)
    if problem.is_empty:
        return logsumexp, target_logits
    if is_full(blocks):
        return _full_forward(problem), target_logits
    if is_gathered(blocks):
        gpu_gathered.forward(states, rows, blocks, logsumexp)
        return logsumexp, target_logits
    for layer in layers(blocks, _slots(blocks)):
        _listed_forward(replace(problem, blocks=layer), logsumexp)
    return logsumexp, target_logits


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
    grad_rows: Tensor,
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    Two passes, one that owns states and one that owns rows; no atomics, one writer per element.
    """
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    problem = _Problem.of(states, rows, without_idle_pairs(blocks, grad_logsumexp))
    if not problem.is_empty:
        shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        grad, scale = _scaled(grad_logsumexp, states.dtype)
        upstream = _Upstream(shift, grad, scale)
        if is_full(problem.blocks):
            _full_states_backward(problem, upstream, grad_states)
            _full_rows_backward(problem, upstream, grad_rows)
        elif is_gathered(problem.blocks):
            gpu_gathered.backward(
                states, rows, problem.blocks, shift, grad_logsumexp, grad_states, grad_rows
            )
        else:
            for layer in layers(problem.blocks, problem.blocks.pair_positions):
                _listed_states_backward(replace(problem, blocks=layer), upstream, grad_states)
            _listed_rows_backward(problem, upstream, grad_rows)
    here = (blocks.targets >= 0)[:, None]
    weight = grad_target_logits[:, None]
    targets = blocks.targets.clamp(min=0)
    if rows.shape[0]:
        grad_states += torch.where(here, rows[targets].float() * weight, 0.0)
        _add_rows(states.contiguous(), grad_target_logits, blocks.targets, grad_rows)
    return grad_states


@dataclass(frozen=True, slots=True)
class _Problem:
    states: Tensor
    rows: Tensor
    blocks: Blocks
    dtype: torch.dtype

    @staticmethod
    def of(states: Tensor, rows: Tensor, blocks: Blocks) -> "_Problem":
        return _Problem(operand(states), operand(rows), blocks, states.dtype)

    @property
    def is_empty(self) -> bool:
        return 0 in (self.states.numel(), self.rows.numel(), self.blocks.num_blocks)

    @property
    def width(self) -> int:
        return self.states.shape[1]

    def tile(self, kernel: str) -> Tile:
        architecture = architecture_of(self.states.device)
        kernel = kernel if self.blocks.rounds is None else f"{kernel}_rounds"
        return tile_for(kernel, self.width, self.dtype, architecture)

    def options(self, tile: Tile) -> dict[str, int | str]:
        """Compile-time arguments that all kernels of products share."""
        return {
            "POSITIONS": tile.positions,
            "ITEMS": tile.items,
            "WIDTH": tile.width,
            "ALIGN": alignment(self.width),
            "PRECISION": precision_of(self.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def num_out(self, tile: Tile) -> int:
        return triton.cdiv(self.width, tile.out)


@dataclass(frozen=True, slots=True)
class _Upstream:
    shift: Tensor  # (num_slots,) log-sum-exp, 0 where there is none
    grad: Tensor  # (num_slots,) gradient over ``scale``
    scale: Tensor  # (1,) power of two


def _scaled(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient over a power of two, so that shares of float16 neither underflow nor overflow.

    Shares are rounded to the dtype of the states before the second product; in float16 a uniform
    softmax over a million rows would vanish there.
    """
    if dtype is not torch.float16:
        return grad.float().contiguous(), torch.ones(1, device=grad.device)
    exponent = torch.frexp(grad.float().abs().max()).exponent.reshape(1) - 14
    one = torch.ones(1, device=grad.device)
    return torch.ldexp(grad.float(), -exponent), torch.ldexp(one, exponent)


def _num_parts(num_programs: int, num_steps: int, device: torch.device) -> int:
    """Into how many parts a loop of ``num_steps`` tiles is cut so that the device is busy."""
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors(device)
    return max(1, min(wanted // max(num_programs, 1), num_steps))


def _bounds(blocks: Blocks) -> Tensor:
    return torch.cat([blocks.pair_starts, blocks.item_starts, blocks.item_ends])


def _full_forward(problem: _Problem) -> Tensor:
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


def _full_states_backward(problem: _Problem, upstream: _Upstream, grad_states: Tensor) -> None:
    tile = problem.tile("full_states_backward")
    num_tiles = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, triton.cdiv(problem.rows.shape[0], tile.items))
    kernel = gpu_full.full_states_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_states, tile)


def _full_rows_backward(problem: _Problem, upstream: _Upstream, grad_rows: Tensor) -> None:
    tile = problem.tile("full_rows_backward")
    num_tiles = triton.cdiv(problem.rows.shape[0], tile.items)
    num_steps = triton.cdiv(problem.states.shape[0], tile.positions)
    grid = _full_grid(problem, tile, num_tiles, num_steps)
    kernel = gpu_full.full_rows_backward_kernel
    _launch_full_backward(kernel, grid, problem, upstream, grad_rows, tile)


def _full_grid(
    problem: _Problem, tile: Tile, num_tiles: int, num_steps: int
) -> tuple[int, int, int]:
    """Tiles of what a program owns, parts of its loop of ``num_steps``, parts of the width."""
    num_out = problem.num_out(tile)
    return num_tiles, _num_parts(num_tiles * num_out, num_steps, problem.states.device), num_out


def _launch_full_backward(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    problem: _Problem,
    upstream: _Upstream,
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


def _positions(blocks: Blocks) -> Tensor:
    if blocks.pair_positions is None:
        return torch.arange(blocks.targets.numel(), device=blocks.targets.device)
    return blocks.pair_positions


def _slots(blocks: Blocks) -> Tensor | None:
    """(P,) slot of each pair; None where pair, position and slot are one."""
    return blocks.pair_positions if blocks.pair_slots is None else blocks.pair_slots


def _items(problem: _Problem) -> Tensor:
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
    def of(problem: _Problem) -> "_Listed":
        blocks, rounds = problem.blocks, problem.blocks.rounds
        positions, slots, items = _positions(blocks), _slots(blocks), _items(problem)
        unused = blocks.targets
        return _Listed(
            tensors=(
                problem.states,
                problem.rows,
                positions,
                positions if slots is None else slots,
                items,
                blocks.targets,
                unused if blocks.offsets is None else blocks.offsets,
                unused if rounds is None else rounds.position_chunks.contiguous(),
                unused if rounds is None else rounds.item_chunks.int().contiguous(),
            ),
            num_rounds=0 if rounds is None else rounds.position_chunks.shape[1],
            reach=0 if rounds is None else rounds.reach,
            switches={"OFFSETS": blocks.offsets is not None, "ROUNDS": rounds is not None},
        )

    @property
    def items(self) -> Tensor:
        return self.tensors[4]


def _listed_forward(problem: _Problem, logsumexp: Tensor) -> None:
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


def _listed_states_backward(problem: _Problem, upstream: _Upstream, grad_states: Tensor) -> None:
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


def _listed_rows_backward(problem: _Problem, upstream: _Upstream, grad_rows: Tensor) -> None:
    """Entry gradients chunk by chunk, each chunk then added up row by row."""
    tile = problem.tile("listed_rows_backward")
    listed = _Listed.of(problem)
    num_entries = listed.items.numel()
    chunk = min(max(_MIN_CHUNK, problem.states.shape[0]), max(num_entries, 1))
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
        _add_rows(workspace, ones, rows, grad_rows, upstream.scale)


def _add_rows(
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


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    if not rows.shape[0]:
        return states.new_zeros(states.shape[0], dtype=torch.float32)
    found = rows[targets.clamp(min=0)].float()
    return torch.where(targets >= 0, torch.linalg.vecdot(states.float(), found), 0.0)
