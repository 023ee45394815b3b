"""Ranking on one shard: top-k over its own rows, and the collectives before and after.

The phases of a ranking; 2 to 4 run for each chunk of states:
1. `Ranks.agree`: all ranks check their arguments together and learn each other's number of states.
2. `Ranks.gather` and `gather_ragged`: all-gather of the chunk's states and of their seen items.
3. `shard_top`: scores of a tile of rows at a time, hidden ones set to -inf, the best k kept.
4. `Ranks.send_back`: all-to-all of the candidates; the rank that owns a state merges them.

Scores are stored with rows first and states last, so that reductions over rows run along contiguous
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.select import GROUP, TopSearch
from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import PairScores

__all__ = [
    "Blocks",
    "LocalRows",
    "Ragged",
    "Ranks",
    "real_rows",
    "rounds",
    "shard_top",
    "tie_keys",
]

Ragged = tuple[Tensor, Tensor]
"""Items of several users: values (sum of lengths,) int64 and lengths (B,) int64."""

_LARGEST = 2**63 - 1
_LEAST_COLUMNS = 16  # BLAS has another kernel for narrower products, which rounds differently


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Block sizes of a ranking: about ``states * rows`` scores of 4 bytes exist at once.

    Attributes:
        states: states ranked at a time, over all ranks; larger is faster on a GPU.
        rows: upper limit of the rows of a shard scored at a time. A tile also has at most 2**20
            scores on a CPU (4 MiB, which fit in the cache) and 2**26 on a GPU.
    """

    states: int = 256
    rows: int = 65_536

    def __post_init__(self) -> None:
        """Raises ValueError for a size out of range."""
        if not (self.states >= 1 and 1 <= self.rows <= 2**24):
            raise ValueError(
                "blocks must have states >= 1 and rows in [1, 2**24], got "
                f"{self.states} and {self.rows}; leave them out for the defaults"
            )

    def rows_of_tile(self, states: Tensor, num_rows: int) -> int:
        """Number of rows to score at a time for (M, D) states."""
        enough = max(GROUP, (2**26 if states.is_cuda else 2**20) // max(1, len(states)))
        return max(1, min(self.rows, enough, num_rows))


@dataclass(frozen=True, slots=True)
class LocalRows:
    """This rank's rows without padding, and which of them must not be recommended.

    A slot is an index in the order in which the rows are scored: of equal scores, `TopSearch`
    keeps those in the first slots.
    """

    rows: Tensor  # (R, D)
    first_row: int
    blocked: Tensor  # int64 slots, ascending
    order: Tensor | None = None  # (R,) int64, the row in each slot; None: the order of the rows

    @classmethod
    def of(cls, rows: Tensor, first_row: int, allowed: Tensor | None) -> LocalRows:
        """The (R, D) rows, blocked where the (V,) bool ``allowed`` is False; None blocks no row."""
        blocked = torch.empty(0, dtype=torch.int64, device=rows.device)
        if allowed is not None:
            blocked = (~allowed[first_row : first_row + len(rows)]).nonzero()[:, 0]
        return cls(rows, first_row, blocked)

    def by_key(self) -> LocalRows:
        """The same rows, to be scored in the order of their ``tie_keys``."""
        rows = torch.arange(len(self.rows), device=self.rows.device)
        order = tie_keys(self.first_row + rows).argsort()
        slots = torch.empty_like(order).index_copy_(0, order, rows)
        return replace(self, blocked=slots[self.blocked].sort().values, order=order)

    def tile(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) float32 rows in slots [start, stop)."""
        tile = slice(start, stop)
        return self.rows[tile if self.order is None else self.order[tile]].float()

    def slots(self, rows: Tensor) -> Tensor:
        """(n,) int64 slots of (n,) local rows."""
        if self.order is None:
            return rows
        every = torch.arange(len(self.order), device=rows.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, every)[rows]

    def items(self, slots: Tensor) -> Tensor:
        """The global item in each of the given slots, of any shape."""
        return self.first_row + (slots if self.order is None else self.order[slots])


def tie_keys(items: Tensor) -> Tensor:
    """(n,) int64 keys that order items with equal scores: the lower key ranks first.

    Distinct items have distinct keys, in an order unrelated to that of the items. Item indices
    depend on popularity (``prepare`` gives the most popular item index 0): if ties were broken by
    index, a model whose scores are all equal would do better than chance. The mixing steps
    (multiplication by an odd number, xor with a shift, modulo 2**63) are those of splitmix64, and
    each is invertible.

    >>> tie_keys(torch.arange(6)).argsort().tolist()
    [3, 4, 2, 0, 5, 1]
    """
    keys = (items + 1) * 0x1E3779B97F4A7C15
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        keys = keys & _LARGEST
        keys = (keys ^ (keys >> 31)) * multiplier
    keys = keys & _LARGEST
    return keys ^ (keys >> 31)


class _Hidden:
    """The (slot, state) pairs, and whole rows, with scores to set to -inf; sorted by slot."""

    def __init__(self, local: LocalRows, seen: Ragged | None, tile_rows: int) -> None:
        self.tile_rows, self.blocked = tile_rows, local.blocked
        self.blocked_bounds = _tile_bounds(local.blocked, len(local.rows), tile_rows)
        items, columns = seen if seen is not None else (local.blocked[:0], local.blocked[:0])
        rows = items - local.first_row
        inside = (rows >= 0) & (rows < len(local.rows))
        self.slots, order = local.slots(rows[inside]).sort()
        self.columns = columns[inside][order]
        self.bounds = _tile_bounds(self.slots, len(local.rows), tile_rows)

    def cover(self, scores: Tensor, start: int) -> None:
        """Set hidden scores to -inf in the (rows, columns) tile that starts at slot ``start``."""
        tile = start // self.tile_rows
        low, high = self.bounds[tile], self.bounds[tile + 1]
        if high > low:
            cells = (self.slots[low:high] - start) * scores.shape[1] + self.columns[low:high]
            scores.view(-1).index_fill_(0, cells, -math.inf)
        low, high = self.blocked_bounds[tile], self.blocked_bounds[tile + 1]
        if high > low:
            scores.index_fill_(0, self.blocked[low:high] - start, -math.inf)


class _Added:
    """What is added to the scores of some (slot, state) pairs, each once; sorted by slot."""

    def __init__(self, local: LocalRows, pairs: PairScores, tile_rows: int) -> None:
        self.tile_rows = tile_rows
        self.slots, order = local.slots(pairs.items - local.first_row).sort()
        self.columns, self.values = pairs.states[order], pairs.scores[order]
        self.bounds = _tile_bounds(self.slots, len(local.rows), tile_rows)

    def add(self, scores: Tensor, start: int) -> None:
        """Add to the (rows, columns) tile that starts at slot ``start``."""
        tile = start // self.tile_rows
        low, high = self.bounds[tile], self.bounds[tile + 1]
        cells = (self.slots[low:high] - start) * scores.shape[1] + self.columns[low:high]
        scores.view(-1).index_add_(0, cells, self.values[low:high])


def shard_top(
    local: LocalRows,
    states: Tensor,
    seen: Ragged | None,
    k: int,
    blocks: Blocks,
    added: PairScores | None = None,
) -> tuple[Tensor, Tensor]:
    """(M, k) best scores and (M, k) global items of this shard for (M, D) float32 states.

    ``added`` are scores of some of this shard's rows, added to the inner products. Of equal scores,
    those with the lower ``tie_keys`` are in the list, in any order. A list with fewer than k items
    ends in -inf; if any score of a state is NaN, its list starts with NaN.
    """
    # One more than k shows where more rows tie with the last one than fit. Models seldom have such
    # ties, so that only those states pay for reading the rows in another order.
    best, items = _search(local, states, seen, k + 1, blocks, added)
    tied = (best[:, k - 1] == best[:, k]) & (best[:, k] > -math.inf)
    if tied.any():
        hidden = None if seen is None else _of_states(seen, tied)
        more = None if added is None else added.of_states(tied)
        again = _search(local.by_key(), states[tied], hidden, k + 1, blocks, more)
        best[tied], items[tied] = again
    return best[:, :k], items[:, :k]


def _search(
    local: LocalRows,
    states: Tensor,
    seen: Ragged | None,
    k: int,
    blocks: Blocks,
    added: PairScores | None,
) -> tuple[Tensor, Tensor]:
    """As ``shard_top``, but of equal scores those of the first slots are in the list."""
    num_states = len(states)
    widened = _widen(states)
    tile = blocks.rows_of_tile(widened, len(local.rows))
    search = TopSearch(num_states, k, tile, like=states)
    hidden = _Hidden(local, seen, tile)
    more = None if added is None else _Added(local, added, tile)
    memory = states.new_empty(tile, len(widened))  # all tiles share it
    for start in range(0, len(local.rows), tile):
        rows = local.tile(start, start + tile)
        # Autocast does not apply to a product with ``out``, so scores stay float32.
        scores = torch.mm(rows, widened.T, out=memory[: len(rows)])
        if more is not None:
            more.add(scores, start)
        hidden.cover(scores, start)
        # All scores of a padding column are equal, so a search would take all of its rows.
        search.add(scores[:, :num_states], start)
    best, slots, not_numbers = search.result()
    best[not_numbers, 0] = math.nan
    return best, local.items(slots)


def _of_states(seen: Ragged, chosen: Tensor) -> Ragged:
    """The items and columns of the states that (M,) bool ``chosen`` names, in new columns.

    >>> _of_states((torch.tensor([7, 8, 9]), torch.tensor([0, 2, 2])), torch.tensor([0, 1, 1]) > 0)
    (tensor([8, 9]), tensor([1, 1]))
    """
    items, columns = seen
    kept = chosen[columns]
    return items[kept], (chosen.cumsum(0) - 1)[columns[kept]]


def _widen(states: Tensor) -> Tensor:
    missing = max(0, _LEAST_COLUMNS - len(states))
    return torch.cat((states, states.new_zeros(missing, states.shape[1]))) if missing else states


def _tile_bounds(sorted_rows: Tensor, num_rows: int, tile: int) -> list[int]:
    """Index of each tile's first entry in the sorted rows, and the end of the last tile.

    >>> _tile_bounds(torch.tensor([-3, 0, 1, 5, 99]), num_rows=7, tile=3)
    [1, 3, 4, 4]
    """
    edges = list(range(0, num_rows, tile)) + [num_rows]
    return torch.searchsorted(sorted_rows, sorted_rows.new_tensor(edges)).tolist()


class Ranks(Communicator):
    """The collectives of a ranking, over a process group or a single process."""

    def agree(
        self, states: Tensor, shard: RowShard, refusal: str | None, form: tuple[int, ...]
    ) -> list[int]:
        """Number of states on each rank, after checking that the arguments of all ranks agree.

        Args:
            states: (B, D) states of this rank.
            shard: this rank's rows.
            refusal: error message for invalid arguments of this rank; None if they are valid.
            form: the options that decide which collectives follow.

        Raises:
            ValueError: on every rank, if any rank has a refusal, if ``form`` differs between ranks,
                or if the shards do not add up to the table.

        Collectives: one all-gather.
        """
        num_states = len(states) if states.dim() else 0
        header = [num_states, len(real_rows(shard)), refusal is not None, *form]
        table = self.all_gather(torch.tensor(header, device=states.device))
        if refusal is not None:
            raise ValueError(refusal)
        refused = table[:, 2].nonzero().flatten().tolist()
        if refused:
            raise ValueError(
                f"arguments must fit on every rank, got a refusal on ranks {refused}; "
                "read the errors of those ranks"
            )
        if (table[:, 3:] != table[0, 3:]).any():
            raise ValueError(
                "k, blocks, and the presence of seen items and of a memory must be the same on "
                f"every rank, got {table[:, 3:].tolist()}; pass the same options everywhere"
            )
        if self.group is not None and int(table[:, 1].sum()) != shard.num_rows:
            raise ValueError(
                f"the shards of all ranks must hold {shard.num_rows} rows together, got "
                f"{int(table[:, 1].sum())}; check num_rows and first_row of each RowShard"
            )
        return table[:, 0].tolist()

    def gather(self, values: Tensor, sizes: list[int], start: int = 0) -> Tensor:
        """All-gathered ``sizes[r]`` values of each rank r, from its index ``start`` on."""
        return self.start_all_gather_rows(values[start : start + sizes[self.rank]], sizes)()

    def gather_ragged(self, ragged: Ragged, sizes: list[int], start: int) -> Ragged:
        """All-gathered items of a chunk of states, and each item's index of its state there."""
        values, lengths = ragged
        first = int(lengths[:start].sum())
        lengths = self.gather(lengths, sizes, start)
        per_rank = [int(part.sum()) for part in lengths.split(sizes)]
        return self.gather(values, per_rank, first), torch.repeat_interleave(lengths)

    def send_back(self, found: Tensor, sizes: list[int]) -> Tensor:
        """All-to-all of candidates: (all states, k) of this shard -> (own states, W * k)."""
        if self.group is None:
            return found
        own = sizes[self.rank]
        parts = self.all_to_all(found, sizes, [own] * self.size)
        return parts.view(self.size, own, found.shape[1]).transpose(0, 1).flatten(1)

    def require_numbers(self, scores: Tensor) -> None:
        """Raises FloatingPointError on every rank if any rank has a NaN; one all-reduce."""
        bad = scores.isnan().sum()
        self.sum_(bad)
        if bad:
            raise FloatingPointError(
                f"scores must be numbers, got {int(bad)} NaN; the model or the table has diverged"
            )


def rounds(counts: list[int], num_states: int) -> Iterator[tuple[int, list[int]]]:
    """For each chunk, the index of its first state on every rank, and its (W,) sizes.

    >>> list(rounds([3, 0], num_states=4))
    [(0, [2, 0]), (2, [1, 0])]
    """
    share = max(1, num_states // len(counts))
    for start in range(0, max(counts), share):
        yield start, [min(max(count - start, 0), share) for count in counts]


def real_rows(shard: RowShard) -> Tensor:
    """(R, D) rows of a shard without the padding rows at the end of the table; no gradient."""
    return shard.rows.detach()[: max(0, shard.num_rows - shard.first_row)]
