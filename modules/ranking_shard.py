"""What one rank does with its own rows when a catalog is ranked; no collectives.

Scores are kept with rows first and states last, so that reductions over rows run along contiguous
memory. A block of them is written in tiles that fit the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.modules.ranking_exchange import Ragged

__all__ = ["Blocks", "LocalRows", "TopSearch", "own_scores", "shard_counts", "top_lowest"]

_TILE_SCORES = 2**20  # 4 MiB: scores are masked and compared while they are in the cache
_LEAST_COLUMNS = 16  # narrower products take another path in BLAS and round differently


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How much is worked on at a time: ``states * rows`` scores of 4 bytes exist at once.

    Attributes:
        states: states of all ranks together that are ranked at a time; more suit a GPU.
        rows: rows of a shard that are scored at a time.
    """

    states: int = 256
    rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse empty blocks, and rows that a float32 count cannot hold."""
        if not (self.states >= 1 and 1 <= self.rows <= 2**24):
            raise ValueError(
                "blocks must have states >= 1 and rows in [1, 2**24], got "
                f"{self.states} and {self.rows}; leave them out for the defaults"
            )


@dataclass(frozen=True, slots=True)
class LocalRows:
    """This rank's real rows and the local indices of those that may not be recommended."""

    rows: Tensor
    first_row: int
    blocked: Tensor

    @classmethod
    def of(cls, rows: Tensor, first_row: int, allowed: Tensor | None) -> LocalRows:
        """``allowed`` is (V,) bool over all ranks, or None for all items."""
        blocked = torch.empty(0, dtype=torch.int64, device=rows.device)
        if allowed is not None:
            blocked = (~allowed[first_row : first_row + len(rows)]).nonzero()[:, 0]
        return cls(rows, first_row, blocked)


class _Hidden:
    """The scores that must become -inf, found tile by tile."""

    def __init__(self, local: LocalRows, seen: Ragged | None, tile_rows: int) -> None:
        self.tile_rows, self.blocked = tile_rows, local.blocked
        self.blocked_bounds = _tile_bounds(local.blocked, len(local.rows), tile_rows)
        items, columns = seen if seen is not None else (local.blocked[:0], local.blocked[:0])
        rows = items - local.first_row
        inside = (rows >= 0) & (rows < len(local.rows))
        self.rows, order = rows[inside].sort()
        self.columns = columns[inside][order]
        self.bounds = _tile_bounds(self.rows, len(local.rows), tile_rows)

    def cover(self, scores: Tensor, start: int) -> None:
        """Hide what is hidden in the (rows, columns) tile that begins at local row ``start``."""
        tile = start // self.tile_rows
        low, high = self.bounds[tile], self.bounds[tile + 1]
        if high > low:
            places = (self.rows[low:high] - start) * scores.shape[1] + self.columns[low:high]
            scores.view(-1).index_fill_(0, places, -math.inf)
        low, high = self.blocked_bounds[tile], self.blocked_bounds[tile + 1]
        if high > low:
            scores.index_fill_(0, self.blocked[low:high] - start, -math.inf)


