"""Packed positions as padded groups of sequences of like lengths: little padding in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LengthGroups", "PaddedGroup", "cut_lengths", "num_slots"]

# One more group must save this share of the positions in padding. Each costs a few dozen calls of
# small operators, while padding costs in attention alone.
LEAST_SAVED = 1 / 64


def cut_lengths(lengths: Tensor, least_saved: float = LEAST_SAVED) -> list[tuple[int, int]]:
    """Number of sequences and padded length of each group, shortest first.

    Among all cuts of the sorted lengths it is the one with the fewest padded positions plus
    ``least_saved`` times the real ones for each group (a shortest path over the distinct lengths).
    Sequences without a position are in no group.

    Args:
        lengths: (B,) int64.
        least_saved: share of the real positions.

    Example:
        >>> cut_lengths(torch.tensor([20, 2, 19, 3, 2, 0]), 0.1)
        [(3, 3), (2, 20)]
    """
    values, counts = np.unique(lengths[lengths > 0].cpu().numpy(), return_counts=True)
    before = np.append(0, np.cumsum(counts))  # sequences that are shorter
    least, start = np.zeros(len(before)), [0] * len(before)
    for end, length in enumerate(values.tolist(), start=1):
        costs = least[:end] + (before[end] - before[:end]) * length
        start[end] = int(costs.argmin())
        least[end] = costs[start[end]] + least_saved * float(values @ counts)
    groups, end = [], len(values)
    while end:
        number = int(before[end] - before[start[end]])
        groups.append((number, int(values[end - 1])))
        end = start[end]
    return groups[::-1]


def num_slots(lengths: Tensor) -> int:
    """Positions of all groups of sequences with these (B,) lengths, padding included."""
    return sum(number * length for number, length in cut_lengths(lengths))


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Sequences next to each other in a packed tensor, which are padded to a common length.

    Attributes:
        number: b, of sequences.
        length: l, padded.
        slots: (n,) int64 indices of their n positions in the flattened (b, l) group; None where
            these are all of it.
    """

    number: int
    length: int
    slots: Tensor | None

    @property
    def size(self) -> int:
        """Number of positions, n."""
        return self.number * self.length if self.slots is None else len(self.slots)

    def pad(self, values: Tensor) -> Tensor:
        """(b, l, ...) values with 0 as padding, from (n, ...)."""
        if self.slots is not None:
            empty = values.new_zeros(self.number * self.length, *values.shape[1:])
            values = empty.index_copy(0, self.slots, values)
        return values.view(self.number, self.length, *values.shape[1:])

    def unpad(self, values: Tensor) -> Tensor:
        """(n, ...) values without padding, from (b, l, ...)."""
        flat = values.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True, slots=True)
class LengthGroups:
    """Sequences in ascending order of length, in groups that are padded to a common length.

    N positions, and values of them, are packed sequence by sequence: as the caller gave the
    sequences, or sorted by their lengths.

    Attributes:
        places: (N,) int64 index of each sorted position in its sequence; (L,) of ``single``.
        lengths: (N,) int64 length of the sequence of each sorted position; (B, 1) of ``single``.
        order: (N,) int64 index, as given, of each sorted position; None: they are the same.
        groups: of the sorted positions.
    """

    places: Tensor
    lengths: Tensor
    order: Tensor | None
    groups: list[PaddedGroup]

    @classmethod
    def of(cls, lengths: Tensor, least_saved: float = LEAST_SAVED) -> LengthGroups:
        """The groups of ``cut_lengths`` for sequences of (B,) int64 lengths, on their device."""
        given = lengths.cpu()
        ascending, by_length = given.sort(stable=True)
        sequence = torch.repeat_interleave(ascending)
        places = torch.arange(len(sequence)) - (ascending.cumsum(0) - ascending)[sequence]
        order = (given.cumsum(0) - given)[by_length][sequence] + places
        packed = torch.stack((places, ascending[sequence], order, sequence)).to(lengths.device)
        groups, first, start = [], int((given == 0).sum()), 0
        for number, length in cut_lengths(ascending, least_saved):
            size = int(ascending[first : first + number].sum())
            own = packed[:, start : start + size]
            slots = None if size == number * length else (own[3] - first) * length + own[0]
            groups.append(PaddedGroup(number, length, slots))
            first, start = first + number, start + size
        return cls(packed[0], packed[1], packed[2], groups)

    @classmethod
    def single(cls, lengths: Tensor, longest: int) -> LengthGroups:
        """The one group of a batch that is padded to ``longest`` already; values stay (B, L, ...).

        Nothing is flattened: torch.export would not take batches of length 1 then.
        """
        places = torch.arange(longest, device=lengths.device)
        group = PaddedGroup(lengths.shape[0], longest, None)
        return cls(places, lengths[:, None], None, [group])

    @property
    def longest(self) -> int:
        """L, the largest padded length."""
        return self.groups[-1].length

    def sort(self, values: Tensor) -> Tensor:
        """(N, ...) packed values in ascending order of length."""
        return values if self.order is None else values.index_select(0, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """(N, ...) sorted values in the order in which ``sort`` took them."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy(0, self.order, values)

    def apply(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """(N, ...) sorted values of ``function``, which is called for each group.

        Args:
            function: takes (b, l, ...) values, padded with 0, and returns (b, l, ...).
            values: (N, ...) sorted; of ``single`` (B, L, ...), as the result.
        """
        if self.order is None:
            return function(*values)
        if len(self.groups) == 1:
            parts = [values]
        else:
            sizes = [group.size for group in self.groups]
            parts = list(zip(*(value.split(sizes) for value in values), strict=True))
        done = [
            group.unpad(function(*(group.pad(value) for value in part)))
            for group, part in zip(self.groups, parts, strict=True)
        ]
        return done[0] if len(done) == 1 else torch.cat(done)
