"""FLOP, bytes and workspace of the Triton kernels, derived from their tile shapes.

Tests compare the numbers with counts from interpreted kernels. Not counted are the indices, targets
and chunk numbers that kernels also read: a few bytes for each vector.
"""

from dataclasses import dataclass

import torch

from shardrec.kernels.block_logsumexp.schedule import entries_at_once
from shardrec.kernels.cost.terms import KernelCost
from shardrec.kernels.device.tiles import Tile, tile_for
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.select.search import KEYS_AT_ONCE

__all__ = [
    "Listed",
    "full_bytes",
    "full_kernels",
    "listed_bytes",
    "listed_kernels",
    "sign_kernels",
    "topk_bytes",
    "topk_kernels",
]

_FLOAT, _KEY = 4, 8
# A long loop is split into parts below this number of programs: two per multiprocessor of an H100
# or H200, or of the four assumed for the interpreter.
_PROGRAMS = {0: 8}
_MOST_PROGRAMS = 264
# Combinations per program of ``mixed_signs_kernel``.
_MIXED_SIGNS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Sizes of the listed blocks of a loss.

    Attributes:
        pairs: Number of (position, row) pairs over all blocks.
        positions: Positions per block.
        rows: Rows per block.
        entries: Total length of the row lists; each entry gets a gradient of its own.
        touched: Distinct rows of the table among the entries.
        kept: Share of the pairs with a gradient in backward; blocks then have fewer positions.
        rounds: Whether candidates of several rounds count once (``Rounds``).
    """

    pairs: float
    positions: float
    rows: float
    entries: float
    touched: float
    kept: float = 1.0
    rounds: bool = False


def full_kernels(work: Workload) -> KernelCost:
    """Cost of the full softmax: forward, gradient of states and gradient of rows."""
    return sum((_full_pass(one, work) for one in _full_passes(work)), _of_targets(work))


def _of_targets(work: Workload) -> KernelCost:
    """Cost of the targets' logits and gradients: states and rows twice, gradients of states."""
    numbers = work.num_positions / work.num_ranks * work.width
    return KernelCost(0, numbers * (4 * work.element_bytes + 2 * _FLOAT))


