"""Distributions from which negatives are drawn, with the probabilities for the logQ correction."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from shardrec.kernels.negatives.draws import draw_below

__all__ = [
    "InBatch",
    "Mixture",
    "Popularity",
    "Proposal",
    "Uniform",
    "pack",
    "require_catalog",
    "unpack",
]

# Weights of a popularity table are integers that sum to about 2**50: exact in int64 and fine enough
# for any catalog below 2**31 items.
_POPULARITY_TOTAL = 1 << 50


class Proposal(Protocol):
    """A distribution over the V items from which negatives are drawn.

    Attributes:
        kind: Name of the distribution.
        size: V, if it is stored as a number; else 0.
        tables: Tensors that define the distribution.
    """

    kind: ClassVar[str]
    size: int
    tables: tuple[Tensor, ...]

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items, determined by the arguments."""
        ...

    def probability(self, items: Tensor) -> Tensor:
        """Float64 probability of each item, of the shape of ``items``."""
        ...


class Uniform:
    """The uniform distribution: every item has probability 1 / V."""

    kind: ClassVar[str] = "uniform"

    def __init__(self, num_items: int) -> None:
        """Stores the number of items V, in [1, 2**31)."""
        self.size = num_items
        self.tables: tuple[Tensor, ...] = ()

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        return draw_below(self.size, blocks, num_draws, seed=seed, step=step, stream=stream)

    def probability(self, items: Tensor) -> Tensor:
        """1 / V for each item."""
        return torch.full(items.shape, 1 / self.size, dtype=torch.float64, device=items.device)


class Popularity:
    """Items with probability proportional to ``max(count, 1) ** exponent``.

    The table is a (V,) int64 cumulative sum: float32 could not resolve more than 2**24 items.
    """

    kind: ClassVar[str] = "popularity"
    size: int = 0

    def __init__(self, counts: Tensor, exponent: float = 1.0) -> None:
        """Builds the cumulative table of 8 V bytes, with 8 V bytes of temporary memory.

        Args:
            counts: (V,) int64 training events of each item.
            exponent: 0 is uniform, 1 is the training frequency.
        """
        share = torch.empty(counts.shape, dtype=torch.float64, device=counts.device)
        share.copy_(counts).clamp_(min=1).pow_(exponent)
        weights = share.div_(share.sum()).mul_(_POPULARITY_TOTAL).round_().long().clamp_(min=1)
        self.tables: tuple[Tensor, ...] = (weights.cumsum_(0),)

    @classmethod
    def of_table(cls, ends: Tensor) -> "Popularity":
        """The proposal with a (V,) int64 cumulative table built before."""
        self = cls.__new__(cls)
        self.tables = (ends,)
        return self

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        (ends,) = self.tables
        total, low_bound = ends[-1], 1 << 30
        draws = draw_below(low_bound, blocks, 2 * num_draws, seed=seed, step=step, stream=stream)
        # 60 uniform bits scaled to [0, total) in two halves, so that no product overflows int64.
        fraction_high, fraction_low = draws[:, 0::2], draws[:, 1::2]
        high_bound, low = total >> 30, total & (low_bound - 1)
        point = fraction_high * high_bound + ((fraction_low * high_bound) >> 30)
        point += (fraction_high * low) >> 30
        return torch.searchsorted(ends, torch.minimum(point, total - 1), right=True)

    def probability(self, items: Tensor) -> Tensor:
        """Float64 share of each item in the table."""
        (ends,) = self.tables
        start = torch.where(items > 0, ends[(items - 1).clamp(min=0)], 0)
        return (ends[items] - start).double() / ends[-1]


