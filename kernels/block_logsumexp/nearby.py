"""Blocks that pair positions and rows with nearby chunk numbers, made for some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["GPU_ROWS_AT_ONCE", "ROWS_AT_ONCE", "NearbyChunks"]

# Default number of rows sorted at a time; their order is int64.
ROWS_AT_ONCE = 1 << 16
# On a GPU, fewer rows would make blocks too narrow to keep it busy.
GPU_ROWS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class NearbyChunks:
    """Pairs of a position and a row with chunks at most ``reach`` apart in some round.

    A pair that is near in several rounds counts once. Only the chunk of each row and round is
    stored; rows are sorted by chunk when a list of blocks is made.

    Attributes:
        position_chunks: (N, r) int32.
        row_chunks: (R, r) uint8, int16 or int32.
        reach: e, the largest distance of near chunks.
        num_chunks: n_c, above every chunk number.
        targets: (N,) int64 row of each position's target, -1 if it is not among the rows.
    """

    position_chunks: Tensor
    row_chunks: Tensor
    reach: int
    num_chunks: int
    targets: Tensor

    @property
    def num_slots(self) -> int:
        """Number of slots: one for each position."""
        return self.targets.numel()

    def parts(self, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[Blocks]:
        """The blocks in parts, one for each round and each ``rows_at_once`` rows.

        A part has one block for each chunk, of its positions and the rows of the chunks near it. A
        position occurs in at most one block of a part.
        """
        num_rows = self.row_chunks.shape[0]
        device = self.row_chunks.device
        borders_of = torch.arange(self.num_chunks + 1, device=device, dtype=torch.int32)
        of_rounds = zip(self.position_chunks.unbind(1), self.row_chunks.unbind(1), strict=True)
        for index, (of_positions, of_rows) in enumerate(of_rounds):
            pairs, pair_starts = _sorted(of_positions, borders_of)
            rounds = Rounds(self.position_chunks, self.row_chunks, self.reach, index)
            for first in range(0, num_rows, rows_at_once):
                whole = num_rows <= rows_at_once
                part = of_rows if whole else of_rows[first : first + rows_at_once]
                order, borders = _sorted(part, borders_of)
                yield Blocks(
                    pair_positions=pairs,
                    pair_starts=pair_starts,
                    items=order.add_(first) if first else order,
                    item_starts=None,
                    item_ends=None,
                    targets=self.targets,
                    num_slots=self.num_slots,
                    rounds=rounds,
                    borders=borders,
                )


def _sorted(chunks: Tensor, borders_of: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts (n,) chunks, and the first place of each chunk in it, and n; int64."""
    in_order, order = chunks.sort(stable=True)
    return order, torch.searchsorted(in_order.int(), borders_of)
