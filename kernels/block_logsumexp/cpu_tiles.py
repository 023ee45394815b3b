"""How the plain path cuts the logits on a CPU: by its caches, its threads and the shapes."""

import os
from dataclasses import dataclass

import torch

from shardrec.kernels.device.matmul import STEP

__all__ = ["LEAST_FUSED", "CpuTiles", "core_cache_bytes", "cpu_tiles", "fused_positions"]

_FLOAT = 4
# Logits of one group of the fused softmax: 16 MiB, and a product takes a copy of them.
_GROUP_LOGITS = 1 << 22
_MOST_FUSED = 256
# With fewer positions at once, reading the rows and their gradient takes longer than what the
# fused softmax saves.
LEAST_FUSED = 128
_LEAST_POWER = 19
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class CpuTiles:
    """What is in memory together.

    Attributes:
        logits: Of a tile.
        positions: Most of a tile.
        items: Most of a piece of a listed block.
        floats: Of the rows that a batch of listed blocks copies together,
        wide_rows: or so many rows where these are more.
    """

    logits: int = 1 << 20
    positions: int = 1024
    items: int = 1 << 14
    floats: int = 1 << 18
    wide_rows: int = 1 << 11

    def listed_rows(self, width: int) -> int:
        """Most rows of D numbers that a batch of listed blocks copies together."""
        return max(self.floats // width, self.wide_rows)

    def listed_bytes(self, width: int, height: float) -> int:
        """Of a batch of listed blocks at its peak: logits, rows and the rows' gradients.

        Args:
            width: D.
            height: Positions of a block.
        """
        rows = self.listed_rows(width)
        return _FLOAT * round(min(self.logits, height * rows) + 2 * rows * width)


def cpu_tiles() -> CpuTiles:
    """The tiles for this machine: twice as many bytes of logits as its threads have own cache.

    As high as wide, since rows are read once for each tile of positions and states once for each
    tile of rows. N, V and D choose no other tile: fewer positions leave a tile that is lower and
    wider (``positions`` is the most), up to 32,768 rows ``fused_positions`` cuts by V instead, and
    D sets the rows that listed blocks copy (``CpuTiles.listed_rows``).
    ``benchmarks/cpu_tiles.py`` holds the rule against other tiles, by threads, N, V and D: in its
    rows it takes at most 26 % longer than the best of them, except that above 32,768 rows the fused
    softmax would save a fourth (V = 100,000) and hold 49 MiB of logits instead of 4.
    """
    fit = 2 * core_cache_bytes() * min(torch.get_num_threads(), _MOST_THREADS) // _FLOAT
    logits = 1 << max(_LEAST_POWER, fit.bit_length() - 1)
    return CpuTiles(logits=logits, positions=1 << (logits.bit_length() // 2))


def fused_positions(num_rows: int) -> int:
    """Positions whose logits over so many rows are in memory together; a multiple of 64 if more."""
    most = min(_MOST_FUSED, _GROUP_LOGITS // max(num_rows, 1))
    return most if most < STEP else most // STEP * STEP


def core_cache_bytes() -> int:
    """Second-level cache of a core; 1 MiB where the system does not say."""
    name = "SC_LEVEL2_CACHE_SIZE"
    known = os.sysconf(name) if name in os.sysconf_names else 0
    return known if known > 0 else 1 << 20
