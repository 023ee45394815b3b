"""The tile shapes of the Triton kernels, in one table by kernel, width, dtype and architecture.

No entry is measured yet: all are derived from resource counts by ``benchmarks/compile_kernels.py``,
which counts registers, spilled bytes, shared memory and matrix instructions of each. A measured
entry names its GPU and commit in ``origin``; ``benchmarks/tune_tiles.py`` times candidates on the
GPU of the machine and prints such entries. A training run does no autotuning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

__all__ = ["KERNELS", "Tile", "entry_width", "tile_for", "trial"]

_DERIVED = "derived from registers and shared memory"


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile shape and launch options of a kernel; the four sizes are powers of two from 16 on.

    Attributes:
        positions: Positions (or queries, or directions) per tile.
        items: Rows per tile.
        width: Part of D per step of a matrix product.
        out: Part of D of the gradient that one program computes.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline that loads tiles.
        origin: Where the entry comes from.
    """

    positions: int
    items: int
    width: int
    out: int
    num_warps: int
    num_stages: int
    origin: str = _DERIVED


# By kernel, then by the largest D for which an entry is used. If ``width`` of the entry is at least
# D, a program of a full kernel holds its own tile for all of its products; otherwise it reads parts
# of the width in a loop.
_WIDEST = 1 << 20
_HALF = {
    "full_forward": {
        64: Tile(128, 128, 64, 64, 8, 3),
        128: Tile(128, 128, 128, 128, 8, 3),
        256: Tile(128, 128, 256, 256, 8, 2),
        _WIDEST: Tile(128, 128, 64, 64, 8, 3),
    },
    "full_states_backward": {
        64: Tile(128, 64, 64, 64, 8, 3),
        128: Tile(128, 64, 128, 128, 8, 3),
        256: Tile(64, 64, 256, 256, 8, 2),
        _WIDEST: Tile(64, 64, 64, 256, 8, 2),
    },
    "full_rows_backward": {
        64: Tile(64, 128, 64, 64, 8, 3),
        128: Tile(64, 128, 128, 128, 8, 3),
        256: Tile(64, 64, 256, 256, 8, 2),
        _WIDEST: Tile(64, 64, 64, 256, 8, 2),
    },
    "listed_forward": {_WIDEST: Tile(64, 128, 64, 64, 8, 3)},
    "listed_forward_rounds": {_WIDEST: Tile(64, 64, 64, 64, 8, 3)},
    "listed_states_backward": {
        128: Tile(64, 64, 64, 128, 8, 2),
        _WIDEST: Tile(64, 64, 64, 256, 8, 2),
    },
    "listed_states_backward_rounds": {_WIDEST: Tile(64, 32, 64, 256, 8, 2)},
    "listed_rows_backward": {
        128: Tile(64, 64, 64, 128, 8, 2),
        _WIDEST: Tile(64, 64, 64, 256, 8, 2),
    },
    "listed_rows_backward_rounds": {
        64: Tile(32, 64, 64, 64, 8, 2),
        _WIDEST: Tile(32, 64, 64, 256, 8, 2),
    },
    # A program of the gathered kernels has one position, and loads whole rows.
    "gathered_forward": {
        64: Tile(16, 64, 64, 64, 4, 3),
        256: Tile(16, 32, 256, 64, 4, 3),
        _WIDEST: Tile(16, 16, _WIDEST, 64, 8, 2),
    },
    "gathered_states_backward": {
        64: Tile(16, 64, 64, 64, 4, 3),
        256: Tile(16, 32, 256, 64, 4, 3),
        _WIDEST: Tile(16, 16, _WIDEST, 64, 8, 2),
    },
    "gathered_rows_backward": {_WIDEST: Tile(16, 32, 64, 256, 4, 2)},
    "group_maxima": {_WIDEST: Tile(128, 128, 64, 64, 8, 3)},
    "best_sign_direction": {_WIDEST: Tile(64, 128, 64, 64, 8, 2)},
    "mixed_signs": {_WIDEST: Tile(64, 64, 64, 64, 8, 2)},
}
# IEEE float32 has no matrix instruction: each thread multiplies its own part of the tile.
_SINGLE = {
    "full_forward": {_WIDEST: Tile(64, 64, 32, 32, 4, 2)},
    "full_states_backward": {_WIDEST: Tile(64, 32, 32, 128, 8, 2)},
    "full_rows_backward": {_WIDEST: Tile(32, 64, 32, 128, 8, 2)},
    "listed_forward": {_WIDEST: Tile(64, 64, 32, 32, 8, 2)},
    "listed_forward_rounds": {_WIDEST: Tile(64, 64, 32, 32, 8, 2)},
    "listed_states_backward": {_WIDEST: Tile(32, 64, 32, 128, 8, 2)},
    "listed_states_backward_rounds": {_WIDEST: Tile(32, 64, 32, 128, 8, 2)},
    "listed_rows_backward": {_WIDEST: Tile(64, 32, 32, 128, 8, 2)},
    "listed_rows_backward_rounds": {_WIDEST: Tile(64, 32, 32, 128, 8, 2)},
    "gathered_forward": {
        64: Tile(16, 64, 64, 64, 4, 3),
        256: Tile(16, 32, 256, 64, 4, 3),
        _WIDEST: Tile(16, 16, _WIDEST, 64, 8, 2),
    },
    "gathered_states_backward": {
        64: Tile(16, 64, 64, 64, 4, 3),
        256: Tile(16, 32, 256, 64, 4, 3),
        _WIDEST: Tile(16, 16, _WIDEST, 64, 8, 2),
    },
    "gathered_rows_backward": {_WIDEST: Tile(16, 32, 64, 256, 4, 2)},
    "group_maxima": {_WIDEST: Tile(64, 64, 32, 32, 8, 2)},
    "best_sign_direction": {_WIDEST: Tile(32, 64, 32, 32, 8, 2)},
    "mixed_signs": {_WIDEST: Tile(32, 32, 32, 32, 8, 2)},
}
# Entries that differ on one architecture, by (architecture, kernel, largest width).
_HALF_EXCEPTIONS = {
    (90, "full_states_backward", 256): Tile(128, 64, 256, 256, 8, 2),
    (80, "listed_states_backward", _WIDEST): Tile(64, 32, 64, 256, 8, 2),
    (80, "full_rows_backward", 128): Tile(64, 128, 64, 128, 8, 2),
    (80, "listed_rows_backward", 128): Tile(64, 64, 64, 128, 8, 3),
    (80, "listed_rows_backward_rounds", _WIDEST): Tile(64, 32, 64, 256, 8, 2),
    (100, "listed_rows_backward_rounds", 64): Tile(32, 64, 64, 64, 4, 2),
}
_SINGLE_EXCEPTIONS: dict[tuple[int, str, int], Tile] = {}
_INTERPRETED = Tile(32, 32, 64, 64, 4, 1, "small, so that a test of small sizes has several")

