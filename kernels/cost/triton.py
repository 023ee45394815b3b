"""What the Triton kernels of the block log-sum-exp multiply, read, write and hold, by their tiles.

Tests hold the numbers to what interpreted kernels do. Left out are the ids, targets and chunks that
kernels also read: a few bytes for each vector.
"""

from dataclasses import dataclass

import torch

from shardrec.kernels.block_logsumexp.schedule import LEAST_ENTRIES
from shardrec.kernels.cost.terms import KernelCost
from shardrec.kernels.device.tiles import Tile, tile_for
from shardrec.kernels.ranks.traffic import Workload

__all__ = [
    "Listed",
    "full_bytes",
    "full_kernels",
    "listed_bytes",
    "listed_kernels",
    "sign_kernels",
    "topk_kernels",
]

_FLOAT = 4
# Programs below which a long loop is cut into parts: two for each of the multiprocessors of an
# H100 or H200, and of the four that the interpreter stands for.
_PROGRAMS = {0: 8}
_MOST_PROGRAMS = 264
# Combinations that a program of mixed signs makes.
_MIXED_SIGNS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The list of blocks of a loss.

    Attributes:
        pairs: Of positions and rows, over all blocks.
        positions: Of a block.
        rows: Of a block.
        entries: Rows in the lists, of which each gets a gradient of its own.
        touched: Rows of the table among them.
        kept: Share of the pairs that backward looks at; their blocks have fewer positions.
        rounds: Whether the rule of rounds is on.
    """

    pairs: float
    positions: float
    rows: float
    entries: float
    touched: float
    kept: float = 1.0
    rounds: bool = False


def full_kernels(work: Workload) -> KernelCost:
    """Of the full softmax: a forward pass, a pass for states and one for rows."""
    return sum((_full_pass(one, work) for one in _full_passes(work)), KernelCost(0, 0))


def full_bytes(work: Workload) -> int:
    """Most memory in addition to both gradients: parts of one, and their sum; or the targets'."""
    held = [one.parts + 1 for one in _full_passes(work)]
    lines = [one.owned for one in _full_passes(work)]
    parts = [n * line for n, line in zip(held[1:], lines[1:], strict=True) if n > 2]
    return _FLOAT * work.width * max([work.num_positions, *parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """A kernel whose programs own a tile and loop over all others, cut into parts.

    Attributes:
        owned: Lines that programs own, each a tile of them.
        others: Lines that they loop over.
        tiles: Of what is owned.
        steps: Tiles of the others.
        columns: Parts of the width, each with programs of its own; 0 in forward.
        parts: Of the loop.
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
    """Forward, backward for states and backward for rows."""
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
    """Work of a pass.

    Vectors are read for their logits in each part of the width, and those of others for the
    gradient once more where they are not held; a gradient is read and written in each part.
    """
    columns, is_backward = max(1, one.columns), one.columns > 0
    own = one.owned * (one.parts if one.holds else one.steps)
    read = columns * (own + one.others * one.tiles)
    read += one.others * one.tiles * (is_backward and not one.holds)
    written = 2 * _FLOAT * one.owned * one.parts * is_backward
    flops = 2.0 * one.owned * one.others * work.width * (columns + is_backward)
    return KernelCost(flops, float(work.width) * (work.element_bytes * read + written))


def listed_kernels(listed: Listed, work: Workload) -> KernelCost:
    """Of listed blocks, forward and backward; of single positions where a block has one."""
    if listed.positions <= 1:
        vectors = 3 * work.element_bytes * listed.pairs + 2 * _FLOAT * listed.touched
        return KernelCost(8 * listed.pairs * work.width, vectors * work.width)
    forward = _listed_pass(work, "listed_forward", listed)
    states = _listed_pass(work, "listed_states_backward", listed)
    rows = _listed_pass(work, "listed_rows_backward", listed)
    # A gradient of an entry is written, read and added up.
    gradients = 2 * _FLOAT * (listed.entries + listed.touched) * work.width
    return forward + states + rows + KernelCost(0, gradients)


def _listed_pass(work: Workload, kernel: str, listed: Listed) -> KernelCost:
    tile = _tile(work, kernel + "_rounds" * listed.rounds)
    is_backward = kernel != "listed_forward"
    pairs, positions = listed.pairs, listed.positions
    if is_backward:
        pairs, positions = pairs * listed.kept, max(1.0, positions * listed.kept)
    parts = -(-work.width // tile.out) if is_backward else 1
    # Of both vectors of a logit in each part of the width; of one once more for the gradient.
    of_rows, of_states = parts, parts
    if kernel == "listed_states_backward":
        of_rows += 1
    elif is_backward:
        of_states += 1
    read = of_rows / min(tile.positions, positions) + of_states / min(tile.items, listed.rows)
    flops = 2 * pairs * work.width * (parts + is_backward)
    return KernelCost(flops, pairs * work.element_bytes * work.width * read)


def listed_bytes(entries: float, work: Workload) -> int:
    """Most memory of listed blocks in addition to states, rows, their gradients and the lists.

    Gradients of some entries, which are then sorted by row; or the rows of the targets.
    """
    chunk = min(max(LEAST_ENTRIES, work.num_positions), round(entries))
    return max(chunk * (_FLOAT * work.width + 28), _FLOAT * work.num_positions * work.width)


def sign_kernels(kernel: str, signs: int, vectors: int, work: Workload) -> KernelCost:
    """Of products with random signs, made in the kernel; vectors are read for each tile of them.

    Args:
        kernel: "best_sign_direction" or "mixed_signs".
        signs: Sign vectors.
        vectors: Vectors that they are multiplied with.
        work: Sizes.
    """
    tile, work_bytes = _tile(work, kernel), work.element_bytes * work.width * vectors
    flops = 2.0 * signs * vectors * work.width
    if kernel == "best_sign_direction":
        return KernelCost(flops, float(work_bytes * -(-signs // tile.positions)))
    programs = -(-signs // _MIXED_SIGNS) * -(-work.width // tile.width)
    parts = min(-(-_programs(work) // programs), -(-vectors // tile.positions))
    written = _FLOAT * parts * signs * work.width
    return KernelCost(flops, float(work_bytes * -(-signs // _MIXED_SIGNS) + written))


def topk_kernels(queries: int, vectors: int, k: int, work: Workload) -> KernelCost:
    """Of the best k of the vectors for every query: one product, then groups of 16 once more."""
    tile = _tile(work, "group_maxima")
    again = 16 * min(k, -(-vectors // 16)) * queries
    if 16 * k >= vectors:
        return KernelCost(2.0 * again * work.width, again * work.element_bytes * work.width)
    reads = vectors * -(-queries // tile.positions) + queries * -(-vectors // tile.items) + again
    flops = 2.0 * (queries * vectors + again) * work.width
    return KernelCost(flops, reads * work.element_bytes * work.width)


def _programs(work: Workload) -> int:
    return _PROGRAMS.get(work.architecture, _MOST_PROGRAMS)


def _tile(work: Workload, kernel: str) -> Tile:
    dtype = torch.float32 if work.element_bytes == _FLOAT else torch.bfloat16
    return tile_for(kernel, work.width, dtype, work.architecture)
