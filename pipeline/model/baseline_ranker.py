"""Ranks by item-to-item scores and popularity: the baselines, which learn no vectors."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.select import top_lowest
from shardrec.modules.ranking import Ragged, tie_keys
from shardrec.pipeline.prepared.batches import gathered

__all__ = ["DECAY", "BaselineRanker", "by_popularity"]

DECAY = 0.7  # weight of an item of the history relative to the next more recent one
_MAX_LENGTH = 50  # items before that weigh less than 2e-8
_SCORES_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineRanker:
    """Ranks an item j for a history h_0 (the most recent), h_1, … by a sparse (V, V) matrix M.

    ``score(j) = sum_a 0.7**a M[h_a, j]`` over the last 50 items, in float64. Items without a score
    follow in the order of their popularity and get the scores -1, -2, …, so that every list is
    full. Equal scores rank by popularity too.

    The scores of some users are dense for a moment: 4 million numbers of 8 bytes, more only where
    the catalog is larger than that. M takes 8 bytes for each of its numbers on every rank.

    Attributes:
        order: (V,) int64 items, the most popular first.
        offsets: (V + 1,) int64 start of each row of M in ``neighbors``.
        neighbors: (E,) int32 columns of M.
        scores: (E,) float32 numbers of M, above 0.
        group: ranks that share the users.

    Collectives: none.
    """

    order: Tensor
    offsets: Tensor
    neighbors: Tensor
    scores: Tensor
    group: dist.ProcessGroup | None

    @classmethod
    def of_order(cls, order: Tensor, group: dist.ProcessGroup | None) -> "BaselineRanker":
        """The same list for everybody, but for the items that a user must not get."""
        offsets = torch.zeros(len(order) + 1, dtype=torch.int64)
        none = torch.zeros(0)
        return cls(
            order=order, offsets=offsets, neighbors=none.int(), scores=none.float(), group=group
        )

    @property
    def max_length(self) -> int:
        """How many of a user's last items it reads."""
        return _MAX_LENGTH if len(self.neighbors) else 1

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.order.device

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Ranker.top``."""
        columns = self.order if allowed is None else self.order[allowed[self.order]]
        if not len(self.neighbors):
            hidden = 0 if seen is None or not len(seen[1]) else int(seen[1].max())
            columns = columns[: k + hidden]
        column = torch.full((len(self.order),), -1)
        column[columns] = torch.arange(len(columns))
        users = torch.arange(len(items)).split(max(1, _SCORES_AT_ONCE // max(1, len(columns))))
        starts = None if seen is None else torch.cat([seen[1].new_zeros(1), seen[1].cumsum(0)])
        scores, lists = torch.full((len(items), k), -math.inf), torch.full((len(items), k), -1)
        for some in users:
            dense = self._dense(items[some], lengths[some], column, len(columns))
            if seen is not None and starts is not None:
                _hide(dense, column, gathered(seen[0], starts, some))
            best, places = top_lowest(dense, k)
            width = best.shape[1]
            scores[some, :width] = best.float()
            lists[some, :width] = columns[places].masked_fill_(best == -math.inf, -1)
        return scores, lists

    def _dense(self, items: Tensor, lengths: Tensor, column: Tensor, width: int) -> Tensor:
        """(n, width) float64 scores of the allowed items, in the order of popularity."""
        fallback = -1 - torch.arange(width, dtype=torch.float64)
        ages = lengths[:, None] - 1 - torch.arange(items.shape[1])  # (n, L), below 0 at padding
        users, places = (ages >= 0).nonzero(as_tuple=True)
        if not len(self.neighbors):
            return fallback.repeat(len(items), 1)
        history, weights = items[users, places], DECAY ** ages[users, places].double()
        found, counts = gathered(self.neighbors, self.offsets, history)
        values, _ = gathered(self.scores, self.offsets, history)
        columns = column[found]
        cells = torch.repeat_interleave(users, counts) * width + columns
        values = torch.repeat_interleave(weights, counts) * values * (columns >= 0)
        # In the order of the cells: the sum does not depend on the other users of the batch.
        sums = torch.bincount(
            cells.where(columns >= 0, 0), weights=values, minlength=len(items) * width
        )
        dense = sums.view(len(items), width)
        return dense.where(dense > 0, fallback)


def by_popularity(counts: Tensor) -> Tensor:
    """(V,) int64 items by falling count; equal counts by ``tie_keys``."""
    order = tie_keys(torch.arange(len(counts))).argsort()
    return order[counts[order].argsort(descending=True, stable=True)]


def _hide(scores: Tensor, column: Tensor, seen: Ragged) -> None:
    """Set the scores of the seen items of each line to -inf."""
    columns, users = column[seen[0]], torch.repeat_interleave(seen[1])
    scores[users[columns >= 0], columns[columns >= 0]] = -math.inf
