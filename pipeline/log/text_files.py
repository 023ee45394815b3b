"""CSV and JSON lines as files of a log, compressed or not.

CSV has no types, so a first pass infers them: a column is int64 if all rows of all files hold whole
numbers, or numbers that all end in .0 or .00; otherwise it is text, unchanged. The types of JSON
lines are those of the first megabytes; a later value of another type is an error.
"""

import codecs
import collections
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.fs as fs
import pyarrow.json as json

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.files import SourceFile, tail_of
from shardrec.pipeline.prepared.data_files import FileKind
from shardrec.pipeline.prepared.ids import short_message

__all__ = ["CsvLog", "JsonLog"]

_BLOCK_BYTES = 8 << 20
_DELIMITERS = ",;\t|"
_NULLS = ["", "NULL", "null", r"\N"]
_BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_WHOLE = r"^\s*(0|-?[1-9][0-9]{0,17})\s*$"
_WHOLE_FLOAT = r"^\s*(0|-?[1-9][0-9]{0,14})\.00?\s*$"  # 1.000 may be a thousand


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CsvLog:
    """A CSV file with a header, separated by commas, semicolons, tabs or bars, in UTF-8 or -16."""

    filesystem: fs.FileSystem
    kind: FileKind
    source: SourceFile
    schema: pa.Schema
    delimiter: str
    encoding: str

    @classmethod
    def open(
        cls,
        filesystem: fs.FileSystem,
        path: str,
        kind: FileKind,
        columns: EventColumns,
    ) -> "CsvLog":
        """Read the file once, to find the types of the columns to read.

        Args:
            filesystem: holds the file.
            path: path of the file.
            kind: format and codec of the file.
            columns: the columns to read; all others are text in the schema.

        Raises:
            ValueError: it cannot be read.
        """
        source = _describe(filesystem, path)
        with _errors_of(path), _opened(filesystem, path, kind) as stream:
            start = stream.read(_BLOCK_BYTES)
        encoding = _BYTE_ORDER_MARKS.get(start[:2], "utf8")
        header = start.decode(encoding, errors="replace").lstrip("\ufeff").partition("\n")[0]
        file = cls(
            filesystem=filesystem,
            kind=kind,
            source=source,
            schema=pa.schema([]),
            delimiter=_delimiter(header),
            encoding=encoding,
        )
        with _errors_of(path), _opened(filesystem, path, kind) as stream:
            if not _has_closed_quotes(stream, file.delimiter, encoding):
                raise ValueError(
                    f"{path!r} must double quotes inside of quoted values, got one that goes on "
                    "after its closing quote, or has none; write it without an escape character "
                    "(for Spark, escape='\"'), or as Parquet"
                )
        with _errors_of(path), file._reader() as reader:
            header_names = reader.schema.names
        rows, types = file._types(columns, header_names)
        fields = [pa.field(name, types.get(name, pa.string())) for name in header_names]
        return dataclasses.replace(
            file, source=dataclasses.replace(source, rows=rows), schema=pa.schema(fields)
        )

    def with_texts(self, names: Collection[str]) -> "CsvLog":
        """The file with these columns as text, because they hold more than numbers elsewhere."""
        fields = [
            field.with_type(pa.string()) if field.name in names else field for field in self.schema
        ]
        return dataclasses.replace(self, schema=pa.schema(fields))

    def batches(self, names: Sequence[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Batches of at most ``rows`` rows; see ``LogFile``."""
        place = repr(self.source.path)
        types = [self.schema.field(name).type for name in names]
        with _errors_of(self.source.path):
            for batch in _sliced(self._texts(names), rows):
                columns = [_cast(*pair) for pair in zip(batch.columns, types, strict=True)]
                yield place, pa.RecordBatch.from_arrays(columns, list(names))

    def pieces(self, rows: int) -> "list[CsvLog]":
        """The file, which cannot be cut; see ``LogFile``."""
        return [self]

    def _types(
        self, columns: EventColumns, header: Sequence[str]
    ) -> tuple[int, Mapping[str, pa.DataType]]:
        """The number of rows, and the types of the columns that are not text."""
        names = [name for name in columns.names() if header.count(name) == 1]
        numbers = {columns.weight} & set(names)
        rows, whole, floats = 0, set(names), set(names)
        if columns.event not in numbers:  # an event type is text, even 01
            whole, floats = whole - {columns.event}, floats - {columns.event}
        for batch in self._texts(names or header[:1]):
            rows += batch.num_rows
            for kept, pattern in ((whole, _WHOLE), (floats, _WHOLE_FLOAT)):
                kept -= {name for name in kept if not _all_match(batch.column(name), pattern)}
        types = dict.fromkeys(floats, pa.float64()) | dict.fromkeys(numbers, pa.float64())
        return rows, types | dict.fromkeys(whole, pa.int64())

    def _texts(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _errors_of(self.source.path), self._reader(names) as reader:
            yield from reader

    def _reader(self, names: Sequence[str] = ()) -> csv.CSVStreamingReader:
        return csv.open_csv(
            _opened(self.filesystem, self.source.path, self.kind),
            read_options=csv.ReadOptions(block_size=_BLOCK_BYTES, encoding=self.encoding),
            parse_options=csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                include_columns=list(names) or None,
                column_types=dict.fromkeys(names, pa.string()),
                null_values=_NULLS,
                strings_can_be_null=True,
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JsonLog:
    """A file with one JSON object per line."""

    filesystem: fs.FileSystem
    kind: FileKind
    source: SourceFile
    schema: pa.Schema

    @classmethod
    def open(cls, filesystem: fs.FileSystem, path: str, kind: FileKind) -> "JsonLog":
        """Read the first megabytes for the types, and count the rows.

        Raises:
            ValueError: it cannot be read.
        """
        source = _describe(filesystem, path)
        with _errors_of(path):
            with _json_reader(filesystem, path, kind) as reader:
                schema = reader.schema
            first = schema.names[:1]
            file = cls(filesystem=filesystem, kind=kind, source=source, schema=schema)
            rows = sum(batch.num_rows for _, batch in file.batches(first, _BLOCK_BYTES))
        return dataclasses.replace(file, source=dataclasses.replace(source, rows=rows))

    def batches(self, names: Sequence[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Batches of at most ``rows`` rows; see ``LogFile``."""
        path, asked = self.source.path, pa.schema([self.schema.field(name) for name in names])
        with _errors_of(path), _json_reader(self.filesystem, path, self.kind, asked) as reader:
            for batch in _sliced(reader, rows):
                yield repr(path), batch.select(list(names))

    def pieces(self, rows: int) -> "list[JsonLog]":
        """The file, which cannot be cut; see ``LogFile``."""
        return [self]


def _describe(filesystem: fs.FileSystem, path: str) -> SourceFile:
    with filesystem.open_input_file(path) as stream:
        size, tail = tail_of(stream)
    return SourceFile(path=path, bytes=size, rows=0, footer_sha256=hashlib.sha256(tail).hexdigest())


def _opened(filesystem: fs.FileSystem, path: str, kind: FileKind) -> Any:
    stream = filesystem.open_input_file(path)
    return stream if kind.codec is None else pa.CompressedInputStream(stream, kind.codec)


def _json_reader(
    filesystem: fs.FileSystem, path: str, kind: FileKind, schema: pa.Schema | None = None
) -> Any:
    """A streaming reader of all fields, or of those of ``schema``."""
    if not hasattr(json, "open_json"):
        raise ValueError(
            f"{path!r} must be Parquet or CSV for pyarrow {pa.__version__}, got JSON lines; "
            "install a newer pyarrow"
        )
    return json.open_json(
        _opened(filesystem, path, kind),
        read_options=json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=json.ParseOptions(
            explicit_schema=schema,
            unexpected_field_behavior="infer" if schema is None else "ignore",
        ),
    )


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Context manager: errors of Arrow become a ValueError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path!r} must be complete CSV with a header, or JSON lines, in UTF-8, got "
            f"{short_message(error)}; correct that row, or write the file again"
        ) from error


