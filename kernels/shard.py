"""One rank's shard of a table that is sharded by rows: the input of the losses and the ranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["RowShard"]


@dataclass(frozen=True, slots=True)
class RowShard:
    """This rank's contiguous rows of a (V, D) table that is sharded by rows over a process group.

    Rank by rank the shards cover [0, V) in order, without gaps; a shard may be empty.

    Attributes:
        rows: (R, D) float; a leaf with ``requires_grad`` when it is trained. Its ``.grad`` may
            become dense (R, D) or sparse COO; it is the gradient of the global loss with respect
            to these rows, complete on this rank (nothing is left to sum or to divide).
        first_row: global item index of ``rows[0]``.
        num_rows: V, the number of rows over all ranks.
        group: the process group of the ranks that hold the table; None means one process that
            holds all of it, and no collectives.
    """

    rows: Tensor
    first_row: int
    num_rows: int
    group: dist.ProcessGroup | None = None
