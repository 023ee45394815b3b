"""Batches of tensors, and the index arithmetic that cuts them out of flat tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardrec.modules.ranking import Ragged

__all__ = [
    "Batch",
    "EvaluationBatch",
    "Ragged",
    "Samples",
    "cut_windows",
    "gathered",
    "num_windows",
    "padded",
]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of a global batch; B may be 0, L is at least 1.

    Attributes:
        items: (B, L) int64, oldest first, padded with 0 on the right.
        lengths: (B,) int64 number of real positions of each sequence.
        targets: (B, L) int64 next item at each position, padded with 0.
        weights: (B, L) float32 weights of the targets, padded with 0; None if the data has none.
        real: what ``real_positions`` returns, where it was counted before.
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    weights: Tensor | None = None
    real: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """N, the number of real positions."""
        return int(self.lengths.sum())

    def real_positions(self) -> Tensor:
        """(N,) int64 indices of the real positions in the flattened (B * L,) batch."""
        if self.real is not None:
            return self.real
        length = self.items.shape[1]
        real = torch.arange(length, device=self.lengths.device) < self.lengths[:, None]
        return real.flatten().nonzero().flatten()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch copied to another device, with the real positions as counted on this one."""
        return self._map(lambda one: one.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in pinned memory, from which ``to`` does not wait for a GPU."""
        return self._map(lambda one: one.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        parts = self.items, self.lengths, self.targets, self.weights, self.real_positions()
        return Batch(*(None if one is None else change(one) for one in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """A batch of this rank's evaluation users; B may be 0, L is at least 1.

    Attributes:
        items: (B, L) int64, the last L items of each history, padded with 0 on the right.
        lengths: (B,) int64 number of real positions of each sequence.
        targets: (T,) and (B,) int64: the targets of all users, oldest first, concatenated, and
            their number for each user.
        seen: (S,) and (B,) int64: the whole histories, concatenated, and their lengths.
        users: (B,) int64 row of each user in the file of the split.
    """

    items: Tensor
    lengths: Tensor
    targets: Ragged
    seen: Ragged
    users: Tensor

    def to(self, device: torch.device | str) -> "EvaluationBatch":
        """The batch copied to another device."""
        return EvaluationBatch(
            self.items.to(device),
            self.lengths.to(device),
            (self.targets[0].to(device), self.targets[1].to(device)),
            (self.seen[0].to(device), self.seen[1].to(device)),
            self.users.to(device),
        )


@dataclass(frozen=True, slots=True)
class Samples:
    """Training samples as ranges of a flat tensor: sample s starts at ``start[s]``."""

    items: Tensor
    weights: Tensor | None
    start: Tensor
    length: Tensor

    def batch(self, chosen: Tensor) -> Batch:
        """The chosen samples, padded to the longest of them."""
        start, length = self.start[chosen], self.length[chosen]
        items, real, place = padded(self.items, start, length)
        weights = None
        if self.weights is not None:
            weights = self.weights[place + real] * real
        return Batch(items, length, self.items[place + real] * real, weights)


def cut_windows(offsets: Ints, max_length: int, windows: str) -> tuple[Ints, Ints]:
    """(S,) start and (S,) number of positions of each sample, from (rows + 1,) list offsets.

    A sequence of n items has n - 1 positions. Windows are cut from its end, so that the earliest
    one may be short.

    >>> start, length = cut_windows(np.array([0, 6]), 2, "all")
    >>> start.tolist(), length.tolist()
    ([3, 1, 0], [2, 2, 1])
    """
    rows = np.diff(offsets)
    counts = num_windows(rows, max_length)
    if windows == "last":
        counts = np.ones_like(counts)
    row = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.maximum(rows[row] - 1, 0) - index * max_length
    start = np.maximum(end - max_length, 0)
    return offsets[row] + start, end - start


def num_windows(lengths: Ints, max_length: int) -> Ints:
    """(rows,) number of windows of each sequence; at least 1, even for a sequence of one item."""
    return np.maximum(-(-(lengths - 1) // max_length), 1)


def padded(values: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges of ``values``, padded to rows of equal length.

    Returns:
        (B, L) values padded with 0; (B, L) bool, True at real values; (B, L) indices in ``values``,
        0 at padding.
    """
    longest = max(int(length.max()), 1) if len(length) else 1
    offset = torch.arange(longest)
    real = offset < length[:, None]
    place = (start[:, None] + offset) * real
    return values[place] * real if len(length) else place, real, place


def gathered(values: Tensor, offsets: Tensor, rows: Tensor) -> Ragged:
    """The lists of the given rows: (T,) concatenated values and (B,) lengths."""
    lengths = offsets[rows + 1] - offsets[rows]
    before = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(offsets[rows] - before, lengths)
    return values[torch.arange(len(shift)) + shift], lengths