KERNELS = tuple(_HALF)
# Of all threads: on a GPU a backward pass runs in a thread of its own.
_TRIED: dict[str, Tile] = {}


@contextmanager
def trial(kernel: str, tile: Tile) -> Iterator[None]:
    """Context in which ``tile_for`` returns this tile for this kernel, to time candidates.

    It holds in every thread, so that a process can have one trial of a kernel at a time.
    """
    _TRIED[kernel] = tile
    try:
        yield
    finally:
        del _TRIED[kernel]


def entry_width(kernel: str, width: int, dtype: torch.dtype) -> int:
    """The key of the table entry for D = ``width``: the largest width that the entry is used for.

    >>> entry_width("full_forward", 100, torch.bfloat16)
    128
    """
    table = _SINGLE if dtype is torch.float32 else _HALF
    return min(limit for limit in table[kernel] if width <= limit)


def tile_for(kernel: str, width: int, dtype: torch.dtype, architecture: int) -> Tile:
    """The tile of a kernel for D = ``width``, no wider than D padded to a power of two.

    Args:
        kernel: One of ``KERNELS``.
        width: D.
        dtype: Dtype of states and rows.
        architecture: 80, 86, 90 or 100 as in sm_90; 0 is the interpreter.

    >>> tile_for("full_forward", 20, torch.bfloat16, 90).width
    32
    """
    if kernel in _TRIED:
        return _TRIED[kernel]
    if architecture == 0:
        return _narrowed(_INTERPRETED, width)
    table, exceptions = _HALF, _HALF_EXCEPTIONS
    if dtype is torch.float32:
        table, exceptions = _SINGLE, _SINGLE_EXCEPTIONS
    largest = entry_width(kernel, width, dtype)
    # sm_86 has the instructions of sm_80 and less shared memory.
    alike = 80 if architecture == 86 else architecture
    tile = exceptions.get((alike, kernel, largest), table[kernel][largest])
    if architecture == 86:
        tile = _for_small_memory(tile)
    return _narrowed(tile, width)


def _narrowed(tile: Tile, width: int) -> Tile:
    """The tile without columns beyond D, padded to a power of two of at least 16."""
    padded = max(16, 1 << (width - 1).bit_length())
    return replace(tile, width=min(tile.width, padded), out=min(tile.out, padded))


def _for_small_memory(tile: Tile) -> Tile:
    """The tile for consumer GPUs, with 99 KiB of shared memory per program."""
    return replace(tile, width=min(tile.width, 64), out=min(tile.out, 128))
