"""Pack sequences of similar length into padded groups, so that attention sees little padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LengthGroups", "PaddedGroup", "cut_lengths", "num_slots"]

# A further group must save at least this share of the real positions in padding: a group costs a
# few dozen calls of small operators, while padding costs only in attention.
LEAST_SAVED = 1 / 64


def cut_lengths(lengths: Tensor, least_saved: float = LEAST_SAVED) -> list[tuple[int, int]]:
    """Number of sequences and padded length of each group, by ascending length.

    The sorted lengths are cut so that the cost is minimal: the number of positions, padding
    included, plus a charge per group of ``least_saved`` times the number of real positions. The
    minimum is a shortest path over the distinct lengths. Sequences of length 0 are in no group.

    Args:
        lengths: (B,) int64.
        least_saved: charge per group, as a share of the number of real positions.

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
    """Number of positions in the groups of sequences with (B,) ``lengths``, including padding."""
    return sum(number * length for number, length in cut_lengths(lengths))


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Consecutive sequences of a packed tensor, which are padded to a common length.

    Attributes:
        number: b, the number of sequences.
        length: l, the padded length.
        slots: (n,) int64 index in the flattened (b, l) group of each of the n real positions; None
            if nothing is padded.
    """

    number: int
    length: int
    slots: Tensor | None

    @property
    def size(self) -> int:
        """n, the number of real positions."""
        return self.number * self.length if self.slots is None else len(self.slots)

    def pad(self, values: Tensor) -> Tensor:
        """(b, l, ...) values, padded with 0, from (n, ...) packed values."""
        if self.slots is not None:
            empty = values.new_zeros(self.number * self.length, *values.shape[1:])
            values = empty.index_copy(0, self.slots, values)
        return values.view(self.number, self.length, *values.shape[1:])

    def unpad(self, values: Tensor) -> Tensor:
        """(n, ...) packed values, from (b, l, ...) padded values."""
        flat = values.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True, slots=True)
class LengthGroups:
    """A batch's sequences, sorted by length and cut into groups with a common padded length.

    Values at the N real positions of the batch are packed sequence by sequence, either in the order
    of the batch or in sorted order, by ascending length of the sequences.

    Attributes:
        indices: (N,) int64 index of each position in its sequence, in sorted order; (L,) for
            ``single``.
        lengths: (N,) int64 length of each position's sequence, in sorted order; (B, 1) for
            ``single``.
        order: (N,) int64 index in the batch's order of each position in sorted order; None if both
            orders are the same.
        groups: the groups, in sorted order.
    """

    indices: Tensor
    lengths: Tensor
    order: Tensor | None
    groups: list[PaddedGroup]

    @classmethod
    def of(cls, lengths: Tensor, least_saved: float = LEAST_SAVED) -> LengthGroups:
        """The groups of ``cut_lengths`` for (B,) int64 lengths, with tensors on their device."""
        given = lengths.cpu()
        ascending, by_length = given.sort(stable=True)
        sequence = torch.repeat_interleave(ascending)
        indices = torch.arange(len(sequence)) - (ascending.cumsum(0) - ascending)[sequence]
        order = (given.cumsum(0) - given)[by_length][sequence] + indices
        packed = torch.stack((indices, ascending[sequence], order, sequence)).to(lengths.device)
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
        """A single group for a batch that is already padded to ``longest``; values are (B, L, ...).

        Values are not flattened, because torch.export would then reject sequences of length 1.
        """
        indices = torch.arange(longest, device=lengths.device)
        group = PaddedGroup(lengths.shape[0], longest, None)
        return cls(indices, lengths[:, None], None, [group])

    @property
    def longest(self) -> int:
        """L, the largest padded length."""
        return self.groups[-1].length

    def sort(self, values: Tensor) -> Tensor:
        """(N, ...) packed values in sorted order, from the batch's order."""
        return values if self.order is None else values.index_select(0, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """(N, ...) packed values in the batch's order, from sorted order; inverts ``sort``."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy(0, self.order, values)

    def apply(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """(N, ...) results of ``function``, which is called once per group, in sorted order.

        Args:
            function: takes (b, l, ...) values, padded with 0, and returns (b, l, ...).
            values: (N, ...) packed values in sorted order; with ``single``, values and result are
                (B, L, ...).
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
