"""Distributions that negatives are drawn from, each with its own probability for logQ."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardrec.kernels.negatives.draws import draw_below

__all__ = ["InBatch", "Mixture", "Popularity", "Proposal", "Uniform"]

# Weights of a popularity table are integers that sum to about 2**50: exact in int64 and fine enough
# for any catalog below 2**31 items.
_POPULARITY_TOTAL = 1 << 50


class Proposal(Protocol):
    """A distribution over the V items."""

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items; a function of the arguments alone."""
        ...

    def probability(self, items: Tensor) -> Tensor:
        """Probability of each item, float64, of the shape of ``items``."""
        ...


class Uniform:
    """Every item with probability 1 / V."""

    def __init__(self, num_items: int) -> None:
        """Stores the number of items V, in [1, 2**31)."""
        self.num_items = num_items

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        return draw_below(self.num_items, blocks, num_draws, seed=seed, step=step, stream=stream)

    def probability(self, items: Tensor) -> Tensor:
        """1 / V for each item."""
        return torch.full(items.shape, 1 / self.num_items, dtype=torch.float64, device=items.device)


class Popularity:
    """Items in proportion to ``max(count, 1) ** exponent``.

    The table is a (V,) int64 cumulative sum: float32 could not reach the tail beyond 2**24 items.
    """

    def __init__(self, counts: Tensor, exponent: float = 1.0) -> None:
        """Builds the cumulative table, 8 V bytes.

        Args:
            counts: (V,) int64 training events of each item.
            exponent: 0 is uniform, 1 is the training frequency.
        """
        share = counts.double().clamp(min=1).pow(exponent)
        weights = (share / share.sum() * _POPULARITY_TOTAL).round().long().clamp(min=1)
        self._ends = weights.cumsum(0)
        self._total = int(self._ends[-1])

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        high_bound, low_bound = self._total >> 30, 1 << 30
        draws = draw_below(low_bound, blocks, 2 * num_draws, seed=seed, step=step, stream=stream)
        # 60 uniform bits scaled to [0, total) in two halves, so that no product leaves int64.
        fraction_high, fraction_low = draws[:, 0::2], draws[:, 1::2]
        low = self._total & (low_bound - 1)
        point = fraction_high * high_bound + ((fraction_low * high_bound) >> 30)
        point += (fraction_high * low) >> 30
        return torch.searchsorted(self._ends, point.clamp(max=self._total - 1), right=True)

    def probability(self, items: Tensor) -> Tensor:
        """Share of the item in the table."""
        start = torch.where(items > 0, self._ends[(items - 1).clamp(min=0)], 0)
        return (self._ends[items] - start).double() / self._total


class InBatch:
    """Targets of the global batch; their probability is the item's share of the training events."""

    def __init__(self, targets: Tensor, counts: Tensor) -> None:
        """Stores both.

        Args:
            targets: (N,) int64 targets of all ranks, in the order of global positions.
            counts: (V,) int64 training events of each item.
        """
        self._targets = targets
        self._counts = counts
        self._total = int(counts.sum())

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        bound = max(self._targets.numel(), 1)
        draws = draw_below(bound, blocks, num_draws, seed=seed, step=step, stream=stream)
        return self._targets[draws]

    def probability(self, items: Tensor) -> Tensor:
        """Share of the item in the training events."""
        return self._counts[items].clamp(min=1).double() / self._total


class Mixture:
    """A fixed number of draws from each of several proposals.

    Every draw, whichever source it came from, has probability ``sum_m K_m Q_m(j) / K``.
    """

    def __init__(self, parts: Sequence[tuple[Proposal, int]]) -> None:
        """Stores (proposal, number of draws) pairs."""
        self._parts = tuple(parts)
        self._total = sum(count for _, count in self._parts)

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items; ``num_draws`` must be the sum of the parts."""
        if num_draws != self._total:
            raise ValueError(
                f"num_negatives must be the mixture's {self._total} draws, got {num_draws}; "
                "change one of them"
            )
        draws = [
            part.draw(blocks, count, seed=seed, step=step, stream=stream + index)
            for index, (part, count) in enumerate(self._parts)
        ]
        return torch.cat(draws, dim=1)

    def probability(self, items: Tensor) -> Tensor:
        """Mean of the parts' probabilities, weighted by their draws."""
        shares = [count / self._total * part.probability(items) for part, count in self._parts]
        return torch.stack(shares).sum(0)
