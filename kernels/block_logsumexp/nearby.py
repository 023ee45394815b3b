"""Blocks of positions and rows in chunks near each other, listed for some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["GPU_ROWS_AT_ONCE", "ROWS_AT_ONCE", "NearbyChunks"]

# Rows whose order is in memory together, as int64, where the caller does not say.
ROWS_AT_ONCE = 1 << 16
# On a GPU fewer would leave blocks too narrow to keep it busy.
GPU_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class NearbyChunks:
    """Pairs of positions and rows whose chunks are at most ``reach`` apart in some round.

    A pair that is near in several rounds counts once. What is kept of a row is its chunk in each
    round; the rows are put in the order of their chunks when a list is made.

    Attributes:
        position_chunks: (N, r) int32.
        row_chunks: (R, r) uint8, int16 or int32.
        reach: e.
        targets: (N,) int64 row of each position's target, -1 where it is not among the rows.
    """

    position_chunks: Tensor
    row_chunks: Tensor
    reach: int
    targets: Tensor

    @property
    def num_slots(self) -> int:
        """A slot for each position."""
        return self.targets.numel()

    def parts(self, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[Blocks]:
        """The blocks, one round and ``rows_at_once`` rows at a time.

        A position stands in one block of a part at most.
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
    """Order that sorts ``keys``, the distinct keys, and how often each stands."""
    order = torch.argsort(keys, stable=True)
    distinct, sizes = torch.unique_consecutive(keys[order], return_counts=True)
    return order, distinct, sizes
