"""Top-k over scores that arrive tile by tile; of equal scores the lower row comes first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.select.coarse import Pairs, above, coarse

__all__ = ["GROUP", "TopSearch", "top_lowest"]

# Keys in memory at a time in Triton: 1 GiB.
KEYS_AT_ONCE = 1 << 27
GROUP = 64  # rows per group, unless k is large
MOST_PENDING = 64  # tiles until pending rows are merged


class TopSearch:
    """Streaming top-k: the k best rows of one shard for each of M states, one tile at a time.

    The phases:

    1. reduce: each tile becomes the best score of each group of rows (``_add_groups``);
    2. filter: most groups are at or below the state's floor, its k-th best score so far, and are
       skipped; of the others the rows above the floor are pending (``_add_rows``);
    3. merge: when a state has more than k pending rows, or after ``MOST_PENDING`` tiles, pending
       rows enter the lists and the floor rises (``_merge``);
    4. sort: ``result`` sorts each list once.

    Until then lists are in row order, so that of equal scores the lower row is kept. A state has at
    most k pending rows and those of one tile.
    """

    def __init__(self, num_states: int, k: int, tile: int, like: Tensor) -> None:
        """Starts with empty lists.

        Args:
            num_states: M, number of columns of each tile.
            k: rows to find for each state.
            tile: largest number of rows of a tile.
            like: a float32 tensor on the device of the tiles.
        """
        self._k = k
        # At least 2 k groups per tile, so that even the first tile skips about half of its groups.
        self._group = max(1, min(GROUP, tile // (2 * k)))
        self._best = like.new_full((num_states, k), -math.inf)
        self._best_rows = torch.zeros_like(self._best, dtype=torch.int64)
        # A row at or below a state's floor cannot enter its list: it has a higher index than the
        # rows that it ties with.
        self._floor = self._best[:, :1].clone()
        self._not_numbers = torch.zeros(num_states, dtype=torch.bool, device=like.device)
        # For each tile: the number of pending rows of each state, these rows and their scores.
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_pending = torch.zeros(num_states, dtype=torch.int64, device=like.device)

    def add(self, scores: Tensor, first_row: int, pairs: Pairs | None = None) -> None:
        """Adds a tile of scores; tiles must come in row order.

        Args:
            scores: (n, M) float32.
            first_row: index of the tile's first row.
            pairs: the vectors of the tile, to store coarse scores; None stores scores unchanged.
        """
        tile = _Tile(first_row, pairs)
        end = len(scores) - len(scores) % self._group
        if end:
            self._add_groups(scores[:end].unflatten(0, (-1, self._group)), 0, tile)
        if end < len(scores):
            self._add_groups(scores[None, end:], end, tile)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, k) scores and rows, best first, and (M,) bool: whether any score was NaN.

        With fewer than k rows, the list ends in score -inf.
        """
        self._merge()
        scores, order = self._best.sort(dim=1, descending=True, stable=True)
        return scores, self._best_rows.gather(1, order), self._not_numbers

    def _add_groups(self, groups: Tensor, first: int, tile: _Tile) -> None:
        """Adds rows above the floor from (groups, group, M) scores that start at row ``first``."""
        maxima = groups.amax(1).T.contiguous()  # (M, groups)
        self._not_numbers |= maxima.isnan().any(1)
        bar = tile.bar(self._floor)
        states, hot = (maxima > bar).nonzero(as_tuple=True)
        if len(hot) > self._best.numel():
            # Each of the k best groups has a row of at least the k-th maximum: a new floor.
            kth = tile.least(_kth_largest(maxima, self._k))
            below = kth.nextafter(kth.new_tensor(-math.inf))  # rows equal to it may still enter
            self._floor = torch.fmax(self._floor, below)
            bar = tile.bar(self._floor)
            states, hot = (maxima > bar).nonzero(as_tuple=True)
        values = groups[hot, :, states]  # (hot, group)
        enters = values > bar[states]
        inner, place = enters.nonzero(as_tuple=True)
        if len(inner):
            rows = first + hot[inner] * groups.shape[1] + place
            self._add_rows(*tile.decide(values[enters], states[inner], rows, self._floor))

    def _add_rows(self, values: Tensor, states: Tensor, rows: Tensor) -> None:
        counts = torch.bincount(states, minlength=len(self._best))
        self._pending.append((counts, rows, values))
        self._num_pending += counts
        if len(self._pending) == MOST_PENDING or int(self._num_pending.max()) > self._k:
            self._merge()

    def _merge(self) -> None:
        """Merges the pending rows into the lists and raises the floor."""
        if not self._pending:
            return
        counts = torch.stack([counts for counts, _, _ in self._pending])
        ends = self._k + counts.cumsum(0)  # (tiles, M) end column of the rows of a tile
        most = int(ends[-1].max())
        merged = self._best.new_full((len(self._best), most), -math.inf)
        merged_rows = self._best_rows.new_zeros(merged.shape)
        merged[:, : self._k], merged_rows[:, : self._k] = self._best, self._best_rows
        line_starts = most * torch.arange(len(merged), device=merged.device)
        for (count, rows, values), end in zip(self._pending, ends, strict=True):
            places = torch.arange(len(rows), device=rows.device)
            places += torch.repeat_interleave(line_starts + end - count.cumsum(0), count)
            merged.view(-1)[places], merged_rows.view(-1)[places] = values, rows
        self._pending, self._num_pending = [], torch.zeros_like(self._num_pending)
        kept = _first_best(merged, self._k).flatten().nonzero()[:, 0]
        self._best = merged.view(-1)[kept].view(self._best.shape)
        self._best_rows = merged_rows.view(-1)[kept].view(self._best.shape)
        self._floor = self._best.amin(1, keepdim=True)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Compares the scores of one tile with the floor: unchanged, or coarse if it has ``pairs``."""

    first_row: int
    pairs: Pairs | None

    def bar(self, floor: Tensor) -> Tensor:
        """(M, 1) threshold: only scores above it can beat the floor."""
        return floor if self.pairs is None else above(floor) - self.pairs.slack

    def least(self, scores: Tensor) -> Tensor:
        """(M, n) lower bound of the scores as they will be stored."""
        return scores if self.pairs is None else coarse(scores - self.pairs.slack)

    def decide(
        self, values: Tensor, states: Tensor, rows: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores as stored, states and global rows of the candidates that beat the floor."""
        if self.pairs is None:
            return values, states, self.first_row + rows
        values = self.pairs.decide(values, states, rows)
        kept = values > floor[states, 0]
        return values[kept], states[kept], self.first_row + rows[kept]


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """(M, 1) k-th largest of each line of (M, n)."""
    return scores.topk(k, 1, sorted=False).values.amin(1, keepdim=True)


def _first_best(scores: Tensor, k: int) -> Tensor:
    """(M, n) bool, True for the k largest of each line; of equal ones those of lower column.

    >>> _first_best(torch.tensor([[1.0, 2.0, 1.0, 3.0]]), 3)
    tensor([[ True,  True, False,  True]])
    """
    kth = _kth_largest(scores, k)
    best = scores >= kth
    if int(best.sum()) == k * len(scores):
        return best
    above, equal = scores > kth, scores == kth
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def top_lowest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(M, min(k, n)) largest values and columns of each line of (M, n); ties: the lower column.

    ``torch.topk`` leaves the order of ties undefined: lines in which more columns tie with the k-th
    value than fit are sorted in full, the others are not.
    """
    if scores.shape[1] <= 2 * k:
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], order[:, :k]
    values, order = scores.topk(k + 1, 1)
    undecided = (values[:, k - 1] == values[:, k]) & (values[:, k] > -math.inf)
    order = order[:, :k].sort(1).values
    values, inner = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    order = order.gather(1, inner)
    if undecided.any():
        tied, tied_order = scores[undecided].sort(dim=1, descending=True, stable=True)
        values[undecided], order[undecided] = tied[:, :k], tied_order[:, :k]
    return values, order
