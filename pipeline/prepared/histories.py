"""User histories, streamed from Parquet files in chunks of users."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.prepared.data_files import find_files
from shardrec.pipeline.prepared.ids import id_kind, plain_ids, require_ids, short_message
from shardrec.pipeline.prepared.item_ids import ItemIds

__all__ = ["Histories", "HistoryChunk"]

_BUFFER_BYTES = 1 << 20
# The item lists of prepared sequences, and the columns of which there is one beside them.
_DENSE = (pa.list_(pa.field("element", pa.int64(), nullable=False)), {"length", "targets"})


@dataclass(frozen=True, slots=True)
class HistoryChunk:
    """Consecutive users of a file with their histories.

    Attributes:
        user_ids: (n,) user ids.
        items: (T,) int64 known items of all users, oldest first, concatenated.
        offsets: (n + 1,) int64 start of each user's items in ``items``.
        num_unknown: number of items left out because the catalog lacks them.
    """

    user_ids: pa.Array
    items: Tensor
    offsets: Tensor
    num_unknown: int


class Histories:
    """Parquet files with a user column and a list column of items, most recent item last.

    Attributes:
        num_users: number of rows in all files.
        user_type: Arrow type of the user column.
        files: path, rows and size of each file, in order.
    """

    def __init__(
        self, source: str, catalog: ItemIds, *, users: str, items: str, dense: bool = False
    ) -> None:
        """Read the footers.

        Args:
            source: a file, a folder, a glob or a URI that pyarrow opens.
            catalog: the known item ids.
            users: name of the user column.
            items: name of the list column.
            dense: whether the lists hold dense indices, as in a prepared folder, instead of ids.

        Raises:
            FileNotFoundError: there is no Parquet file.
            ValueError: a footer cannot be read, or a column is missing or of an unsuitable type.
        """
        self.catalog, self.columns, self.dense = catalog, (users, items), dense
        found = find_files(source, "histories")
        self._filesystem, self._paths = found.filesystem, found.parquet_paths("histories")
        opened = [_footer(self._filesystem, path) for path in self._paths]
        self._footers = [footer for footer, _ in opened]
        self.num_users = sum(footer.num_rows for footer in self._footers)
        self.user_type = self._find_user_type(
            {
                path: schema
                for path, (footer, schema) in zip(self._paths, opened, strict=True)
                if footer.num_rows or not self.num_users
            }
        )
        self.files = [
            {
                "path": path if "://" in source else str(Path(path).absolute()),
                "rows": footer.num_rows,
                "bytes": self._filesystem.get_file_info(path).size,
                "modified_ns": self._filesystem.get_file_info(path).mtime_ns,
            }
            for path, footer in zip(self._paths, self._footers, strict=True)
        ]

    def chunks(self, first: int, last: int, size: int) -> Iterator[HistoryChunk]:
        """Users [first, last) in chunks of ``size``; only the last chunk may be shorter."""
        pending: list[pa.Table] = []
        held = 0
        for table in self._tables(first, last):
            while held + table.num_rows >= size:
                pending.append(table.slice(0, size - held))
                table = table.slice(size - held)
                yield self._chunk(pa.concat_tables(pending))
                pending, held = [], 0
            pending, held = [*pending, table], held + table.num_rows
        if held:
            yield self._chunk(pa.concat_tables(pending))

    def _tables(self, first: int, last: int) -> Iterator[pa.Table]:
        """Pieces of row groups that hold users [first, last), in order."""
        start = 0
        for path, footer in zip(self._paths, self._footers, strict=True):
            for group in range(footer.num_row_groups):
                stop = start + footer.row_group(group).num_rows
                if start < last and first < stop:
                    yield from self._pieces(path, group, max(first - start, 0), last - start)
                start = stop

    def _pieces(self, path: str, group: int, first: int, last: int) -> Iterator[pa.Table]:
        """Rows [first, last) of a row group, decoded piece by piece."""
        position = 0
        try:
            with self._filesystem.open_input_file(path) as stream:
                file = pq.ParquetFile(
                    stream, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
                )
                for batch in file.iter_batches(
                    8192, row_groups=[group], columns=list(self.columns), use_threads=False
                ):
                    table = pa.Table.from_batches([batch])
                    low, high = max(first - position, 0), min(last - position, table.num_rows)
                    position += table.num_rows
                    if low < high:
                        place = f"{path!r}, row group {group}"
                        yield self._plain(table.slice(low, high - low), place)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path!r}, row group {group}, columns {' and '.join(self.columns)} must be "
                f"readable Parquet, got {error}; the file is damaged: write it again"
            ) from error

    def _chunk(self, table: pa.Table) -> HistoryChunk:
        users, lists = (table.column(name) for name in self.columns)
        lengths = pc.fill_null(pc.list_value_length(lists), 0)
        counts = torch.from_numpy(lengths.to_numpy().astype("int64"))
        items = self._items(pc.list_flatten(lists))
        known = items >= 0
        owners = torch.repeat_interleave(counts)[known]
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(owners, minlength=len(counts)), 0, out=offsets[1:])
        return HistoryChunk(
            users.combine_chunks(),
            items[known],
            offsets,
            int(len(items) - len(owners)),
        )

    def _items(self, values: pa.ChunkedArray) -> Tensor:
        if not self.dense:
            return self.catalog.items(values)
        items = torch.from_numpy(values.to_numpy().astype("int64"))
        return items.where((items >= 0) & (items < len(self.catalog)), -1)

    def _plain(self, table: pa.Table, place: str) -> pa.Table:
        """The users in the type of the output, and the items as int64 or large_string."""
        users, lists = (table.column(name) for name in self.columns)
        if users.type not in (self.user_type, pa.null()):
            users = plain_ids(users, f"{place}, column {self.columns[0]!r}")
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
        values = pc.list_flatten(lists)
        if values.type == pa.null():  # of empty lists alone
            is_text = self.catalog.kind == "string" and not self.dense
            values = values.cast(pa.large_string() if is_text else pa.int64())
        values = plain_ids(values, f"{place}, column {self.columns[1]!r}")
        plain = pa.LargeListArray.from_arrays(offsets, values.combine_chunks())
        return pa.table([users.cast(self.user_type), plain], names=list(self.columns))

    def _find_user_type(self, schemas: Mapping[str, pa.Schema]) -> pa.DataType:
        """Check the columns of the files; the type of the user ids in the output."""
        types: dict[str, pa.DataType] = {}
        for path, schema in schemas.items():
            for name in self.columns:
                if name not in schema.names:
                    raise ValueError(f"{path!r}: " + unknown_name("column", name, schema.names))
            if not self.dense and schema.field(self.columns[1]).type == _DENSE[0]:
                _refuse_prepared(path, schema)
            self._check_lists(path, schema.field(self.columns[1]).type)
            dtype = schema.field(self.columns[0]).type
            if dtype != pa.null():
                kind = require_ids(dtype, self.columns[0], path)
                types[path] = pa.large_string() if kind == "string" else dtype
        first = next(iter(types), None)
        if first is None:
            return pa.int64()
        for path, dtype in types.items():
            if id_kind(dtype) != id_kind(types[first]):
                raise ValueError(
                    f"column {self.columns[0]!r} must have one type in all files, got "
                    f"{id_kind(types[first])} in {first!r} and {id_kind(dtype)} in {path!r}; "
                    "convert one of them"
                )
        found = set(types.values())
        if len(found) == 1 and not _has_fractions(types[first]):
            return types[first]
        return pa.int64()

    def _check_lists(self, path: str, dtype: pa.DataType) -> None:
        wanted = self.catalog.kind
        kind = id_kind(dtype.value_type) if _is_list(dtype) else str(dtype)
        kind = wanted if kind == "null" else kind  # empty lists alone
        if not _is_list(dtype) or (not self.dense and kind != wanted):
            raise ValueError(
                f"column {self.columns[1]!r} of {path!r} must be a list of {wanted} ids as in the "
                f"catalog, got {dtype}; convert it, or name another column"
            )


def _refuse_prepared(path: str, schema: pa.Schema) -> None:
    """Refuse prepared sequences: their items are indices, which would be taken for ids."""
    if schema.names[:2] == ["user_id", "items"] and _DENSE[1] & set(schema.names):
        raise ValueError(
            f"histories must hold item ids of the log, got {path!r} of a prepared folder, which "
            "holds indices; leave histories out to recommend to the prepared users"
        )


def _has_fractions(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_floating(dtype) or pa.types.is_decimal(dtype))


def _is_list(dtype: pa.DataType) -> bool:
    kinds: Any = pa.types
    return bool(kinds.is_list(dtype) or kinds.is_large_list(dtype))


def _footer(filesystem: fs.FileSystem, path: str) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            return file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path!r} must end in a readable Parquet footer, got {short_message(error)}; write "
            "the file again"
        ) from error
