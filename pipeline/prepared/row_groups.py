"""Read Parquet files one row group at a time; errors name file, row group and column."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["RowGroups", "flat_list"]

Ints = npt.NDArray[np.int64]


class RowGroups:
    """The row groups of several files, numbered consecutively.

    Attributes:
        rows: (G,) number of rows in each row group.
        bytes_read: compressed bytes of footers and column chunks read so far.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        """Read the footers.

        Args:
            paths: files in order.
            columns: required columns.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a footer cannot be read, or a column is missing.
        """
        self._footers = [_footer(path, columns) for path in paths]
        self._paths = list(paths)
        counts = [footer.num_row_groups for footer in self._footers]
        self._file: Ints = np.repeat(np.arange(len(paths)), counts)
        self._first: Ints = np.cumsum([0, *counts])
        self.rows: Ints = np.array(
            [f.row_group(i).num_rows for f in self._footers for i in range(f.num_row_groups)],
            dtype=np.int64,
        )
        self.bytes_read = sum(footer.serialized_size for footer in self._footers)

    def __len__(self) -> int:
        """G, the number of row groups."""
        return len(self.rows)

    def name(self, index: int) -> str:
        """Text that names the file and row group, for messages."""
        file = int(self._file[index])
        return f"{self._paths[file]}, row group {index - int(self._first[file])}"

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """A table of the named columns of one row group.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: a column chunk is damaged, has nulls, or has another length than the footer
                says.
        """
        try:
            table = self._read(index, columns)
        except FileNotFoundError:
            raise _gone(self._paths[self._file[index]]) from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            place = f"{self.name(index)}, column {self._damaged(index, columns)}"
            raise ValueError(
                f"{place} must be readable Parquet, got {error}; prepare the data again"
            ) from error
        if table.num_rows != self.rows[index]:
            raise ValueError(
                f"{self.name(index)} must have {self.rows[index]} rows, as its footer says, got "
                f"{table.num_rows}; prepare the data again"
            )
        for name in columns:
            if table.column(name).null_count:
                raise ValueError(
                    f"{self.name(index)}, column {name} must have no nulls,"
                    f" got {table.column(name).null_count}; prepare the data again"
                )
        return table

    def _read(self, index: int, columns: Sequence[str]) -> pa.Table:
        file = int(self._file[index])
        footer, inside = self._footers[file], index - int(self._first[file])
        with pq.ParquetFile(
            self._paths[file], metadata=footer, pre_buffer=False, page_checksum_verification=True
        ) as parquet:
            table = parquet.read_row_group(inside, columns=list(columns), use_threads=False)
        self.bytes_read += _stored_bytes(footer.row_group(inside), columns)
        return table

    def _damaged(self, index: int, columns: Sequence[str]) -> str:
        for name in columns:
            try:
                self._read(index, [name])
            except (pa.ArrowException, OSError, UnicodeDecodeError):
                return name
        return " and ".join(columns)


def flat_list(table: pa.Table, name: str) -> tuple[npt.NDArray[np.generic], Ints]:
    """A list column as (T,) concatenated values and (rows + 1,) offsets into them."""
    column = table.column(name).combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise ValueError(f"column {name} must have no nulls in its lists, got {values.null_count}")
    return values.to_numpy(), offsets - offsets[0]


def _footer(path: Path, columns: Sequence[str]) -> pq.FileMetaData:
    try:
        footer = pq.read_metadata(path)
        names = footer.schema.to_arrow_schema().names
    except FileNotFoundError:
        raise _gone(path) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must end in a readable Parquet footer, got {error}; prepare the data again"
        ) from error
    missing = sorted(set(columns) - set(names))
    if missing:
        raise ValueError(
            f"{path} must have the columns {', '.join(columns)},"
            f" got a file without {', '.join(missing)}; prepare the data again"
        )
    return footer


def _gone(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} must be there, as the manifest lists it, got no such file;"
        " restore it or prepare the data again"
    )


def _stored_bytes(row_group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    chunks = [row_group.column(index) for index in range(row_group.num_columns)]
    return sum(
        chunk.total_compressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] in columns
    )
