"""The ranker of the baselines: item-to-item scores and popularity, no vectors."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.select import top_lowest
from shardrec.modules.ranking import Ragged
from shardrec.pipeline.prepared.batches import gathered

__all__ = ["DECAY", "BaselineRanker"]

DECAY = 0.7  # weight of an item of the history relative to the next more recent one
_MAX_LENGTH = 50  # items before that weigh less than 2e-8
_CELLS_AT_ONCE = 2**21

_Cells = tuple[Tensor, Tensor, Tensor]
"""Users, columns (indices in the order of popularity) and scores; a pair may occur again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineRanker:
    """Ranks items by a sparse (V, V) matrix M of item-to-item scores.

    For a history h_0 (the most recent item), h_1, …, item j gets
    ``score(j) = sum_a 0.7**a M[h_a, j]`` over the last 50 items, in float64. Items without a score
    follow in the order of popularity, with the scores -1, -2, …, so that every list is full. Equal
    scores also rank by popularity.

    M takes 8 bytes per nonzero on every rank. The scores of some users at a time take a few
    hundred MB, independent of V.

    Attributes:
        order: (V,) int64 items, the most popular first.
        offsets: (V + 1,) int64 start of each row of M in ``neighbors``.
        neighbors: (E,) int32 columns of the nonzeros of M.
        scores: (E,) float32 nonzeros of M, all positive.
        group: process group of the ranks that share the users; None for one process.

    Collectives: none.
    """

    order: Tensor
    offsets: Tensor
    neighbors: Tensor
    scores: Tensor
    group: dist.ProcessGroup | None

    @classmethod
    def of_order(cls, order: Tensor, group: dist.ProcessGroup | None) -> "BaselineRanker":
        """The ranker that gives every user the same list, minus the items a user must not get."""
        offsets = torch.zeros(len(order) + 1, dtype=torch.int64)
        none = torch.zeros(0)
        return cls(
            order=order, offsets=offsets, neighbors=none.int(), scores=none.float(), group=group
        )

    @property
    def max_length(self) -> int:
        """Number of a user's most recent items that it reads."""
        return _MAX_LENGTH if len(self.neighbors) else 1

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.order.device

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, k) scores and items, best first; see ``Ranker.top``."""
        columns = self.order if allowed is None else self.order[allowed[self.order]]
        column = torch.full((len(self.order),), -1)
        column[columns] = torch.arange(len(columns))
        none = lengths.new_zeros(len(lengths))
        values, counts = (none[:0], none) if seen is None else seen
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        scores, lists = torch.full((len(items), k), -math.inf), torch.full((len(items), k), -1)
        for some in torch.arange(len(items)).split(self._users_at_once(lengths)):
            hidden = gathered(values, starts, some)
            cells = self._cells(items[some], lengths[some], column)
            best, found = _best(cells, (column[hidden[0]], hidden[1]), len(columns), k)
            scores[some, : best.shape[1]] = best.float()
            lists[some, : best.shape[1]] = columns[found].where(best > -math.inf, -1)
        return scores, lists

    def _users_at_once(self, lengths: Tensor) -> int:
        longest = int(self.offsets.diff().max()) * int(lengths.max() if len(lengths) else 0)
        return max(1, _CELLS_AT_ONCE // max(1, longest))

    def _cells(self, items: Tensor, lengths: Tensor, column: Tensor) -> _Cells:
        """The scores that each item of each history adds, as (user, column, score)."""
        ages = lengths[:, None] - 1 - torch.arange(items.shape[1])  # (n, L), below 0 at padding
        users, places = (ages >= 0).nonzero(as_tuple=True)
        history, weights = items[users, places], DECAY ** ages[users, places].double()
        found, counts = gathered(self.neighbors, self.offsets, history)
        values, _ = gathered(self.scores, self.offsets, history)
        users, weights = (torch.repeat_interleave(part, counts) for part in (users, weights))
        columns = column[found]
        kept = columns >= 0
        return users[kept], columns[kept], (weights * values)[kept]


def _best(cells: _Cells, hidden: Ragged, width: int, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) float64 best scores and their columns; -inf at the end of a short list.

    Args:
        cells: scores to sum.
        hidden: columns that each of the n users must not get, -1 for none.
        width: number of columns.
        k: length of the lists.
    """
    num_users, most = len(hidden[1]), int(hidden[1].max()) if len(hidden[1]) else 0
    # Without a score only the first columns can be in a list: as many as it and the hidden take.
    first = torch.arange(min(width, k + most)).repeat(num_users, 1)
    users = torch.arange(num_users)[:, None].expand_as(first).flatten()
    keys = torch.cat([cells[0] * width + cells[1], users * width + first.flatten()])
    keys, inverse = keys.unique(return_inverse=True)
    # Sums in the order of the cells: they do not depend on the other users of the batch.
    values = torch.cat([cells[2], torch.zeros(first.numel(), dtype=torch.float64)])
    sums = torch.bincount(inverse, weights=values, minlength=len(keys)).double()  # also of none
    columns = keys % max(1, width)
    scores = sums.where(sums > 0, -1.0 - columns)
    owners = torch.repeat_interleave(hidden[1])
    is_hidden = torch.isin(keys, (owners * width + hidden[0])[hidden[0] >= 0])
    users = keys // max(1, width)
    counts = torch.bincount(users, minlength=num_users)
    places = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[users]
    longest = int(counts.max()) if num_users else 0
    dense = torch.full((num_users, longest), -math.inf, dtype=torch.float64)
    dense[users, places] = scores.masked_fill(is_hidden, -math.inf)
    dense_columns = torch.zeros(num_users, longest, dtype=torch.int64)
    dense_columns[users, places] = columns
    best, order = top_lowest(dense, k)
    return best, dense_columns.gather(1, order)
