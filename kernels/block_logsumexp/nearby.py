"""Blocks that pair positions and rows with nearby chunk numbers, made for some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["GPU_ROWS_AT_ONCE", "ROWS_AT_ONCE", "NearbyChunks"]

# Default number of rows sorted at a time; their order is int64.
ROWS_AT_ONCE = 1 << 16
# On a GPU, fewer rows would make blocks too narrow to keep it busy.
GPU_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class NearbyChunks:
    """Pairs of a position and a row with chunks at most ``reach`` apart in some round.

    A pair that is near in several rounds counts once. Only the chunk of each row and round is
    stored; rows are sorted by chunk when a list of blocks is made.

    Attributes:
        position_chunks: (N, r) int32.
        row_chunks: (R, r) uint8, int16 or int32.
        reach: e, the largest distance of near chunks.
        targets: (N,) int64 row of each position's target, -1 if it is not among the rows.
    """

    position_chunks: Tensor
    row_chunks: Tensor
    reach: int
    targets: Tensor

    @property
    def num_slots(self) -> int:
        """Number of slots: one for each position."""
        return self.targets.numel()

    def parts(self, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[Blocks]:
        """The blocks in parts, one for each round and each ``rows_at_once`` rows.

        A position occurs in at most one block of a part.
        """
        num_rows, num_rounds = self.row_chunks.shape
        for index in range(num_rounds):
            pairs, present, sizes = _group(self.position_chunks[:, index])
            pair_starts = F.pad(sizes.cumsum(0), (1, 0))
            for first in range(0, num_rows, rows_at_once):
                sorted_chunks, order = self.row_chunks[first : first + rows_at_once, index].sort(
                    stable=True
                )
                sorted_chunks = sorted_chunks.to(present.dtype)
                low, high = present - self.reach, present + self.reach
                yield Blocks(
                    pair_positions=pairs,
                    pair_starts=pair_starts,
                    items=order.add_(first),
                    item_starts=torch.searchsorted(sorted_chunks, low),
                    item_ends=torch.searchsorted(sorted_chunks, high, right=True),
                    targets=self.targets,
                    num_slots=self.num_slots,
                    rounds=Rounds(
                        self.position_chunks,
                        self.row_chunks,
                        self.reach,
                        torch.full_like(sizes, index),
                    ),
                )


def _group(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that sorts ``keys``, the distinct keys, and how often each occurs."""
    order = torch.argsort(keys, stable=True)
    distinct, sizes = torch.unique_consecutive(keys[order], return_counts=True)
    return order, distinct, sizes
