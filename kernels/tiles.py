"""The tile shapes of the Triton kernels, in one table by kernel, width, dtype and architecture.

No entry is measured yet: all are derived from counted limits (``benchmarks/compile_kernels.py``
counts registers, spills and shared memory of each). A measured entry names its card and commit in
``origin``.
"""

from dataclasses import dataclass

import torch

__all__ = ["KERNELS", "Tile", "tile_for"]

KERNELS = (
    "full_forward",
    "full_states_backward",
    "full_rows_backward",
    "listed_forward",
    "listed_states_backward",
    "listed_rows_backward",
    "group_maxima",
    "best_sign_direction",
    "mixed_signs",
)

_DERIVED = "derived from registers and shared memory"


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        positions: Positions (or queries, or directions) of a tile, a power of two, at least 16.
        items: Rows of a tile, likewise.
        width: Part of D that a product takes at a time, likewise.
        out: Part of D of a gradient that a program owns, likewise; at most ``width`` when held.
        num_warps: Warps of a program.
        num_stages: Loads in flight.
        hold: Whether ``width`` covers D, so that a program keeps its own tile for all its products.
        origin: Where the entry comes from.
    """

    positions: int
    items: int
    width: int
    out: int
    num_warps: int
    num_stages: int
    hold: bool
    origin: str = _DERIVED


def tile_for(kernel: str, width: int, dtype: torch.dtype, architecture: int) -> Tile:
    """The tile of one kernel.

    Args:
        kernel: One of ``KERNELS``.
        width: D.
        dtype: Of states and rows.
        architecture: 80, 90 or 100 as in sm_90; 0 is the interpreter.

    Raises:
        KeyError: the kernel is unknown.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    if architecture == 0:
        return Tile(32, 32, min(padded, 64), min(padded, 64), 4, 1, padded <= 64)
    return Tile(64, 64, min(padded, 64), min(padded, 64), 4, 2, padded <= 64)
