"""Reading an event log: find its Parquet files, check every value, hand out tables of one form.

The log stays as its owner wrote it. What comes out has the columns ``user_id`` and ``item_id``
(int64 or string), ``time`` (int64), ``row`` (int64, position in the log: files in path order, rows
in file order), ``event`` (int32, index into the kept event types; 0 without a filter) and, when
asked for, ``weight`` (float32).
"""

import dataclasses
import fnmatch
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.config import unknown_name

_BATCH_ROWS = 65_536
_CHUNK_ROWS = 491_520
_FOOTER_BYTES = 65_536
_GLOB_CHARACTERS = "*?["


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """Which columns of the log to read.

    Attributes:
        user, item, time: names of the columns every log has.
        event: column that ``event_types`` selects from, or None to read every row.
        event_types: values of ``event`` to keep.
        weight: column of position weights, or None.
    """

    user: str
    item: str
    time: str
    event: str | None = None
    event_types: tuple[str, ...] = ()
    weight: str | None = None

    def names(self) -> list[str]:
        """The columns to read, in a fixed order."""
        optional = [self.event, self.weight]
        return [self.user, self.item, self.time] + [name for name in optional if name is not None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One Parquet file of the log; ``footer_sha256`` digests its last 64 KiB."""

    path: str
    bytes: int
    rows: int
    footer_sha256: str


@dataclasses.dataclass(kw_only=True, slots=True)
class EventLog:
    """A log whose files are known and whose columns are checked; iterate ``tables()`` to read it.

    Attributes:
        files: the Parquet files, in path order.
        user_type, item_type: "int64" or "string".
        time_type: "int64", or "timestamp[us]" when the log holds timestamps, dates or ISO text.
        events_read: rows read so far, before the event-type filter.
        event_types_seen: some of the event types read so far, for messages.
    """

    filesystem: fs.FileSystem
    files: tuple[SourceFile, ...]
    columns: EventColumns
    user_type: str
    item_type: str
    time_type: str
    events_read: int = 0
    event_types_seen: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def open(cls, source: str, columns: EventColumns) -> "EventLog":
        """Find the files of ``source`` and check their footers and column types.

        Raises:
            FileNotFoundError: there is no Parquet file.
            ValueError: a footer cannot be read, a column is missing, or its type is not ours.
        """
        filesystem, paths = find_files(source)
        described = [_describe(filesystem, path) for path in paths]
        schemas = {file.path: schema for file, schema in described}
        for path, schema in schemas.items():
            _check_columns(path, schema, columns)
        if columns.weight is not None:
            _same_kind(schemas, columns.weight, _weight_kind)
        return cls(
            filesystem=filesystem,
            files=tuple(file for file, _ in described),
            columns=columns,
            user_type=_same_kind(schemas, columns.user, _id_kind),
            item_type=_same_kind(schemas, columns.item, _id_kind),
            time_type=_same_kind(schemas, columns.time, _time_kind),
        )

    def tables(self) -> Iterator[pa.Table]:
        """Tables of about half a million events in the order of the log.

        Raises:
            ValueError: a value breaks the contract, or a file cannot be decoded; the message names
                file, row group and column.
        """
        pending: list[pa.Table] = []
        for file in self.files:
            for table in self._file_tables(file.path):
                pending.append(table)
                if sum(part.num_rows for part in pending) >= _CHUNK_ROWS:
                    yield pa.concat_tables(pending)
                    pending = []
        if pending:
            yield pa.concat_tables(pending)

    def _file_tables(self, path: str) -> Iterator[pa.Table]:
        with self.filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                place = f"{path!r}, row group {group}"
                for batch in _batches(file, group, self.columns.names(), place):
                    yield self._clean(batch, place)
                    self.events_read += batch.num_rows

    def _clean(self, batch: pa.RecordBatch, place: str) -> pa.Table:
        rows = pa.array(np.arange(self.events_read, self.events_read + batch.num_rows))
        table = pa.Table.from_batches([batch]).append_column("__row", rows)
        codes = pa.repeat(pa.scalar(0, pa.int32()), table.num_rows)
        if self.columns.event is not None:
            table, codes = self._keep_types(table)
        clean = {
            "user_id": _ids(table[self.columns.user], self.user_type, self.columns.user, place),
            "item_id": _ids(table[self.columns.item], self.item_type, self.columns.item, place),
            "time": _times(table[self.columns.time], self.columns.time, place),
            "row": table["__row"],
            "event": codes,
        }
        if self.columns.weight is not None:
            clean["weight"] = _weights(table[self.columns.weight], self.columns.weight, place)
        return pa.table(clean)

    def _keep_types(self, table: pa.Table) -> tuple[pa.Table, Any]:
        text = pc.cast(table[self.columns.event], pa.string())
        if len(self.event_types_seen) < 100:
            self.event_types_seen |= {kind for kind in pc.unique(text).to_pylist() if kind}
        codes = pc.index_in(text, pa.array(self.columns.event_types, pa.string()))
        keep = pc.is_valid(codes)
        return table.filter(keep), codes.filter(keep)


def find_files(source: str) -> tuple[fs.FileSystem, list[str]]:
    """The file system and the sorted Parquet files that ``source`` means.

    Args:
        source: a file, a folder (searched below, names that start with "_" or "." skipped), a glob,
            or a URI that pyarrow opens.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: pyarrow does not know the URI's scheme.
    """
    text, pattern = str(source), ""
    wild = [text.index(character) for character in _GLOB_CHARACTERS if character in text]
    if wild:
        text, pattern = (
            text[: text.rindex("/", 0, min(wild)) + 1 if "/" in text[: min(wild)] else 0],
            text,
        )
    filesystem, root = _open(text or ".")
    if pattern:
        pattern = root.rstrip("/") + "/" + pattern[len(text) :]
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"events must be an existing path, got {source!r}; check the path")
    if info.type == fs.FileType.File:
        return filesystem, [root]
    paths = _below(filesystem, root)
    paths = [path for path in paths if _matches(path, pattern)] if pattern else paths
    if not paths:
        raise FileNotFoundError(
            f"events must name at least one .parquet file, got {source!r} with none; check the path"
        )
    return filesystem, paths


def _open(text: str) -> tuple[fs.FileSystem, str]:
    try:
        if "://" in text:
            filesystem, path = fs.FileSystem.from_uri(text)
            return filesystem, path
        return fs.LocalFileSystem(), text
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"events must be a path or a URI that pyarrow opens, got {text!r} ({error}); "
            "use s3://, gs://, hdfs:// or file://"
        ) from error


def _below(filesystem: fs.FileSystem, root: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    files = [info.path for info in found if info.type == fs.FileType.File]
    skip = len(root.rstrip("/")) + 1
    hidden = [path for path in files if any(p[0] in "._" for p in path[skip:].split("/") if p)]
    return sorted(p for p in files if p.endswith((".parquet", ".pq")) and p not in set(hidden))


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    if "**" in wanted:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    pairs = zip(parts, wanted, strict=False)
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in pairs)


def _describe(filesystem: fs.FileSystem, path: str) -> tuple[SourceFile, pa.Schema]:
    with filesystem.open_input_file(path) as stream:
        size = stream.size()
        tail = stream.read_at(min(size, _FOOTER_BYTES), size - min(size, _FOOTER_BYTES))
        try:
            file = pq.ParquetFile(stream)
            rows, schema = file.metadata.num_rows, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path!r} must be a complete Parquet file, got one whose footer cannot be read "
                f"({_first_line(error)}); it may be truncated: copy it again"
            ) from error
    digest = hashlib.sha256(tail).hexdigest()
    return SourceFile(path=path, bytes=size, rows=rows, footer_sha256=digest), schema


def _check_columns(path: str, schema: pa.Schema, columns: EventColumns) -> None:
    for name in columns.names():
        if name not in schema.names:
            raise ValueError(f"{path!r}: " + unknown_name("column", name, schema.names))


def _same_kind(schemas: dict[str, pa.Schema], name: str, kind: Any) -> str:
    kinds = {path: kind(schema.field(name).type, name, path) for path, schema in schemas.items()}
    first = next(iter(kinds))
    for path, found in kinds.items():
        if found != kinds[first]:
            raise ValueError(
                f"column {name!r} must have one type in all files, got {kinds[first]} in {first!r} "
                f"and {found} in {path!r}; convert one of them"
            )
    return str(kinds[first])


def _id_kind(dtype: pa.DataType, name: str, path: str) -> str:
    value = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if pa.types.is_integer(value):
        return "int64"
    if _is_text(value):
        return "string"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer or string, got {dtype}; convert the ids"
    )


def _time_kind(dtype: pa.DataType, name: str, path: str) -> str:
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return "int64"
    if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype) or _is_text(dtype):
        return "timestamp[us]"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer, timestamp, date or ISO text, got {dtype}; "
        "convert the times"
    )


def _weight_kind(dtype: pa.DataType, name: str, path: str) -> str:
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return "float"
    raise ValueError(
        f"column {name!r} of {path!r} must be numeric, got {dtype}; convert the weights"
    )


def _is_text(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view()
    )


def _batches(
    file: pq.ParquetFile, group: int, names: Sequence[str], place: str
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(names))
    except (pa.ArrowException, OSError) as error:
        column = next((name for name in names if not _decodes(file, group, name)), names[0])
        raise ValueError(
            f"{place}, column {column!r} must be valid Parquet data, got {_first_line(error)}; "
            "the file is corrupt or truncated: copy it again"
        ) from error


def _decodes(file: pq.ParquetFile, group: int, name: str) -> bool:
    try:
        for _ in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[name]):
            pass
    except (pa.ArrowException, OSError):
        return False
    return True


def _no_nulls(column: pa.ChunkedArray, name: str, place: str) -> None:
    if column.null_count:
        raise ValueError(
            f"{place}, column {name!r} must have no nulls, got {column.null_count}; "
            "drop those rows or fill them"
        )


def _ids(column: pa.ChunkedArray, kind: str, name: str, place: str) -> pa.ChunkedArray:
    _no_nulls(column, name, place)
    if kind == "string":
        return pc.cast(column, pa.string())
    try:
        column = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place}, column {name!r} must fit into int64, got {_first_line(error)}; "
            "store such ids as strings"
        ) from error
    low = pc.min(column).as_py()
    if low is not None and low < 0:
        raise ValueError(
            f"{place}, column {name!r} must hold ids of 0 or more, got {low}; "
            "drop rows with placeholder ids, or store the ids as strings"
        )
    return column


def _times(column: pa.ChunkedArray, name: str, place: str) -> pa.ChunkedArray:
    _no_nulls(column, name, place)
    try:
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            return pc.cast(column, pa.int64())
        zoned = pa.types.is_timestamp(column.type) and column.type.tz is not None
        stamps = pc.cast(column, pa.timestamp("us", tz=column.type.tz if zoned else None))
        return pc.cast(stamps, pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{place}, column {name!r} must hold times, got {_first_line(error)}; use whole "
            "numbers, timestamps, dates or text such as 2024-01-31T08:00:00"
        ) from error


def _weights(column: pa.ChunkedArray, name: str, place: str) -> pa.ChunkedArray:
    _no_nulls(column, name, place)
    weights = pc.cast(column, pa.float32(), safe=False)
    wrong = pc.invert(pc.and_(pc.is_finite(weights), pc.greater_equal(weights, 0.0)))
    if pc.any(wrong).as_py():
        value = weights.filter(wrong)[0].as_py()
        raise ValueError(
            f"{place}, column {name!r} must hold finite weights of 0 or more, got {value}; "
            "correct or drop those rows"
        )
    return weights


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
