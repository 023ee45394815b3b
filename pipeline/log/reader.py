"""Read an event log: find its files, check every value, return tables of one schema.

The tables have the columns ``user_id`` and ``item_id`` (int64 or large_string), ``time`` (int64),
``row`` (int64, position in the log: files in natural order, rows in file order), ``event`` (int32,
index into the kept event types; 0 without a filter) and ``weight`` (float32, only with weights).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.log.columns import (
    EventColumns,
    check_columns,
    read_event_types,
    read_ids,
    read_weights,
    require_no_nulls,
    same_kind,
    weight_kind,
)
from shardrec.pipeline.log.files import (
    LogFile,
    ParquetLog,
    SourceFile,
    WithFolderValues,
    unchanged,
)
from shardrec.pipeline.log.lists import exploded
from shardrec.pipeline.log.text_files import CsvLog, JsonLog
from shardrec.pipeline.log.times import read_times, time_kind
from shardrec.pipeline.prepared.data_files import Found, find_files, partition_values
from shardrec.pipeline.prepared.ids import require_ids

__all__ = ["EventLog", "SourceFile"]

_BATCH_ROWS = 65_536
_BATCH_LISTS = 1024
_CHUNK_ROWS = 491_520
_TYPES_SHOWN = 10
_NAMES_SHOWN = 3
_MOST_EVENTS = 1 << 40  # of a piece of lists, to number the events of the next one

# Like ``map``.
Apply = Callable[[Callable[[str], LogFile], Iterable[str]], Iterable[LogFile]]


@dataclasses.dataclass(kw_only=True, slots=True)
class EventLog:
    """An event log with checked column types; ``tables()`` reads it.

    Attributes:
        inputs: the files, in natural order.
        columns: the columns to read.
        user_type: kind of the user ids, "int64" or "string".
        item_type: kind of the item ids, "int64" or "string".
        time_type: "int64", or "timestamp[us]" when the log holds timestamps, dates or ISO text.
        passed_over: visible files next to those of the log that hold no events and are not read.
        events_read: events read so far, before the event-type filter.
        event_types_seen: some of the event types read so far, for messages.
        event_types_found: indices of the kept event types that were read so far.
        times_cut: whether any time read so far had to be rounded down to a microsecond.
    """

    inputs: tuple[LogFile, ...]
    columns: EventColumns
    user_type: str
    item_type: str
    time_type: str
    passed_over: tuple[str, ...] = ()
    events_read: int = 0
    event_types_seen: set[str] = dataclasses.field(default_factory=set)
    event_types_found: set[int] = dataclasses.field(default_factory=set)
    times_cut: bool = False

    @classmethod
    def open(cls, source: str, columns: EventColumns, apply: "Apply" = map) -> "EventLog":
        """Find the files of ``source`` and check their column types; reads CSV files once.

        Args:
            source: as ``find_files`` takes it.
            columns: the columns to read.
            apply: opens the files: the results of a function for many arguments, in order.

        Raises:
            FileNotFoundError: there is no file of a log.
            ValueError: a file cannot be read, or a column is missing or of an unsuitable type.
        """
        found = find_files(source)
        inputs = _open_files(found, columns, apply)
        # A writer without rows may not know its types.
        with_rows = [file for file in inputs if file.source.rows]
        schemas = {
            file.source.path: check_columns(file.source.path, file.schema, columns)
            for file in with_rows
        }
        if columns.weight is not None:
            same_kind(schemas, columns.weight, weight_kind)
        time = columns.time
        log = cls(
            inputs=tuple(inputs),
            columns=columns,
            user_type=same_kind(schemas, columns.user, require_ids),
            item_type=same_kind(schemas, columns.item, require_ids),
            time_type="int64" if time is None else same_kind(schemas, time, time_kind),
            passed_over=found.passed_over,
        )
        log._report_passed_over()
        return log

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Path, size, number of rows and digest of each file, in natural order."""
        return tuple(file.source for file in self.inputs)

    def tables(self) -> Iterator[pa.Table]:
        """Tables of about half a million events each, in the order of the log.

        Raises:
            ValueError: a value is invalid, or a file cannot be decoded or has changed since
                ``open``; the message names file, row group and column.
        """
        pending: list[pa.Table] = []
        for table in self.small_tables():
            pending.append(table)
            if sum(part.num_rows for part in pending) >= _CHUNK_ROWS:
                yield pa.concat_tables(pending)
                pending = []
        if pending:
            yield pa.concat_tables(pending)
        self.report_missing_types()

    def small_tables(self) -> Iterator[pa.Table]:
        """The same in tables of at most 65,536 rows of the log; nothing is reported at the end."""
        for file in self.inputs:
            if file.source.rows:
                yield from self._file_tables(file)

    def parts(self, rows: int) -> list["EventLog"]:
        """The log as logs of about ``rows`` rows, whose events are numbered in one order.

        Lists are not counted before they are read, so the numbers of their events have gaps.
        """
        pieces = [piece for file in self.inputs for piece in file.pieces(rows)]
        counts = [piece.source.rows for piece in pieces]
        if self.columns.is_lists:
            counts = [_MOST_EVENTS] * len(pieces)
        firsts = np.cumsum([0, *counts]).tolist()
        return [
            dataclasses.replace(
                self,
                inputs=(piece,),
                events_read=first,
                event_types_seen=set(),
                event_types_found=set(),
            )
            for piece, first in zip(pieces, firsts, strict=False)
        ]

    def add(self, part: "EventLog", first: int) -> None:
        """Take over what a part has seen that was read from event ``first`` on."""
        self.events_read += part.events_read - first
        self.event_types_seen |= part.event_types_seen
        self.event_types_found |= part.event_types_found
        self.times_cut |= part.times_cut

    def describe_event_types(self) -> str:
        """Some of the event types read so far, for messages."""
        seen = sorted(self.event_types_seen)
        shown = ", ".join(repr(kind) for kind in seen[:_TYPES_SHOWN])
        return (shown or "nulls only") + (", …" if len(seen) > _TYPES_SHOWN else "")

    def _file_tables(self, file: LogFile) -> Iterator[pa.Table]:
        rows = _BATCH_LISTS if self.columns.is_lists else _BATCH_ROWS
        with unchanged(file):
            for place, batch in file.batches(self.columns.names(), rows):
                if self.columns.is_lists:
                    batch = exploded(batch, self.columns.user, place)
                yield self._clean(self._select(batch, place), place)
                self.events_read += batch.num_rows

    def _select(self, batch: pa.RecordBatch, place: str) -> pa.Table:
        """The columns, named by role, for events of the wanted types."""
        last = self.events_read + batch.num_rows
        columns = {role: batch.column(name) for role, name in self._roles().items()}
        columns["row"] = pa.array(np.arange(self.events_read, last))
        if self.columns.event is None:
            columns["event"] = pa.repeat(pa.scalar(0, pa.int32()), batch.num_rows)
            return pa.table(columns)
        kinds = pa.chunked_array([batch.column(self.columns.event)])
        text = read_event_types(kinds, f"{place}, column {self.columns.event!r}")
        self._note_event_types(text)
        columns["event"] = pc.index_in(text, pa.array(self.columns.event_types, text.type))
        self.event_types_found.update(pc.unique(columns["event"].drop_null()).to_pylist())
        return pa.table(columns).filter(pc.is_valid(columns["event"]))

    def _roles(self) -> dict[str, str]:
        columns = self.columns
        roles = {"user_id": columns.user, "item_id": columns.item}
        roles |= {} if columns.time is None else {"time": columns.time}
        return roles | ({} if columns.weight is None else {"weight": columns.weight})

    def _note_event_types(self, text: pa.ChunkedArray) -> None:
        if len(self.event_types_seen) <= _TYPES_SHOWN:
            kinds = [kind for kind in pc.unique(text).to_pylist() if kind]
            self.event_types_seen |= set(kinds[: _TYPES_SHOWN + 1])

    def _clean(self, table: pa.Table, place: str) -> pa.Table:
        if not table.num_rows:
            return self._schema().empty_table()
        places = {role: f"{place}, column {name!r}" for role, name in self._roles().items()}
        clean = {
            "user_id": read_ids(table["user_id"], places["user_id"]),
            "item_id": read_ids(table["item_id"], places["item_id"]),
            "time": table["row"] if self.columns.time is None else self._times(table, places),
            "row": table["row"],
            "event": table["event"],
        }
        if self.columns.has_weights:
            clean["weight"] = self._weights(table, places)
        return pa.table(clean)

    def _schema(self) -> pa.Schema:
        ids = {"int64": pa.int64(), "string": pa.large_string()}
        fields = {"user_id": ids[self.user_type], "item_id": ids[self.item_type]}
        fields |= {"time": pa.int64(), "row": pa.int64(), "event": pa.int32()}
        return pa.schema(fields | ({"weight": pa.float32()} if self.columns.has_weights else {}))

    def _weights(self, table: pa.Table, places: Mapping[str, str]) -> pa.ChunkedArray:
        """The weights (float32): of the column, of the event types, or the product of both."""
        if not self.columns.type_weights:
            return read_weights(table["weight"], places["weight"])
        of_types = pa.array(self.columns.type_weights, pa.float32()).take(table["event"])
        if self.columns.weight is None:
            return of_types
        return pc.multiply(of_types, read_weights(table["weight"], places["weight"]))

    def _times(self, table: pa.Table, places: Mapping[str, str]) -> pa.ChunkedArray:
        place = places["time"]
        require_no_nulls(table["time"], place)
        times, cut = read_times(table["time"], place)
        if cut and not self.times_cut:
            self.times_cut = True
            logging.getLogger(__name__).warning(
                "%s has times finer than microseconds, which are rounded down: events of a user "
                "within one microsecond keep the order of the log",
                place,
            )
        return times

    def report_missing_types(self) -> None:
        """Warn of event types that no event read so far has."""
        kinds = enumerate(self.columns.event_types)
        missing = [kind for index, kind in kinds if index not in self.event_types_found]
        if missing and self.event_types_found:  # none at all is an error
            logging.getLogger(__name__).warning(
                "no event is of type %s, where the log has %s",
                ", ".join(map(repr, missing)),
                self.describe_event_types(),
            )

    def _report_passed_over(self) -> None:
        if self.passed_over:
            names = [path.rpartition("/")[2] for path in self.passed_over[:_NAMES_SHOWN]]
            logging.getLogger(__name__).warning(
                "%d file(s) without events passed over: %s",
                len(self.passed_over),
                ", ".join(names) + (", …" if len(self.passed_over) > _NAMES_SHOWN else ""),
            )


