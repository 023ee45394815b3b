"""Count which items follow each item in the training sequences, and how strongly."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.row_groups import RowGroups, flat_list
from shardrec.pipeline.served.memory import PAIRS

__all__ = ["count_successors"]

Ints = npt.NDArray[np.int64]

# By lag: 6 / lag is a whole number, so that sums do not depend on their order.
_WEIGHTS = {1: 6, 2: 3, 3: 2}
_MERGE_AT = 1 << 22


def count_successors(prepared: Prepared, most: int) -> pa.Table:
    """The strongest successors of each item, as a table of item, successor and strength.

    The strength of j after i is ``sum_lag (c_lag / lag) / sqrt(n_i)``: c_lag is how often j came
    lag = 1, 2, 3 events after i in a sequence, n_i the number of training events of i. Dividing by
    the root lies between a count and a probability, so that items with more evidence weigh more.
    Event weights are not used. Rows are sorted by item, then by falling strength, then by
    successor.

    Memory and time are those of sorting the distinct pairs, at most three per event.

    Raises:
        FileNotFoundError, ValueError: a training file is missing or damaged.
    """
    num_items = prepared.num_items
    pairs, weights = _counted(prepared)
    order = np.lexsort((-weights, pairs // num_items))  # stable: pairs rise
    starts = np.searchsorted(pairs, np.arange(num_items) * num_items)
    kept = order[np.arange(len(order)) - starts[pairs[order] // num_items] < most]
    item, successor = np.divmod(pairs[kept], num_items)
    events = np.sqrt(prepared.item_counts().numpy()[item])
    columns = (item, successor, weights[kept] / (_WEIGHTS[1] * events))
    arrays = [pa.array(one, kind) for one, kind in zip(columns, PAIRS.types, strict=True)]
    return pa.table(arrays, schema=PAIRS)


def _counted(prepared: Prepared) -> tuple[Ints, Ints]:
    """Distinct pairs ``item * V + successor``, ascending, and the sum of the weights of each."""
    total, waiting, size = (np.zeros(0, np.int64), np.zeros(0, np.int64)), [], 0
    for items, owners in _sequences(prepared):
        for lag, weight in _WEIGHTS.items():
            same = owners[lag:] == owners[:-lag]
            keys = items[:-lag][same] * prepared.num_items + items[lag:][same]
            waiting.append((keys, np.full(len(keys), weight)))
            size += len(keys)
        if size > max(_MERGE_AT, len(total[0])):
            total, waiting, size = _merged([total, *waiting]), [], 0
    return _merged([total, *waiting])


def _merged(parts: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """The distinct keys of all parts, ascending, and the sum of the weights of each.

    >>> parts = [(np.array([7, 2]), np.array([6, 3])), (np.array([7]), np.array([2]))]
    >>> [column.tolist() for column in _merged(parts)]
    [[2, 7], [3, 8]]
    """
    keys, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    distinct, index = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(index, weights, len(distinct)).astype(np.int64)


def _sequences(prepared: Prepared) -> Iterator[tuple[Ints, Ints]]:
    """Items of the training sequences and the sequence of each, one row group at a time."""
    groups = RowGroups(prepared.train_files, ["items"])
    for index in range(len(groups)):
        values, offsets = flat_list(groups.read(index, ["items"]), "items")
        items = values.astype(np.int64)
        if len(items) and not 0 <= items.min() <= items.max() < prepared.num_items:
            raise ValueError(
                f"{groups.name(index)}, column items must be in [0, {prepared.num_items}), got "
                f"{items.min()} to {items.max()}; prepare the data again"
            )
        yield items, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