def full_bytes(work: Workload) -> int:
    """Peak bytes in addition to both gradients: partial sums of a split loop, or target rows."""
    held = [one.parts + 1 for one in _full_passes(work)]
    lines = [one.owned for one in _full_passes(work)]
    parts = [n * line for n, line in zip(held[1:], lines[1:], strict=True) if n > 2]
    return _FLOAT * work.width * max([work.num_positions, *parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """A kernel in which each program owns a tile of lines and loops over a part of the others.

    Attributes:
        owned: Number of lines (positions or rows) that all programs own.
        others: Number of lines that they loop over.
        tiles: Tiles of the owned lines.
        steps: Tiles of the other lines.
        columns: Parts of the output width, each with its own programs; 0 in forward.
        parts: Parts into which the loop is split.
        holds: Whether a program reads its own tile once.
    """

    owned: int
    others: int
    tiles: int
    steps: int
    columns: int
    parts: int
    holds: bool


def _full_passes(work: Workload) -> list[_Pass]:
    """The three kernels: forward, gradient of states and gradient of rows."""
    made = []
    for kernel in ("full_forward", "full_states_backward", "full_rows_backward"):
        tile = _tile(work, kernel)
        sizes = [(work.num_positions, tile.positions), (work.num_rows, tile.items)]
        owned, others = sizes[::-1] if kernel == "full_rows_backward" else sizes
        tiles, steps = -(-owned[0] // owned[1]), -(-others[0] // others[1])
        columns = 0 if kernel == "full_forward" else -(-work.width // tile.out)
        parts = max(1, min(_programs(work) // max(1, tiles * max(1, columns)), steps))
        made.append(
            _Pass(
                owned=owned[0],
                others=others[0],
                tiles=tiles,
                steps=steps,
                columns=columns,
                parts=parts,
                holds=tile.width >= work.width,
            )
        )
    return made


def _full_pass(one: _Pass, work: Workload) -> KernelCost:
    """Cost of one kernel.

    Each part of the output width reads both operands for the logits, and the other lines once more
    for the gradient if they are not held; each part of the loop reads and writes the gradient.
    """
    columns, is_backward = max(1, one.columns), one.columns > 0
    own = one.owned * (one.parts if one.holds else one.steps)
    read = columns * (own + one.others * one.tiles)
    read += one.others * one.tiles * (is_backward and not one.holds)
    written = 2 * _FLOAT * one.owned * one.parts * is_backward
    flops = 2.0 * one.owned * one.others * work.width * (columns + is_backward)
    return KernelCost(flops, float(work.width) * (work.element_bytes * read + written))


def listed_kernels(listed: Listed, work: Workload) -> KernelCost:
    """Cost of listed blocks, or of gathered ones (one position per block), forward and backward."""
    if listed.positions <= 1:
        vectors = 3 * work.element_bytes * listed.pairs + 2 * _FLOAT * listed.touched
        gathered = KernelCost(8 * listed.pairs * work.width, vectors * work.width)
        return gathered + _of_targets(work)
    forward = _listed_pass(work, "listed_forward", listed)
    states = _listed_pass(work, "listed_states_backward", listed)
    rows = _listed_pass(work, "listed_rows_backward", listed)
    # The gradient of each entry is written once, and read once to sum it by row. In rounds an entry
    # is a row, whose gradient is read and written.
    lines = listed.entries + listed.touched * (not listed.rounds)
    gradients = KernelCost(0, 2 * _FLOAT * lines * work.width)
    return forward + states + rows + gradients + _of_targets(work)


def _listed_pass(work: Workload, kernel: str, listed: Listed) -> KernelCost:
    tile = _tile(work, kernel + "_rounds" * listed.rounds)
    is_backward = kernel != "listed_forward"
    pairs, positions = listed.pairs, listed.positions
    if is_backward:
        pairs, positions = pairs * listed.kept, max(1.0, positions * listed.kept)
    parts = -(-work.width // tile.out) if is_backward else 1
    # Each part of the width reads both operands of a logit; the gradient reads one once more.
    of_rows, of_states = parts, parts
    if kernel == "listed_states_backward":
        of_rows += 1
    elif is_backward:
        of_states += 1
    read = of_rows / min(tile.positions, positions) + of_states / min(tile.items, listed.rows)
    flops = 2 * pairs * work.width * (parts + is_backward)
    return KernelCost(flops, pairs * work.element_bytes * work.width * read)


def listed_bytes(entries: float, work: Workload) -> int:
    """Peak bytes of listed blocks in addition to states, rows, their gradients and the lists.

    These are the gradients of a chunk of entries, to be sorted by row.
    """
    chunk = entries_at_once(round(entries), work.width)
    return chunk * (_FLOAT * work.width + 28)


def sign_kernels(kernel: str, signs: int, vectors: int, work: Workload) -> KernelCost:
    """Cost of products with random signs; the vectors are read once for each tile of signs.

    The signs of "best_sign_direction" are stored, and read once for each tile of vectors.

    Args:
        kernel: "best_sign_direction" or "mixed_signs".
        signs: Number of sign vectors.
        vectors: Number of vectors that they are multiplied with.
        work: Sizes of the step.
    """
    tile, work_bytes = _tile(work, kernel), work.element_bytes * work.width * vectors
    flops = 2.0 * signs * vectors * work.width
    if kernel == "best_sign_direction":
        of_signs = work.element_bytes * work.width * signs * (1 + -(-vectors // tile.items))
        return KernelCost(flops, float(work_bytes * -(-signs // tile.positions) + of_signs))
    programs = -(-signs // _MIXED_SIGNS) * -(-work.width // tile.width)
    parts = min(-(-_programs(work) // programs), -(-vectors // tile.positions))
    written = _FLOAT * parts * signs * work.width
    return KernelCost(flops, float(work_bytes * -(-signs // _MIXED_SIGNS) + written))


def topk_kernels(queries: int, vectors: int, k: int, work: Workload) -> KernelCost:
    """Cost of top-k for every query: one product over all vectors, then the best groups of 16."""
    tile = _tile(work, "group_maxima")
    again = 16 * min(k, -(-vectors // 16)) * queries
    if 16 * k >= vectors:
        return KernelCost(2.0 * again * work.width, again * work.element_bytes * work.width)
    reads = vectors * -(-queries // tile.positions) + queries * -(-vectors // tile.items) + again
    flops = 2.0 * (queries * vectors + again) * work.width
    return KernelCost(flops, reads * work.element_bytes * work.width)


def topk_bytes(queries: int, vectors: int) -> int:
    """Peak bytes of the keys that top-k chooses from: one for each query and 16 vectors."""
    return _KEY * min(KEYS_AT_ONCE, queries * -(-vectors // 16))


def _programs(work: Workload) -> int:
    return _PROGRAMS.get(work.architecture, _MOST_PROGRAMS)


def _tile(work: Workload, kernel: str) -> Tile:
    dtype = torch.float32 if work.element_bytes == _FLOAT else torch.bfloat16
    return tile_for(kernel, work.width, dtype, work.architecture)