class InBatch:
    """Targets of the global batch, with probability estimated as the share of training events."""

    kind: ClassVar[str] = "in_batch"
    size: int = 0

    def __init__(self, targets: Tensor, counts: Tensor, total: Tensor | None = None) -> None:
        """Stores the targets and the counts.

        Args:
            targets: (N,) int64 targets of all ranks, in the order of global positions.
            counts: (V,) int64 training events of each item.
            total: () int64 sum of ``counts``, if it is known.
        """
        total = counts.sum() if total is None else total
        self.tables: tuple[Tensor, ...] = (targets, counts, total)

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items."""
        targets = self.tables[0]
        bound = max(targets.numel(), 1)
        draws = draw_below(bound, blocks, num_draws, seed=seed, step=step, stream=stream)
        # A batch without positions draws item 0, which no position is compared with.
        return targets[draws] if targets.numel() else draws

    def probability(self, items: Tensor) -> Tensor:
        """Float64 share of each item in the training events, with counts of at least 1."""
        _, counts, total = self.tables
        return counts[items].clamp(min=1).double() / total


class Mixture:
    """A fixed number of draws from each of several proposals.

    Every draw, whichever source it came from, has probability ``sum_m K_m Q_m(j) / K``.
    """

    kind: ClassVar[str] = "mixture"
    size: int = 0

    def __init__(self, parts: Sequence[tuple[Proposal, int]]) -> None:
        """Stores (proposal, number of draws) pairs.

        Raises:
            ValueError: a part is itself a mixture; its streams would overlap those of other parts.
        """
        if any(part.kind == self.kind for part, _ in parts):
            raise ValueError(
                "parts of a mixture must not be mixtures, got one; list its parts instead"
            )
        self.parts = tuple(parts)
        self.tables = tuple(table for part, _ in parts for table in part.tables)
        self._total = sum(count for _, count in self.parts)

    def draw(self, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int) -> Tensor:
        """(len(blocks), num_draws) int64 items; ``num_draws`` must be the sum of the parts."""
        if num_draws != self._total:
            raise ValueError(
                f"num_negatives must be the mixture's {self._total} draws, got {num_draws}; "
                "change one of them"
            )
        draws = [
            part.draw(blocks, count, seed=seed, step=step, stream=stream + index)
            for index, (part, count) in enumerate(self.parts)
        ]
        return torch.cat(draws, dim=1)

    def probability(self, items: Tensor) -> Tensor:
        """Float64 mean of the parts' probabilities, weighted by their numbers of draws."""
        shares = [count / self._total * part.probability(items) for part, count in self.parts]
        return torch.stack(shares).sum(0)


def require_catalog(proposal: Proposal, num_items: int) -> None:
    """Raises ValueError if the proposal, or a part of it, is not over ``num_items`` items.

    Raises:
        ValueError: the numbers differ; the message has both.
    """
    parts = [part for part, _ in proposal.parts] if isinstance(proposal, Mixture) else [proposal]
    for part in parts:
        counted = part.tables[1] if isinstance(part, InBatch) else next(iter(part.tables), None)
        size = part.size if counted is None else counted.numel()
        if size != num_items:
            raise ValueError(
                f"proposal must be over the {num_items} items of the table, got one over {size}; "
                "build it from this catalog"
            )


def pack(proposal: Proposal) -> tuple[str, list[int], tuple[Tensor, ...]]:
    """A proposal as operator arguments: kinds of its parts, their draws and sizes, and tables.

    Raises:
        TypeError: the proposal is not a class of this module.

    >>> pack(Mixture([(Uniform(9), 3), (Uniform(7), 1)]))
    ('uniform uniform', [3, 9, 1, 7], ())
    """
    parts = proposal.parts if isinstance(proposal, Mixture) else ((proposal, 0),)
    for part, _ in parts:
        if not isinstance(part, Uniform | Popularity | InBatch):
            raise TypeError(
                "proposal must be a Uniform, Popularity, InBatch or a Mixture of them, got "
                f"{type(part).__name__}; Popularity takes the counts of any distribution"
            )
    numbers = [number for part, count in parts for number in (count, part.size)]
    return " ".join(part.kind for part, _ in parts), numbers, proposal.tables


def unpack(kinds: str, numbers: Sequence[int], tables: Sequence[Tensor]) -> Proposal:
    """The proposal from the results of ``pack``."""
    rest = list(tables)
    parts: list[tuple[Proposal, int]] = []
    for kind, count, size in zip(kinds.split(), numbers[::2], numbers[1::2], strict=True):
        if kind == Uniform.kind:
            parts.append((Uniform(size), count))
        elif kind == Popularity.kind:
            parts.append((Popularity.of_table(rest.pop(0)), count))
        else:
            parts.append((InBatch(rest.pop(0), rest.pop(0), rest.pop(0)), count))
    is_mixture = len(parts) > 1 or parts[0][1]
    return Mixture(parts) if is_mixture else parts[0][0]
