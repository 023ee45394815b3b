"""Count item-to-item scores over the training sequences, for a range of items at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardrec.pipeline.prepared.row_groups import RowGroups, flat_list

__all__ = ["NEIGHBORS", "Counting", "count_last_items", "count_neighbors"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
NEIGHBORS = pa.schema(
    [("item", pa.int32()), ("neighbor", pa.int32()), ("score", pa.float32())],
)
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """Which item-to-item scores are counted, and how many are kept.

    Attributes:
        knn: weight of ``c_ij / sqrt(n_i n_j)``, the cosine similarity of items i != j: n_i is the
            number of sequences that hold i, c_ij of those that hold both.
        next: weight of the number of times that j directly followed i.
        most: how many neighbours of an item to keep, for knn and for next separately; of equal
            scores the more popular ones.
        last_events: how many of the last events of a sequence knn counts; the number of pairs
            grows with its square.
    """

    knn: float
    next: float
    most: int
    last_events: int


def count_neighbors(files: Sequence[Path], order: Ints, how: Counting) -> Iterator[pa.Table]:
    """Tables of item, neighbor and score, by ascending item, best neighbours first.

    Memory is about 20 bytes per counted event (8 of them until the end), 8 per transition, and 100
    per pair of items in a range of about 4 million pairs (more if a single item has more). Time is
    that of sorting all pairs of items that occur in one sequence.

    Args:
        files: training files of a prepared folder.
        order: (V,) int64 items, the most popular first.
        how: what to count and to keep.
    """
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    members = _Members.read(files, len(order), how.last_events) if how.knn else None
    steps = _Steps.read(files, rank) if how.next else None
    for low, high in _ranges(members, len(order)):
        parts = []
        if members is not None:
            parts.append((how.knn, members.cosines(low, high, rank)))
        if steps is not None:
            parts.append((how.next, steps.counts(low, high)))
        weighted = [
            (best.keys, weight * best.scores.astype(np.float64))
            for weight, pairs in parts
            for best in [pairs.best(how.most)]
        ]
        keys, inverse = np.unique(np.concatenate([k for k, _ in weighted]), return_inverse=True)
        sums = np.bincount(inverse, np.concatenate([s for _, s in weighted]), len(keys))
        pairs = _Pairs(keys, sums.astype(np.float32), len(order)).best(len(order))
        rows, ranks = np.divmod(pairs.keys, len(order))
        columns = [rows + low, order[ranks], pairs.scores]
        yield pa.table(
            [pa.array(one, t) for one, t in zip(columns, NEIGHBORS.types, strict=True)],
            schema=NEIGHBORS,
        )


def count_last_items(files: Sequence[Path], num_items: int) -> Ints:
    """(V,) int64 number of training sequences that end with each item."""
    counts = np.zeros(num_items, dtype=np.int64)
    for values, offsets in _lists(files):
        counts += np.bincount(values[offsets[1:] - 1], minlength=num_items)
    return counts


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Positive scores of pairs of items of a range; the key is ``row * width + rank``.

    A row is an item's index in the range, a rank the popularity rank of its neighbour. Within a
    row either the keys ascend or the scores descend.
    """

    keys: Ints
    scores: Floats
    width: int

    def best(self, most: int) -> "_Pairs":
        """The ``most`` largest scores of each row, descending; of equal scores the lower rank."""
        rows = self.keys // self.width
        # The bits of positive floats are in the order of the floats.
        falling = rows << 32 | (2**31 - 1 - self.scores.view(np.int32).astype(np.int64))
        by_score = np.argsort(falling, kind="stable")
        first = np.flatnonzero(np.diff(rows[by_score], prepend=-1))  # of each row
        ranks = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        kept = by_score[ranks < most]
        return _Pairs(self.keys[kept], self.scores[kept], self.width)


