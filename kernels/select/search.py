"""The best k of scores that come tile by tile, equal scores by lower row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.select.coarse import Pairs, above, coarse

__all__ = ["GROUP", "TopSearch", "top_lowest"]

GROUP = 64  # rows of a group where lists are short
MOST_PENDING = 64  # tiles


class TopSearch:
    """Finds the best items of one shard for a chunk of states, tile by tile.

    Most rows cannot enter a list that is already good: a tile is first reduced to the best score
    of each group of rows, and only groups that beat a state's k-th score so far are looked into.
    Lists are in the order of rows until the end, so that of equal scores the first ones stay and
    nothing has to be sorted on the way. No state has more than k rows and one tile waiting.
    """

    def __init__(self, num_states: int, k: int, tile: int, like: Tensor) -> None:
        """Start with empty lists.

        Args:
            num_states: M, columns of the tiles to come.
            k: items wanted for each state.
            tile: most rows of a tile.
            like: a float32 tensor on the device of the tiles.
        """
        self._k = k
        # Of a tile with twice as many groups as the list is long, half the groups are looked into.
        self._group = max(1, min(GROUP, tile // (2 * k)))
        self._best = like.new_full((num_states, k), -math.inf)
        self._best_rows = torch.zeros_like(self._best, dtype=torch.int64)
        # Rows at or below a state's floor cannot enter; ties lose, because later rows are higher.
        self._floor = self._best[:, :1].clone()
        self._not_numbers = torch.zeros(num_states, dtype=torch.bool, device=like.device)
        # Of each tile how many rows of each state may enter, these rows and their scores.
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_pending = torch.zeros(num_states, dtype=torch.int64, device=like.device)

    def add(self, scores: Tensor, first_row: int, pairs: Pairs | None = None) -> None:
        """Take in a (n, M) tile; tiles must come in row order.

        Args:
            scores: float32.
            first_row: of the tile.
            pairs: the vectors behind the scores, where the lists are to hold coarse scores.
        """
        tile = _Tile(first_row, pairs)
        end = len(scores) - len(scores) % self._group
        if end:
            self._add_groups(scores[:end].unflatten(0, (-1, self._group)), 0, tile)
        if end < len(scores):
            self._add_groups(scores[None, end:], end, tile)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, k) scores and rows, the best first, and (M,) whether a score was not a number.

        Where there were fewer than k rows the list ends with -inf.
        """
        self._merge()
        scores, order = self._best.sort(dim=1, descending=True, stable=True)
        return scores, self._best_rows.gather(1, order), self._not_numbers

    def _add_groups(self, groups: Tensor, first: int, tile: _Tile) -> None:
        """Let in what is above the floor of (groups, group, M) rows from ``first`` of the tile."""
        maxima = groups.amax(1).T.contiguous()  # (M, groups)
        self._not_numbers |= maxima.isnan().any(1)
        bar = tile.bar(self._floor)
        states, hot = (maxima > bar).nonzero(as_tuple=True)
        if len(hot) > self._best.numel():
            # The k-th best group holds a row that good, so nothing worse can enter.
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
        """Bring the pending rows into the lists."""
        if not self._pending:
            return
        counts = torch.stack([counts for counts, _, _ in self._pending])
        ends = self._k + counts.cumsum(0)  # (tiles, M) columns behind the rows of a tile
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
    """Which scores of a tile may enter a list, and as what."""

    first_row: int
    pairs: Pairs | None

    def bar(self, floor: Tensor) -> Tensor:
        """(M, 1) which only scores above it can beat the floor."""
        return floor if self.pairs is None else above(floor) - self.pairs.slack

    def least(self, scores: Tensor) -> Tensor:
        """(M, n) what rows of such scores have at least."""
        return scores if self.pairs is None else coarse(scores - self.pairs.slack)

    def decide(
        self, values: Tensor, states: Tensor, rows: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, states and rows of what is above the floor once it is decided."""
        if self.pairs is None:
            return values, states, self.first_row + rows
        values = self.pairs.decide(values, states, rows)
        kept = values > floor[states, 0]
        return values[kept], states[kept], self.first_row + rows[kept]


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """(M, 1) k-th largest of each row of (M, n)."""
    return scores.topk(k, 1, sorted=False).values.amin(1, keepdim=True)


def _first_best(scores: Tensor, k: int) -> Tensor:
    """(M, n) bool, the k largest of each row; of equal ones those of lower column.

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
    """Sorted top k of each row of (M, n), ties by lower column; k is cut to n.

    ``torch.topk`` leaves ties undefined: only rows where more columns are equal to the k-th value
    than fit are sorted in full.
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
