"""Tile sizes of the plain PyTorch path on a CPU, from its caches, threads and the shapes."""

import os
from dataclasses import dataclass

import torch

from shardrec.kernels.device.matmul import STEP

__all__ = ["LEAST_FUSED", "CpuTiles", "core_cache_bytes", "cpu_tiles", "fused_positions"]

_FLOAT = 4
# Logits of one group of the fused softmax: 16 MiB, and a matrix product copies them.
_GROUP_LOGITS = 1 << 22
_MOST_FUSED = 256
# With fewer positions per group, reading the rows and their gradient takes longer than the fused
# softmax saves.
LEAST_FUSED = 128
_LEAST_POWER = 19
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class CpuTiles:
    """Upper limits of the sizes of a tile in the CPU path.

    Attributes:
        logits: Logits in a tile.
        positions: Positions in a tile.
        items: Rows in a piece of a listed block.
        floats: Numbers in the rows that a batch of listed blocks copies.
        wide_rows: Rows that such a batch may copy even if they have more numbers than ``floats``.
    """

    logits: int = 1 << 20
    positions: int = 1024
    items: int = 1 << 14
    floats: int = 1 << 18
    wide_rows: int = 1 << 11

    def listed_rows(self, width: int) -> int:
        """Largest number of rows of D = ``width`` that a batch of listed blocks copies."""
        return max(self.floats // width, self.wide_rows)

    def listed_bytes(self, width: int, height: float) -> int:
        """Peak bytes of a batch of listed blocks: logits, rows and the rows' gradients.

        Args:
            width: D.
            height: Positions per block.
        """
        rows = self.listed_rows(width)
        return _FLOAT * round(min(self.logits, height * rows) + 2 * rows * width)


def cpu_tiles() -> CpuTiles:
    """The tiles for this machine: logits of twice the bytes of its threads' level-2 caches.

    Tiles are square, since rows are read once for each tile of positions and states once for each
    tile of rows. The rule ignores N, V and D, except: with fewer positions a tile is lower and
    wider (``positions`` is a limit), up to 32,768 rows ``fused_positions`` splits by V instead, and
    D sets how many rows listed blocks copy (``CpuTiles.listed_rows``).
    ``benchmarks/cpu_tiles.py`` compares the rule with other tiles, by threads, N, V and D: it takes
    at most 26 % longer than the best of them, except that above 32,768 rows the fused softmax would
    save a fourth of the time (V = 100,000) with 49 MiB of logits instead of 4.
    """
    fit = 2 * core_cache_bytes() * min(torch.get_num_threads(), _MOST_THREADS) // _FLOAT
    logits = 1 << max(_LEAST_POWER, fit.bit_length() - 1)
    return CpuTiles(logits=logits, positions=1 << (logits.bit_length() // 2))


def fused_positions(num_rows: int) -> int:
    """Positions per group of the fused softmax over ``num_rows`` rows; from 64 a multiple of 64."""
    most = min(_MOST_FUSED, _GROUP_LOGITS // max(num_rows, 1))
    return most if most < STEP else most // STEP * STEP


def core_cache_bytes() -> int:
    """Bytes of a core's level-2 cache; 1 MiB if the system does not report it."""
    name = "SC_LEVEL2_CACHE_SIZE"
    known = os.sysconf(name) if name in os.sysconf_names else 0
    return known if known > 0 else 1 << 20
