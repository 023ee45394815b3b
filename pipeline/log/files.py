"""The files of an event log: their metadata, and their rows in batches."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.prepared.data_files import partition_values
from shardrec.pipeline.prepared.ids import short_message

__all__ = [
    "LogFile",
    "ParquetLog",
    "SourceFile",
    "WithFolderValues",
    "decoding_remedy",
    "tail_of",
    "unchanged",
]

_TAIL_BYTES = 65_536
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of the log; ``footer_sha256`` digests its last 64 KiB."""

    path: str
    bytes: int
    rows: int
    footer_sha256: str


class LogFile(Protocol):
    """The interface of one file of a log, whatever its format."""

    @property
    def filesystem(self) -> fs.FileSystem:
        """The file system that holds the file."""
        ...

    @property
    def source(self) -> SourceFile:
        """Path, size, number of rows and digest of the file; of a piece, the rows of the piece."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The schema of all columns of the file."""
        ...

    def batches(self, names: Sequence[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Batches of at most ``rows`` rows, each with its location in the log for error messages.

        Raises:
            ValueError: the file cannot be decoded; the message names the column.
        """
        ...

    def pieces(self, rows: int) -> "Sequence[LogFile]":
        """The file in pieces of about ``rows`` rows, in order; itself if it cannot be cut."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParquetLog:
    """A Parquet file; timestamps stored as INT96 are read in microseconds.

    Attributes:
        filesystem: holds the file.
        source: see ``LogFile``.
        schema: see ``LogFile``.
        int96: paths of the columns that are stored as INT96.
        group_rows: number of rows of each row group.
        first_group: first row group to read.
        stop_group: row group after the last one to read.
    """

    filesystem: fs.FileSystem
    source: SourceFile
    schema: pa.Schema
    int96: frozenset[str]
    group_rows: tuple[int, ...]
    first_group: int
    stop_group: int

    @classmethod
    def open(cls, filesystem: fs.FileSystem, path: str) -> "ParquetLog":
        """Read the footer.

        Raises:
            ValueError: it cannot be read.
        """
        with filesystem.open_input_file(path) as stream:
            size, tail = tail_of(stream)
            try:
                file = _parquet(stream)
                rows, schema, footer = file.metadata.num_rows, file.schema_arrow, file.metadata
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                reason = short_message(error)
                remedy = "it may be truncated: copy it again"
                if tail.endswith(b"PARE"):
                    reason, remedy = "encrypted", "write it without encryption"
                raise ValueError(
                    f"{path!r} must be a complete Parquet file, got an unreadable footer "
                    f"({reason}); {remedy}"
                ) from error
            columns = [file.schema.column(index) for index in range(len(file.schema))]
        int96 = frozenset(one.path for one in columns if one.physical_type == "INT96")
        digest = hashlib.sha256(tail).hexdigest()
        source = SourceFile(path=path, bytes=size, rows=rows, footer_sha256=digest)
        groups = range(footer.num_row_groups)
        return cls(
            filesystem=filesystem,
            source=source,
            schema=schema,
            int96=int96,
            group_rows=tuple(footer.row_group(group).num_rows for group in groups),
            first_group=0,
            stop_group=len(groups),
        )

    def pieces(self, rows: int) -> "list[ParquetLog]":
        """The file in pieces of whole row groups; see ``LogFile``."""
        pieces, first, count = [], self.first_group, 0
        for group in range(self.first_group, self.stop_group):
            count += self.group_rows[group]
            if count >= rows or group + 1 == self.stop_group:
                source = dataclasses.replace(self.source, rows=count)
                pieces.append(
                    dataclasses.replace(
                        self, source=source, first_group=first, stop_group=group + 1
                    )
                )
                first, count = group + 1, 0
        return pieces or [self]

    def batches(self, names: Sequence[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Batches of at most ``rows`` rows; see ``LogFile``."""
        int96 = [name for name in names if any(_is_in(path, name) for path in self.int96)]
        with self.filesystem.open_input_file(self.source.path) as stream:
            file = _parquet(stream)
            coarse = _parquet(stream, "ms") if int96 else file
            for group in range(self.first_group, self.stop_group):
                place = f"{self.source.path!r}, row group {group}"
                decoded = _decoded(file, group, names, rows, place)
                if not int96:
                    yield from ((place, batch) for batch in decoded)
                    continue
                checks = _decoded(coarse, group, int96, rows, place)
                for batch, check in zip(decoded, checks, strict=True):
                    for name in int96:
                        _require_same_times(batch.column(name), check.column(name), place, name)
                    yield place, batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WithFolderValues:
    """A file with further columns from the names of its folders, such as ``day=2024-01-31``."""

    file: LogFile
    schema: pa.Schema
    values: dict[str, pa.Scalar]

    @classmethod
    def add(cls, files: Sequence[LogFile], names: Iterable[str]) -> list[LogFile]:
        """The ``files``; one that lacks a column of ``names`` takes it from its folders' names.

        A column is int64 if its values are whole numbers in all folders, else text.
        """
        found = {file.source.path: partition_values(file.source.path) for file in files}
        types = {}
        for name in names:
            texts = [values[name] for values in found.values() if name in values]
            whole = all(text is None or _WHOLE.fullmatch(text) for text in texts)
            types[name] = pa.int64() if whole else pa.string()
        return [cls._add(file, found[file.source.path], types) for file in files]

    @classmethod
    def _add(
        cls, file: LogFile, found: dict[str, str | None], types: dict[str, pa.DataType]
    ) -> LogFile:
        missing = [name for name in types if name in found and name not in file.schema.names]
        if not missing:
            return file
        values, schema = {}, file.schema
        for name in missing:
            values[name] = pc.cast(pa.scalar(found[name], pa.string()), types[name])
            schema = schema.append(pa.field(name, types[name]))
        return cls(file=file, schema=schema, values=values)

    @property
    def filesystem(self) -> fs.FileSystem:
        """Of the file."""
        return self.file.filesystem

    @property
    def source(self) -> SourceFile:
        """Of the file."""
        return self.file.source

    def batches(self, names: Sequence[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Batches of at most ``rows`` rows; see ``LogFile``."""
        inside = [name for name in names if name not in self.values]
        for place, batch in self.file.batches(inside, rows):
            for name, value in self.values.items():
                if name in names:
                    batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
            yield place, batch

    def pieces(self, rows: int) -> "list[WithFolderValues]":
        """Pieces of the file, each with the columns; see ``LogFile``."""
        return [dataclasses.replace(self, file=piece) for piece in self.file.pieces(rows)]


@contextlib.contextmanager
def unchanged(file: LogFile) -> Iterator[None]:
    """Context manager to read a file in: checks before and after that it has not changed.

    Raises:
        ValueError: it has changed, or is gone.
    """
    began = _state(file)
    yield
    if _state(file) != began:
        raise _changed(file)


def _state(file: LogFile) -> int | None:
    """When the file was last written; its size and last bytes must be those of ``source``."""
    source = file.source
    try:
        with file.filesystem.open_input_file(source.path) as stream:
            size, tail = tail_of(stream)
        written: int | None = file.filesystem.get_file_info(source.path).mtime_ns
    except OSError as error:
        raise _changed(file) from error
    if (size, hashlib.sha256(tail).hexdigest()) != (source.bytes, source.footer_sha256):
        raise _changed(file)
    return written


def _changed(file: LogFile) -> ValueError:
    return ValueError(
        f"{file.source.path!r} must stay as it is while it is read, got another file in its place "
        "or other content; prepare again when nothing writes to the log"
    )


def tail_of(stream: Any) -> tuple[int, bytes]:
    """The size of a file and its last 64 KiB."""
    size = stream.size()
    first = max(size - _TAIL_BYTES, 0)
    return size, stream.read_at(size - first, first)


def decoding_remedy(error: Exception) -> str:
    """What to do about values that cannot be decoded, chosen by the text of Arrow's error."""
    text = str(error).lower()
    if "crypt" in text:
        return "the column is encrypted: write the log without encryption"
    if "codec" in text or "lzo" in text:
        return "write the log with another codec, such as zstd or snappy"
    return "the file is corrupt or truncated: copy it again"


def _is_in(path: str, name: str) -> bool:
    """Whether a column of Parquet is the column ``name``, or the values of its lists."""
    return path == name or path.startswith(f"{name}.")


def _parquet(stream: Any, int96_unit: str = "us") -> pq.ParquetFile:
    return pq.ParquetFile(
        stream, coerce_int96_timestamp_unit=int96_unit, page_checksum_verification=True
    )


def _decoded(
    file: pq.ParquetFile, group: int, names: Sequence[str], rows: int, place: str
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(rows, row_groups=[group], columns=list(names))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        column = next((name for name in names if not _decodes(file, group, name)), names[0])
        raise ValueError(
            f"{place}, column {column!r} must be valid Parquet data, got {short_message(error)}; "
            f"{decoding_remedy(error)}"
        ) from error


def _decodes(file: pq.ParquetFile, group: int, name: str) -> bool:
    try:
        for _ in file.iter_batches(65_536, row_groups=[group], columns=[name]):
            pass
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False
    return True


def _require_same_times(fine: pa.Array, coarse: pa.Array, place: str, name: str) -> None:
    """Refuse INT96 times that wrapped in microseconds: the milliseconds then differ."""
    if pa.types.is_nested(fine.type):
        fine, coarse = pc.list_flatten(fine), pc.list_flatten(coarse)
    floored = pc.floor_temporal(fine, unit="millisecond")
    if not pc.cast(floored, coarse.type).equals(coarse):
        raise ValueError(
            f"{place}, column {name!r} must hold times that fit into microseconds, got INT96 "
            "values beyond; drop those rows"
        )