def _delimiter(header: str) -> str:
    """The most frequent delimiter outside of quotes.

    Example:
        >>> _delimiter('Kunde;"Name, Vorname";Zeit')
        ';'
    """
    plain = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=plain.count)


def _has_closed_quotes(stream: Any, delimiter: str, encoding: str) -> bool:
    """Whether every value that begins with a quote ends with one, and holds only doubled ones.

    Arrow takes what follows a closing quote as a part of the value, and a quote that is never
    closed, or closed by a backslash and a quote, takes in the rows up to the next one.
    """
    edge = re.escape(delimiter.encode()) + rb"\r\n"
    begin = rb'(?<![^%b])"' % edge
    closed = rb'[^"]*(?:""[^"]*)*"(?=[%b])' % edge
    value = re.compile(rb"%b(?:%b|(?P<open>(?s:.*)))" % (begin, closed))
    decode = codecs.getincrementaldecoder("utf-16")("replace").decode
    rest = b"\n"
    while block := stream.read(_BLOCK_BYTES):
        rest += block if encoding == "utf8" else decode(block).encode()
        rest = rest.replace(codecs.BOM_UTF8, b"", 1)
        opened = _open_value(value, rest)
        # A quote at the end that opens nothing stands inside of a value; so must what follows it.
        rest = rest[-1:].replace(b'"', b"-") if opened is None else b"\n" + opened
        if len(rest) > 2 * _BLOCK_BYTES:
            return False
    return _open_value(value, rest + b"\n") is None


def _open_value(value: re.Pattern[bytes], text: bytes) -> bytes | None:
    """From the quote of the value on that does not end properly in the text, if there is one."""
    if b'"' not in text:
        return None
    last = collections.deque(value.finditer(text), maxlen=1)  # an open one takes in all the rest
    return last[0][0] if last and last[0]["open"] is not None else None


def _all_match(column: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False)


def _cast(column: pa.Array, dtype: pa.DataType) -> pa.Array:
    return column if dtype == pa.string() else pc.cast(pc.utf8_trim_whitespace(column), dtype)


def _sliced(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)