class TopSearch:
    """Searches one shard for the best items of chunk after chunk of states, in the same memory."""

    def __init__(self, local: LocalRows, k: int, blocks: Blocks) -> None:
        """Store what to search.

        Args:
            local: the rows of this shard.
            k: items wanted for each state.
            blocks: how much is worked on at a time.
        """
        self.local, self.k, self.blocks = local, k, blocks
        self.memory = torch.empty(0, device=local.rows.device)

    def search(self, states: Tensor, seen: Ragged | None) -> tuple[Tensor, Tensor]:
        """Best items of (M, D) float32 states, equal scores by lower index.

        Returns:
            (M, k) scores and global items; where the shard has fewer, the scores end in -inf.
        """
        num_rows, num_states = len(self.local.rows), len(states)
        states = _widen(states)
        tile, block = _grid(states, self.blocks, num_rows)
        group = max(1, min(tile, math.isqrt(block // self.k)))
        tile, block = tile - tile % group, block - block % (tile - tile % group)
        hidden = _Hidden(self.local, seen, tile)
        best = states.new_full((len(states), self.k), -math.inf)
        best_rows = torch.zeros_like(best, dtype=torch.int64)
        for start in range(0, num_rows, block):
            size = min(block, num_rows - start)
            scores = self._room(-(-size // group), group, len(states))
            maxima = self._score_block(states, hidden, range(start, start + size, tile), scores)
            values, found = _best_of_groups(scores, maxima, self.k)
            best, order = top_lowest(torch.cat((best, values), 1), self.k)
            best_rows = torch.cat((best_rows, found + start), 1).gather(1, order)
        return best[:num_states], best_rows[:num_states] + self.local.first_row

    def _room(self, *shape: int) -> Tensor:
        if self.memory.numel() < math.prod(shape):
            self.memory = self.memory.new_empty(math.prod(shape))
        return self.memory[: math.prod(shape)].view(shape)

    def _score_block(
        self, states: Tensor, hidden: _Hidden, starts: range, scores: Tensor
    ) -> Tensor:
        """Fill (groups, group, M) scores tile by tile; returns the (groups, M) best of groups."""
        flat, group = scores.flatten(0, 1), scores.shape[1]
        flat[starts.stop - starts.start :] = -math.inf
        maxima = scores.new_empty(len(scores), len(states))
        for start in starts:
            rows = self.local.rows[start : min(start + starts.step, starts.stop)]
            first = start - starts.start
            part = flat[first : first + len(rows)]
            _score(rows, states, part)
            hidden.cover(part, start)
            groups = slice(first // group, -(-(first + len(rows)) // group))
            torch.amax(scores[groups], 1, out=maxima[groups])
        return maxima


def _best_of_groups(scores: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best rows of (groups, group, M) scores: (M, <= k) scores and rows of the block.

    The k best rows lie in the k groups whose best rows are best, ties by lower group.
    """
    _, group, num_states = scores.shape
    _, groups = top_lowest(maxima.T.contiguous(), k)  # (M, <= k)
    groups = groups.sort(1).values  # candidates in row order, so that ties stay in row order
    rows = groups[:, :, None] * group + torch.arange(group, device=scores.device)
    rows = rows.flatten(1)  # (M, <= k * group)
    places = rows * num_states + torch.arange(num_states, device=scores.device)[:, None]
    values, order = top_lowest(scores.view(-1).take(places), k)
    return values, rows.gather(1, order)


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


def own_scores(local: LocalRows, states: Tensor, targets: Ragged) -> Tensor:
    """(T,) scores of the targets on this shard, 0 for those elsewhere.

    By a square product and not by dot products, which would round differently from the tiles.
    """
    items, columns = targets
    result = states.new_zeros(len(items))
    rows = items - local.first_row
    mine = ((rows >= 0) & (rows < len(local.rows))).nonzero()[:, 0]
    for first in range(0, len(mine), 64):
        picked = mine[first : first + 64]
        padded = picked[torch.arange(64, device=picked.device).clamp(max=len(picked) - 1)]
        square = local.rows[rows[padded]].float() @ states[columns[padded]].T
        result[picked] = square.diagonal()[: len(picked)]
    return result


def shard_counts(
    local: LocalRows,
    states: Tensor,
    seen: Ragged | None,
    targets: Ragged,
    thresholds: Tensor,
    blocks: Blocks,
) -> Tensor:
    """(T,) int64: how many rows of this shard rank before each target."""
    work = _Targets.of(local, targets, thresholds, len(states))
    states = _widen(states[work.order])
    seen = None if seen is None else (seen[0], work.place[seen[1]])
    tile, _ = _grid(states, blocks, len(local.rows))
    hidden = _Hidden(local, seen, tile)
    bounds = _tile_bounds(work.rows[work.by_row], len(local.rows), tile)
    scores, below = states.new_empty(2, min(tile, len(local.rows)), len(states))
    for start in range(0, len(local.rows), tile):
        rows = local.rows[start : start + tile]
        part = scores[: len(rows)]
        _score(rows, states, part)
        hidden.cover(part, start)
        work.count(part, below[: len(rows)], start)
        low, high = bounds[start // tile], bounds[start // tile + 1]
        for first in range(low, high, len(states)):
            work.count_ties(part, work.by_row[first : min(first + len(states), high)], start)
    return torch.empty_like(work.counts).index_copy_(0, work.original, work.counts)


@dataclass(frozen=True, slots=True)
class _Targets:
    """Targets in layers: the first of every state, then the second of those that have one, ...

    States are ordered by their number of targets, so that layer j is about the first
    ``layers[j]`` columns of a tile.
    """

    rows: Tensor  # (T,) local row, outside [0, R) for targets of other shards
    columns: Tensor  # (T,) place of the state
    thresholds: Tensor  # (T,) the target's own score
    thresholds_below: Tensor  # (T,) the next smaller float: "above it" means "at least the score"
    counts: Tensor  # (T,) int64
    layers: list[int]
    original: Tensor  # (T,) index of the target in the caller's order
    by_row: Tensor  # (T,) targets in order of their rows
    order: Tensor  # (M,) states by falling number of targets
    place: Tensor  # (M,) where each state went

    @classmethod
    def of(cls, local: LocalRows, targets: Ragged, thresholds: Tensor, num_states: int) -> _Targets:
        items, owners = targets
        lengths = torch.bincount(owners, minlength=num_states)
        order = lengths.argsort(descending=True, stable=True)
        place = torch.empty_like(order).index_copy_(
            0, order, torch.arange(num_states, device=order.device)
        )
        layer = (
            torch.arange(len(items), device=items.device) - (lengths.cumsum(0) - lengths)[owners]
        )
        original = (layer * num_states + place[owners]).argsort()
        rows, thresholds = (items - local.first_row)[original], thresholds[original]
        return cls(
            rows=rows,
            columns=place[owners][original],
            thresholds=thresholds,
            thresholds_below=thresholds.nextafter(thresholds.new_tensor(-math.inf)),
            counts=torch.zeros_like(items),
            layers=torch.bincount(layer).tolist(),
            original=original,
            by_row=rows.argsort(),
            order=order,
            place=place,
        )

    def count(self, scores: Tensor, below: Tensor, start: int) -> None:
        """Add the rows of a tile that beat each target; ties too where the tile ends before it."""
        num_rows = len(scores)
        limits = torch.where(self.rows >= start + num_rows, self.thresholds_below, self.thresholds)
        first = 0
        for width in self.layers:
            layer = slice(first, first + width)
            # Counted as "not at most", so that a score that is not a number never helps a target.
            torch.le(scores[:, :width], limits[layer], out=below[:, :width])
            self.counts[layer] += num_rows - below[:, :width].sum(0).long()
            first += width

    def count_ties(self, scores: Tensor, picked: Tensor, start: int) -> None:
        """Add equal scores at lower rows for targets inside the tile; never the target itself."""
        rows, thresholds = self.rows[picked] - start, self.thresholds[picked]
        columns = scores[:, self.columns[picked]]  # (n, picked)
        lower = torch.arange(len(scores), device=rows.device)[:, None] < rows
        ties = (lower & (columns == thresholds)).sum(0)
        itself = columns.gather(0, rows[None])[0] > thresholds
        self.counts[picked] += ties - itself.long()


def _score(rows: Tensor, states: Tensor, out: Tensor) -> None:
    torch.mm(rows.float(), states.T, out=out)


def _grid(states: Tensor, blocks: Blocks, num_rows: int) -> tuple[int, int]:
    """Rows of a tile, and of a block, which is a whole number of tiles."""
    block = max(1, min(blocks.rows, num_rows))
    tile = block if states.is_cuda else max(1, min(block, _TILE_SCORES // max(1, len(states))))
    return tile, block - block % tile


def _widen(states: Tensor) -> Tensor:
    missing = max(0, _LEAST_COLUMNS - len(states))
    return torch.cat((states, states.new_zeros(missing, states.shape[1]))) if missing else states


def _tile_bounds(sorted_rows: Tensor, num_rows: int, tile: int) -> list[int]:
    """Where each tile's part of the sorted rows begins, and the end of the last.

    >>> _tile_bounds(torch.tensor([-3, 0, 1, 5, 99]), num_rows=7, tile=3)
    [1, 3, 4, 4]
    """
    edges = list(range(0, num_rows, tile)) + [num_rows]
    return torch.searchsorted(sorted_rows, sorted_rows.new_tensor(edges)).tolist()