def read_schema(source: str) -> pa.Schema:
    """The columns of the log's first file with rows, and those in the names of its folders.

    Raises:
        FileNotFoundError: there is no file of a log.
        ValueError: the file cannot be read.
    """
    found = find_files(source)
    nothing = EventColumns(user="", item="", time=None)
    for path in found.paths:
        one = dataclasses.replace(found, kinds={path: found.kinds[path]})
        (file,) = _open_files(one, nothing)
        if file.source.rows or path == found.paths[-1]:
            break
    named = [key for key in partition_values(path) if key not in file.schema.names]
    return WithFolderValues.add([file], named)[0].schema


def _open_files(found: Found, columns: EventColumns, apply: Apply = map) -> list[LogFile]:
    """The files with their schemas; columns that only their folders' names hold are added."""
    files = list(apply(functools.partial(_open_file, found, columns), found.paths))
    files = _with_common_types(files, columns.names())
    return WithFolderValues.add(files, columns.names())


def _open_file(found: Found, columns: EventColumns, path: str) -> LogFile:
    kind = found.kinds[path]
    if kind.format == "csv":
        return CsvLog.open(found.filesystem, path, kind, columns)
    if kind.format == "json":
        return JsonLog.open(found.filesystem, path, kind)
    return ParquetLog.open(found.filesystem, path)


def _with_common_types(files: Sequence[LogFile], names: Sequence[str]) -> list[LogFile]:
    """CSV files with text wherever one of them has text; those without rows have no say."""
    schemas = [file.schema for file in files if file.source.rows]
    texts = [
        name
        for name in names
        if any(
            schema.names.count(name) == 1 and schema.field(name).type == pa.string()
            for schema in schemas
        )
    ]
    return [file.with_texts(texts) if isinstance(file, CsvLog) else file for file in files]
