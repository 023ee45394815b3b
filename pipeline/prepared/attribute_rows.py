"""Read the attributes of a range of items from a prepared folder, as tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.modules.attributes import AttributeRows, AttributeSizes
from shardrec.pipeline.prepared.attributes import (
    ATTRIBUTES_NAME,
    COLUMNS_NAME,
    AttributeColumn,
    read_columns,
)
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.row_groups import RowGroups
from shardrec.pipeline.ranks import on_this_rank

__all__ = ["PreparedAttributes", "as_rows", "labels", "sizes_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PreparedAttributes:
    """The attributes in a prepared folder, read by ranges of items.

    Attributes:
        prepared: the folder.
        columns: the attributes and the meaning of their codes.
        counts: (V,) int64 training events of each item.
        group: the ranks that read together; None for one process.
    """

    prepared: Prepared
    columns: Sequence[AttributeColumn]
    counts: Tensor
    group: dist.ProcessGroup | None = None

    @classmethod
    def open(
        cls, prepared: Prepared, group: dist.ProcessGroup | None
    ) -> "PreparedAttributes | None":
        """Open the attributes of a folder; None if it has none.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged; raised on all ranks.

        Collectives: two all-gathers of small objects.
        """
        if all(entry.path != COLUMNS_NAME for entry in prepared.manifest.files):
            return None
        columns = on_this_rank(lambda: read_columns(prepared.path), group)
        return cls(prepared, columns, on_this_rank(prepared.item_counts, group), group)

    @property
    def sizes(self) -> AttributeSizes:
        """Number of values over all columns, and total width of the vectors."""
        return sizes_of(self.columns)

    def trained(self, items: range) -> Tensor:
        """(len(items),) bool: whether an item has a training event."""
        return self.counts[items.start : items.stop] > 0

    def rows(self, items: range) -> AttributeRows:
        """Codes and vectors of a range of items.

        Raises:
            FileNotFoundError, ValueError: the file is missing or damaged; raised on all ranks.

        Collectives: one all-gather of small objects.
        """
        return on_this_rank(lambda: self._read(items), self.group)

    def _read(self, items: range) -> AttributeRows:
        names, path = [c.name for c in self.columns], self.prepared.file(ATTRIBUTES_NAME)
        groups = RowGroups([path], names)
        ends = np.cumsum(groups.rows)
        tables = [pq.read_schema(path).empty_table().select(names)]
        for index, (end, count) in enumerate(zip(ends, groups.rows, strict=True)):
            start, stop = max(items.start, end - count), min(items.stop, end)
            if start < stop:
                table = groups.read(index, names)
                tables.append(table.slice(start - (end - count), stop - start))
        table = pa.concat_tables(tables)
        arrays = [table.column(name).combine_chunks() for name in names]
        return as_rows(self.columns, arrays, len(items))


def sizes_of(columns: Iterable[AttributeColumn]) -> AttributeSizes:
    """The sizes that ``AttributeVectors`` needs for some columns.

    Example:
        >>> brand = AttributeColumn(name="brand", kind="category", values=("a", "b"))
        >>> sizes_of([brand, AttributeColumn(name="text", kind="vector", width=8)])
        AttributeSizes(num_values=3, missing=(0,), width=8)
    """
    counts = [column.num_codes for column in columns]
    firsts = np.cumsum([0, *counts])
    missing = tuple(int(first) for first, count in zip(firsts, counts, strict=False) if count)
    return AttributeSizes(int(firsts[-1]), missing, sum(column.width for column in columns))


def labels(columns: Iterable[AttributeColumn]) -> tuple[list[str], list[str]]:
    """The meaning of each code and of each number of a vector, in the order of ``sizes_of``."""
    of_values, of_vectors = list[str](), list[str]()
    for column in columns:
        (of_vectors if column.kind == "vector" else of_values).extend(column.labels)
    return of_values, of_vectors


def as_rows(
    columns: Sequence[AttributeColumn], arrays: Sequence[pa.Array], num_rows: int
) -> AttributeRows:
    """Encoded columns as ``AttributeRows``: a list of codes and one vector for each row.

    Args:
        columns: the columns.
        arrays: for each column, the (num_rows,) result of ``AttributeColumn.encode``.
        num_rows: number of rows.
    """
    first, lists, vectors = 0, [], [np.zeros((num_rows, 0), np.float32)]
    for column, array in zip(columns, arrays, strict=True):
        if column.kind == "vector":
            flat = array.flatten().to_numpy(zero_copy_only=False)
            vectors.append(flat.reshape(num_rows, column.width))
            continue
        values, lengths = _codes(array, num_rows)
        _check_codes(column, values)
        lists.append((values + first, lengths))
        first += column.num_codes
    codes, shares, offsets = _interleaved(lists, num_rows)
    return AttributeRows(
        torch.from_numpy(codes),
        torch.from_numpy(shares),
        torch.from_numpy(offsets),
        torch.from_numpy(np.concatenate(vectors, axis=1)),
    )


def _codes(array: pa.Array, num_rows: int) -> tuple[Array, Array]:
    """The codes of all rows, and how many each row has."""
    if pa.types.is_list(array.type):
        return array.flatten().to_numpy(), np.diff(array.offsets.to_numpy())
    return array.to_numpy(), np.ones(num_rows, np.int64)


def _check_codes(column: AttributeColumn, codes: Array) -> None:
    outside = codes[(codes < 0) | (codes >= column.num_codes)]
    if len(outside):
        raise ValueError(
            f"codes of attribute {column.name!r} must be below {column.num_codes}, got "
            f"{outside[0]}; prepare the data again"
        )


def _interleaved(lists: Sequence[tuple[Array, Array]], num_rows: int) -> tuple[Array, Array, Array]:
    """All columns' codes row by row, one over the codes of the row's column, and offsets."""
    counts = sum((lengths for _, lengths in lists), np.zeros(num_rows, np.int64))
    offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
    codes, shares = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    starts = offsets[:-1].copy()
    for values, lengths in lists:
        own = np.cumsum(lengths) - lengths
        places = np.arange(len(values)) + np.repeat(starts - own, lengths)
        codes[places] = values
        shares[places] = np.repeat(1 / np.maximum(lengths, 1), lengths)
        starts += lengths
    return codes, shares, offsets
