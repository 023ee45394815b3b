"""The best k of scores that come tile by tile, equal scores by lower row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["GROUP", "TopSearch", "top_lowest"]

GROUP = 64  # rows of a group where lists are short


class TopSearch:
    """Finds the best items of one shard for a chunk of states, tile by tile.

    Most rows cannot enter a list that is already good: a tile is first reduced to the best score
    of each group of rows, and only groups that beat a state's k-th score so far are looked into.
    """

    def __init__(self, num_states: int, k: int, like: Tensor, group: int = GROUP) -> None:
        """Start with empty lists.

        Args:
            num_states: M, columns of the tiles to come.
            k: items wanted for each state.
            like: a float32 tensor on the device of the tiles.
            group: rows whose best score decides whether they are looked into.
        """
        self.k = k
        self.group = group
        self.best = like.new_full((num_states, k), -math.inf)
        self.best_rows = torch.zeros_like(self.best, dtype=torch.int64)
        # Rows at or below a state's floor cannot enter; ties lose, because later rows are higher.
        self.floor = self.best[:, -1].clone()
        self.not_numbers = torch.zeros_like(self.floor, dtype=torch.bool)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_pending = 0

    def add(self, scores: Tensor, first_row: int) -> None:
        """Take in a (n, M) tile; tiles must come in row order."""
        groups = scores[: len(scores) - len(scores) % self.group].unflatten(0, (-1, self.group))
        if len(groups):
            self._add_groups(groups, first_row)
        rest = scores[len(groups) * self.group :]
        if len(rest):
            self._add_groups(rest[None], first_row + len(groups) * self.group)

    def _add_groups(self, groups: Tensor, first_row: int) -> None:
        maxima = groups.amax(1)  # (groups, M)
        self.not_numbers |= maxima.isnan().any(0)
        hot, states = (maxima > self.floor).nonzero(as_tuple=True)
        if len(hot) > self.k * len(self.floor):
            self._raise_floor(maxima)
            hot, states = (maxima > self.floor).nonzero(as_tuple=True)
        values = groups[hot, :, states]  # (hot, group)
        inner, place = (values > self.floor[states, None]).nonzero(as_tuple=True)
        rows = first_row + hot[inner] * groups.shape[1] + place
        self.pending.append((states[inner], rows, values[inner, place]))
        self.num_pending += len(rows)
        if self.num_pending > self.k * len(self.floor) // 2:
            self.merge()

    def _raise_floor(self, maxima: Tensor) -> None:
        """The k-th best group holds a row that good, so nothing worse can enter."""
        if len(maxima) >= self.k:
            kth = maxima.topk(self.k, 0).values[-1]
            below = kth.nextafter(kth.new_tensor(-math.inf))  # rows equal to it may still enter
            self.floor = torch.maximum(self.floor, below)

    def merge(self) -> None:
        """Bring the pending rows into the lists."""
        if not self.pending:
            return
        states, rows, values = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.num_pending = [], 0
        states, order = states.sort(stable=True)  # rows of a state stay in row order
        counts = torch.bincount(states, minlength=len(self.floor))
        places = torch.arange(len(states), device=states.device)
        places += self.k - (counts.cumsum(0) - counts)[states]
        most = self.k + int(counts.max())
        merged = self.best.new_full((len(self.floor), most), -math.inf)
        merged_rows = self.best_rows.new_zeros(len(self.floor), most)
        merged[:, : self.k], merged_rows[:, : self.k] = self.best, self.best_rows
        merged[states, places], merged_rows[states, places] = values[order], rows[order]
        self.best, order = top_lowest(merged, self.k)
        self.best_rows = merged_rows.gather(1, order)
        self.floor = self.best[:, -1].clone()


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
