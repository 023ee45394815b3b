"""Blocks of positions and rows in chunks near each other, listed for some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["ROWS_AT_ONCE", "NearbyChunks"]

# Rows whose order is in memory together, as int64.
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class NearbyChunks:
    """Position i and row j meet when their chunks are at most ``reach`` apart in some round.

    A pair that meets in several rounds counts once. What is kept of a row is its chunk in each
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

    def parts(self) -> Iterator[Blocks]:
        """The blocks, one round and 65,536 rows at a time."""
        num_rows, num_rounds = self.row_chunks.shape
        for index in range(num_rounds):
            for first in range(0, num_rows, ROWS_AT_ONCE):
                yield self._listed([index], slice(first, min(first + ROWS_AT_ONCE, num_rows)))

    def whole(self) -> Blocks:
        """All blocks in one list, which takes 8 bytes for each row and round."""
        num_rows, num_rounds = self.row_chunks.shape
        return self._listed(list(range(num_rounds)), slice(0, num_rows))

    def _listed(self, rounds: list[int], rows: slice) -> Blocks:
        num_rows = rows.stop - rows.start
        pairs, sizes, items, starts, ends, block_rounds = [], [], [], [], [], []
        for place, index in enumerate(rounds):
            pair_order, present, pairs_of_chunk = _group(self.position_chunks[:, index])
            sorted_chunks, order = self.row_chunks[rows, index].sort(stable=True)
            sorted_chunks = sorted_chunks.to(present.dtype)
            first, last = present - self.reach, present + self.reach
            shift = place * num_rows
            pairs.append(pair_order)
            sizes.append(pairs_of_chunk)
            items.append(order.add_(rows.start))
            starts.append(torch.searchsorted(sorted_chunks, first) + shift)
            ends.append(torch.searchsorted(sorted_chunks, last, right=True) + shift)
            block_rounds.append(torch.full_like(pairs_of_chunk, index))
        return Blocks(
            pair_positions=torch.cat(pairs),
            pair_starts=F.pad(torch.cat(sizes).cumsum(0), (1, 0)),
            items=torch.cat(items),
            item_starts=torch.cat(starts),
            item_ends=torch.cat(ends),
            targets=self.targets,
            num_slots=self.num_slots,
            rounds=Rounds(
                self.position_chunks, self.row_chunks, self.reach, torch.cat(block_rounds)
            ),
        )


def _group(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that sorts ``keys``, the distinct keys, and how often each stands."""
    order = torch.argsort(keys, stable=True)
    distinct, sizes = torch.unique_consecutive(keys[order], return_counts=True)
    return order, distinct, sizes
