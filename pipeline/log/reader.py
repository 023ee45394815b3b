"""Read an event log: find its Parquet files, check every value, return tables of one schema.

The tables have the columns ``user_id`` and ``item_id`` (int64 or string), ``time`` (int64), ``row``
(int64, position in the log: files in path order, rows in file order), ``event`` (int32, index into
the kept event types; 0 without a filter) and ``weight`` (float32, only with a weight column).
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.log.columns import (
    EventColumns,
    check_columns,
    read_ids,
    read_text,
    read_times,
    read_weights,
    same_kind,
    short_message,
    time_kind,
    weight_kind,
)
from shardrec.pipeline.prepared.parquet_files import find_files, require_ids

__all__ = ["EventLog", "SourceFile"]

_BATCH_ROWS = 65_536
_CHUNK_ROWS = 491_520
_FOOTER_BYTES = 65_536
_TYPES_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One Parquet file of the log; ``footer_sha256`` digests its last 64 KiB."""

    path: str
    bytes: int
    rows: int
    footer_sha256: str


@dataclasses.dataclass(kw_only=True, slots=True)
class EventLog:
    """An event log with checked column types; ``tables()`` reads it.

    Attributes:
        filesystem: holds the files.
        files: the Parquet files, in path order.
        columns: the columns to read.
        user_type: kind of the user ids, "int64" or "string".
        item_type: kind of the item ids, "int64" or "string".
        time_type: "int64", or "timestamp[us]" when the log holds timestamps, dates or ISO text.
        events_read: rows read so far, before the event-type filter.
        event_types_seen: some of the event types read so far, for messages.
        times_cut: whether a time read so far was finer than a microsecond.
    """

    filesystem: fs.FileSystem
    files: tuple[SourceFile, ...]
    columns: EventColumns
    user_type: str
    item_type: str
    time_type: str
    events_read: int = 0
    event_types_seen: set[str] = dataclasses.field(default_factory=set)
    times_cut: bool = False

    @classmethod
    def open(cls, source: str, columns: EventColumns) -> "EventLog":
        """Find the files of ``source`` and check their footers and column types.

        Raises:
            FileNotFoundError: there is no Parquet file.
            ValueError: a footer cannot be read, or a column is missing or of an unsuitable type.
        """
        filesystem, paths = find_files(source)
        described = [_describe(filesystem, path) for path in paths]
        schemas = {file.path: schema for file, schema in described}
        for path, schema in schemas.items():
            check_columns(path, schema, columns)
        if columns.weight is not None:
            same_kind(schemas, columns.weight, weight_kind)
        return cls(
            filesystem=filesystem,
            files=tuple(file for file, _ in described),
            columns=columns,
            user_type=same_kind(schemas, columns.user, require_ids),
            item_type=same_kind(schemas, columns.item, require_ids),
            time_type=same_kind(schemas, columns.time, time_kind),
        )

    def tables(self) -> Iterator[pa.Table]:
        """Tables of about half a million events in the order of the log.

        Raises:
            ValueError: a value is invalid, or a file cannot be decoded or has changed since
                ``open``; the message names file, row group and column.
        """
        pending: list[pa.Table] = []
        for file in self.files:
            for table in self._file_tables(file):
                pending.append(table)
                if sum(part.num_rows for part in pending) >= _CHUNK_ROWS:
                    yield pa.concat_tables(pending)
                    pending = []
        if pending:
            yield pa.concat_tables(pending)

    def describe_event_types(self) -> str:
        """Some of the event types read so far, for messages."""
        seen = sorted(self.event_types_seen)
        shown = ", ".join(repr(kind) for kind in seen[:_TYPES_SHOWN])
        return (shown or "nulls only") + (", …" if len(seen) > _TYPES_SHOWN else "")

    def _file_tables(self, source: SourceFile) -> Iterator[pa.Table]:
        _require_unchanged(self.filesystem, source)
        began = self.filesystem.get_file_info(source.path).mtime_ns
        with self.filesystem.open_input_file(source.path) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            for group in range(file.num_row_groups):
                place = f"{source.path!r}, row group {group}"
                for batch in _batches(file, group, self.columns.names(), place):
                    yield self._clean(self._select(batch, place), place)
                    self.events_read += batch.num_rows
        _require_unchanged(self.filesystem, source)
        if self.filesystem.get_file_info(source.path).mtime_ns != began:
            raise _changed(source.path)

    def _select(self, batch: pa.RecordBatch, place: str) -> pa.Table:
        """The columns, named by role, for events of the wanted types."""
        last = self.events_read + batch.num_rows
        columns = {role: batch.column(name) for role, name in self._roles().items()}
        columns["row"] = pa.array(np.arange(self.events_read, last))
        if self.columns.event is None:
            columns["event"] = pa.repeat(pa.scalar(0, pa.int32()), batch.num_rows)
            return pa.table(columns)
        text = read_text(
            batch.column(self.columns.event), f"{place}, column {self.columns.event!r}"
        )
        self._note_event_types(text)
        columns["event"] = pc.index_in(text, pa.array(self.columns.event_types, pa.string()))
        return pa.table(columns).filter(pc.is_valid(columns["event"]))

    def _roles(self) -> dict[str, str]:
        columns = self.columns
        roles = {"user_id": columns.user, "item_id": columns.item, "time": columns.time}
        return roles | ({} if columns.weight is None else {"weight": columns.weight})

    def _note_event_types(self, text: pa.Array) -> None:
        if len(self.event_types_seen) <= _TYPES_SHOWN:
            kinds = [kind for kind in pc.unique(text).to_pylist() if kind]
            self.event_types_seen |= set(kinds[: _TYPES_SHOWN + 1])

    def _clean(self, table: pa.Table, place: str) -> pa.Table:
        places = {role: f"{place}, column {name!r}" for role, name in self._roles().items()}
        clean = {
            "user_id": read_ids(table["user_id"], self.user_type, places["user_id"]),
            "item_id": read_ids(table["item_id"], self.item_type, places["item_id"]),
            "time": self._times(table["time"], places["time"]),
            "row": table["row"],
            "event": table["event"],
        }
        if self.columns.weight is not None:
            clean["weight"] = read_weights(table["weight"], places["weight"])
        return pa.table(clean)

    def _times(self, column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
        times, cut = read_times(column, place)
        if cut and not self.times_cut:
            self.times_cut = True
            logging.getLogger(__name__).warning(
                "%s has times finer than microseconds, which are rounded down: events of a user "
                "within one microsecond keep the order of the log",
                place,
            )
        return times


def _require_unchanged(filesystem: fs.FileSystem, source: SourceFile) -> None:
    """Refuse a file that is no longer the one that was described when the log was opened."""
    try:
        found, _ = _describe(filesystem, source.path)
    except (OSError, ValueError) as error:
        raise _changed(source.path) from error
    if found != source:
        raise _changed(source.path)


def _changed(path: str) -> ValueError:
    return ValueError(
        f"{path!r} must stay as it is while it is read, got another file in its place or other "
        "content; prepare again when nothing writes to the log"
    )


def _describe(filesystem: fs.FileSystem, path: str) -> tuple[SourceFile, pa.Schema]:
    with filesystem.open_input_file(path) as stream:
        size = stream.size()
        tail = stream.read_at(min(size, _FOOTER_BYTES), size - min(size, _FOOTER_BYTES))
        try:
            file = pq.ParquetFile(stream)
            rows, schema = file.metadata.num_rows, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path!r} must be a complete Parquet file, got an unreadable footer "
                f"({short_message(error)}); it may be truncated: copy it again"
            ) from error
    digest = hashlib.sha256(tail).hexdigest()
    return SourceFile(path=path, bytes=size, rows=rows, footer_sha256=digest), schema


def _batches(
    file: pq.ParquetFile, group: int, names: Sequence[str], place: str
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(names))
    except (pa.ArrowException, OSError) as error:
        column = next((name for name in names if not _decodes(file, group, name)), names[0])
        raise ValueError(
            f"{place}, column {column!r} must be valid Parquet data, got {short_message(error)}; "
            "the file is corrupt or truncated: copy it again"
        ) from error


def _decodes(file: pq.ParquetFile, group: int, name: str) -> bool:
    try:
        for _ in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[name]):
            pass
    except (pa.ArrowException, OSError):
        return False
    return True