@dataclass(frozen=True, slots=True)
class _Members:
    """The binary sequence-item matrix with M ones, stored by sequence and by item."""

    items: npt.NDArray[np.int32]  # (M,) by sequence
    starts: Ints  # (S + 1,) first entry of each sequence
    sequences: npt.NDArray[np.int32]  # (M,) by item
    item_starts: Ints  # (V + 1,) first entry of each item

    @classmethod
    def read(cls, files: Sequence[Path], num_items: int, last_events: int) -> "_Members":
        items, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for values, offsets in _lists(files):
            first = np.maximum(offsets[:-1], offsets[1:] - last_events)
            kept = np.arange(len(values)) >= np.repeat(first, np.diff(offsets))
            rows = np.repeat(np.arange(len(first)), np.diff(offsets))
            keys, _ = _counted(rows[kept] * num_items + values[kept])
            items.append((keys % num_items).astype(np.int32))
            sizes.append(np.bincount(keys // num_items, minlength=len(first)))
        flat, lengths = np.concatenate(items), np.concatenate(sizes)
        owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        sequences = owners[np.argsort(flat, kind="stable")]
        counts = np.bincount(flat, minlength=num_items)
        return cls(flat, _starts(lengths), sequences, _starts(counts))

    def pairs_of_items(self) -> Ints:
        """(V,) number of pairs of each item, itself included."""
        sums = _starts(np.diff(self.starts)[self.sequences])
        return np.diff(sums[self.item_starts])

    def cosines(self, low: int, high: int, rank: Ints) -> _Pairs:
        """The cosines of items [low, high) with all others."""
        start, stop = self.item_starts[low], self.item_starts[high]
        sequences = self.sequences[start:stop]
        own = np.repeat(np.arange(low, high), np.diff(self.item_starts[low : high + 1]))
        lengths = self.starts[sequences + 1] - self.starts[sequences]
        shift = self.starts[sequences] - _starts(lengths)[:-1]
        others = self.items[np.arange(lengths.sum()) + np.repeat(shift, lengths)]
        own = np.repeat(own, lengths)
        differs = own != others
        width = len(rank)
        keys, counts = _counted((own[differs] - low) * width + rank[others[differs]])
        sizes = np.diff(self.item_starts)
        by_rank = np.empty_like(sizes)
        by_rank[rank] = sizes
        lengths = sizes[keys // width + low] * by_rank[keys % width]
        return _Pairs(keys, (counts / np.sqrt(lengths)).astype(np.float32), width)


@dataclass(frozen=True, slots=True)
class _Steps:
    """How often one item directly followed another; keys as in ``_Pairs``, ascending."""

    keys: Ints
    times: Ints
    width: int

    @classmethod
    def read(cls, files: Sequence[Path], rank: Ints) -> "_Steps":
        found = [np.zeros(0, np.int64)]
        for values, offsets in _lists(files):
            inside = np.ones(len(values), dtype=bool)
            inside[offsets[1:] - 1] = False  # the last item of a sequence is followed by nothing
            at = np.flatnonzero(inside)
            found.append(values[at] * len(rank) + rank[values[at + 1]])
        return cls(*_counted(np.concatenate(found)), len(rank))

    def counts(self, low: int, high: int) -> _Pairs:
        """The followers of items [low, high)."""
        start, stop = np.searchsorted(self.keys, [low * self.width, high * self.width])
        keys = self.keys[start:stop] - low * self.width
        return _Pairs(keys, self.times[start:stop].astype(np.float32), self.width)


def _ranges(members: _Members | None, num_items: int) -> list[tuple[int, int]]:
    """Ranges of items with about ``_PAIRS_AT_ONCE`` pairs each, which cover all items."""
    if members is None:
        return [(0, num_items)]
    part = np.cumsum(members.pairs_of_items()) // _PAIRS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), num_items]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _lists(files: Sequence[Path]) -> Iterator[tuple[Ints, Ints]]:
    """Items and offsets of the sequences, one row group at a time."""
    groups = RowGroups(files, ["items"])
    for index in range(len(groups)):
        values, offsets = flat_list(groups.read(index, ["items"]), "items")
        yield values.astype(np.int64), offsets


def _counted(keys: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, ascending, and how often each occurs.

    ``np.unique`` of numpy 2.3 and later hashes: 1.2 µs a key, where sorting takes 0.03.
    """
    keys = np.sort(keys)
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.diff(first, append=len(keys))


def _starts(lengths: npt.NDArray[np.integer]) -> Ints:
    """(n + 1,) sums of the lengths before each."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
