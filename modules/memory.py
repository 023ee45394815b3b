"""A memory beside the model: counts of what followed each item, added to the model's scores.

A wide part beside a deep one, as in Cheng et al., "Wide & Deep Learning for Recommender Systems",
arXiv 1606.07792: the counts memorise pairs of items, the vectors generalise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Memory", "PairScores", "memory_bytes", "recent_items"]


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of P distinct (item, state) pairs, sorted by item, then by state.

    Attributes:
        items: (P,) int64 global item of each pair.
        states: (P,) int64 index of each pair's state in the batch.
        scores: (P,) float32 score of each pair.
    """

    items: Tensor
    states: Tensor
    scores: Tensor

    def where(self, kept: Tensor) -> PairScores:
        """The pairs where the (P,) bool ``kept`` is True."""
        return PairScores(self.items[kept], self.states[kept], self.scores[kept])

    def of_states(self, chosen: Tensor) -> PairScores:
        """The pairs of the chosen states, renumbered as if only these states were in the batch.

        >>> pairs = PairScores(torch.tensor([7, 8]), torch.tensor([2, 0]), torch.ones(2))
        >>> pairs.of_states(torch.tensor([False, True, True])).states.tolist()
        [1]
        """
        own = self.where(chosen[self.states])
        return dataclasses.replace(own, states=(chosen.cumsum(0) - 1)[own.states])


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Strengths M[h, j] of the successors j of every item h, as a sparse matrix by rows.

    The score of item j rises by ``scale * sum_a decay**a M[h_a, j]`` for a history that ends with
    h_(ages-1), … h_1, h_0 (the most recent). A rank holds only successors among its own rows.

    Attributes:
        offsets: (V + 1,) int64 start of each item's list in ``successors``.
        successors: (E,) int32 global items, distinct within each list.
        strengths: (E,) float32 strength of each successor, positive.
        scale: how much a strength of 1 adds to a score.
        ages: how many of the most recent items are looked up.
        decay: weight of an item relative to the next more recent one.
    """

    offsets: Tensor
    successors: Tensor
    strengths: Tensor
    scale: float = 1.0
    ages: int = 3
    decay: float = 0.7

    def scaled(self, scale: float) -> Memory:
        """The same memory with another scale."""
        return dataclasses.replace(self, scale=scale)

    def relabeled(self, items: Tensor) -> Memory:
        """The memory for another catalog of V' items; items that it lacks are left out.

        Args:
            items: (V',) int64 item of this memory for each item of the other catalog; -1 for none.
        """
        known = items >= 0
        renamed = torch.full((len(self.offsets) - 1,), -1, dtype=torch.int32)
        renamed[items[known]] = known.nonzero()[:, 0].int()
        starts = self.offsets[items.clamp(min=0)]
        lengths = (self.offsets[items.clamp(min=0) + 1] - starts) * known
        found = _ranges(starts, lengths)
        successors = renamed[self.successors[found].long()]
        owners = torch.repeat_interleave(lengths)[successors >= 0]
        counts = torch.bincount(owners, minlength=len(items))
        return dataclasses.replace(
            self,
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            successors=successors[successors >= 0],
            strengths=self.strengths[found][successors >= 0],
        )

    def scores(self, recent: Tensor) -> PairScores:
        """What the memory adds to the scores of a batch of B states.

        Each pair's sum runs over the ages in a fixed order, so it does not depend on the batch, the
        ranks or the device.

        Args:
            recent: (B, ages) int64 last items of each history, the most recent first; -1 for
                none.

        Collectives: none.
        """
        keys, amounts = [], []
        for age, items in enumerate(recent.unbind(1)):
            states = (items >= 0).nonzero()[:, 0]
            starts = self.offsets[items[states]]
            lengths = self.offsets[items[states] + 1] - starts
            places = _ranges(starts, lengths)
            owners = torch.repeat_interleave(states, lengths)
            keys.append(self.successors[places].long() * len(recent) + owners)
            amounts.append(self.scale * self.decay**age * self.strengths[places])
        pairs, index = torch.unique(torch.cat(keys), return_inverse=True)
        scores = torch.zeros(len(pairs), device=recent.device)
        # No pair comes twice at one age, so these additions have an order.
        for part, values in zip(index.split([len(key) for key in keys]), amounts, strict=True):
            scores.index_add_(0, part, values)
        size = max(1, len(recent))
        return PairScores(pairs // size, pairs % size, scores)


def memory_bytes(num_items: int, neighbors: int, num_ranks: int) -> int:
    """Bytes of a memory on one of W ranks, with ``neighbors`` successors of every item.

    The successors are assumed to be spread evenly over the shards.

    >>> memory_bytes(1_000_000, 32, 4) == 8 * 1_000_001 + 8 * 32_000_000 // 4
    True
    """
    return 8 * (num_items + 1) + 8 * -(-num_items * neighbors // num_ranks)


def recent_items(items: Tensor, is_history: Tensor, ages: int) -> Tensor:
    """(B, ages) int64 last items of each history, the most recent first; -1 for none.

    Args:
        items: (B, L) int64, oldest first.
        is_history: (B, L) bool, False at padding and at items to skip.
        ages: how many.

    >>> items = torch.tensor([[4, 5, 6], [7, 0, 0]])
    >>> recent_items(items, torch.tensor([[True, False, True], [True, False, False]]), 2).tolist()
    [[6, 4], [7, -1]]
    """
    age = is_history.flip(1).cumsum(1).flip(1) - 1  # (B, L)
    found = is_history[:, None] & (age[:, None] == torch.arange(ages, device=items.device)[:, None])
    return (items[:, None] * found).sum(2).masked_fill(~found.any(2), -1)


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The indices of ranges, one range after the other.

    >>> _ranges(torch.tensor([7, 2]), torch.tensor([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return torch.arange(len(shift), device=starts.device) + shift
