"""The columns of an event log: their types checked in the footer, their values as they are read."""

import dataclasses
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.config import unknown_name

_MICROSECONDS = pa.timestamp("us")
_ZONE = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"
_FINER_THAN_MICROSECONDS = r"(\.\d{6})\d+"


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

    def options(self) -> dict[str, str]:
        """The columns to read, by the option that names each, in a fixed order."""
        asked = {"user": self.user, "item": self.item, "time": self.time}
        asked |= {} if self.event is None else {"event": self.event}
        asked |= {} if self.weight is None else {"weight": self.weight}
        return {f"--{role}-column": name for role, name in asked.items()}

    def names(self) -> list[str]:
        """The columns to read, each once, in a fixed order."""
        return list(dict.fromkeys(self.options().values()))


def check_columns(path: str, schema: pa.Schema, columns: EventColumns) -> None:
    """Refuse a file that lacks a column, has it twice, or has event types of no single value."""
    for option, name in columns.options().items():
        count = schema.names.count(name)
        if not count:
            raise ValueError(f"{path!r}: " + unknown_name(option, name, schema.names))
        if count > 1:
            raise ValueError(
                f"{path!r} must have one column {name!r}, got {count}; rename all but one"
            )
    if columns.event is not None:
        _check_event_type(schema.field(columns.event).type, columns.event, path)


def same_kind(
    schemas: Mapping[str, pa.Schema], name: str, kind: Callable[[pa.DataType, str, str], str]
) -> str:
    """What ``kind`` says of the column in every file.

    Raises:
        ValueError: it says different things, or raises itself.
    """
    kinds = {path: kind(schema.field(name).type, name, path) for path, schema in schemas.items()}
    first = next(iter(kinds))
    for path, found in kinds.items():
        if found != kinds[first]:
            raise ValueError(
                f"column {name!r} must have one type in all files, got {kinds[first]} in {first!r} "
                f"and {found} in {path!r}; convert one of them"
            )
    return kinds[first]


def id_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """What ids are kept as: "int64" or "string"."""
    value = _value_type(dtype)
    if pa.types.is_integer(value):
        return "int64"
    if _is_text(value):
        return "string"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer or string, got {dtype}; convert the ids"
    )


def time_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """What times are: "int64", of a unit that we do not know, or "timestamp[us]"."""
    value = _value_type(dtype)
    if pa.types.is_integer(value) or pa.types.is_floating(value):
        return "int64"
    if pa.types.is_timestamp(value) or pa.types.is_date(value) or _is_text(value):
        return "timestamp[us]"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer, timestamp, date or ISO text, got {dtype}; "
        "convert the times"
    )


def weight_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """What weights are: "float"."""
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return "float"
    raise ValueError(
        f"column {name!r} of {path!r} must be numeric, got {dtype}; convert the weights"
    )


def _check_event_type(dtype: pa.DataType, name: str, path: str) -> None:
    try:
        pc.cast(pa.array([], _value_type(dtype)), pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"column {name!r} of {path!r} must hold single values such as text or integers, got "
            f"{dtype}; convert the event types"
        ) from error


def _value_type(dtype: pa.DataType) -> pa.DataType:
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def _is_text(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view()
    )


def read_ids(column: pa.ChunkedArray, kind: str, place: str) -> pa.ChunkedArray:
    """The ids as int64 of 0 or more, or as strings.

    Args:
        column: as stored.
        kind: what ``id_kind`` says.
        place: file, row group and column, for messages.

    Raises:
        ValueError: an id is null, negative, beyond int64, or not UTF-8.
    """
    _check_no_nulls(column, place)
    if kind == "string":
        return read_text(column, place)
    try:
        column = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must fit into int64, got {first_line(error)}; store such ids as strings"
        ) from error
    low = pc.min(column).as_py()
    if low is not None and low < 0:
        raise ValueError(
            f"{place} must hold ids of 0 or more, got {low}; "
            "drop rows with placeholder ids, or store the ids as strings"
        )
    return column


def read_text(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The values as strings, nulls as nulls.

    Raises:
        ValueError: a value is not UTF-8; Parquet does not promise that it is.
    """
    unchecked = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    text = pc.cast(column, options=unchecked)
    try:
        text.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must hold text in UTF-8, got {_first_invalid(text)!r}; decode such values "
            "as what they are, or drop the rows"
        ) from error
    return text


def _first_invalid(text: pa.ChunkedArray) -> bytes | None:
    for value in pc.cast(text, pa.binary()).to_pylist():
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return bytes(value)
    return None


def read_times(column: pa.ChunkedArray, place: str) -> tuple[pa.ChunkedArray, bool]:
    """The times as int64, in microseconds since 1970 where they are no numbers.

    Text without an offset is taken for UTC, as timestamps without a zone are.

    Returns:
        The times, and whether some were finer than microseconds, which is cut off.

    Raises:
        ValueError: a time is null, a fraction, beyond the range, or cannot be read.
    """
    _check_no_nulls(column, place)
    dtype = _value_type(column.type)
    try:
        plain = pc.cast(column, dtype)
        if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
            return pc.cast(plain, pa.int64()), False
        return _parse(read_text(plain, place)) if _is_text(dtype) else _whole_microseconds(plain)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{place} must hold times, got {first_line(error)}; use whole numbers, timestamps, "
            "dates or text such as 2024-01-31T08:00:00 (Z or +02:00 may follow)"
        ) from error


def _parse(text: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    try:
        return pc.cast(pc.cast(text, _MICROSECONDS), pa.int64()), False
    except pa.ArrowInvalid:  # some have an offset or more decimals
        short = pc.replace_substring_regex(text, _FINER_THAN_MICROSECONDS, r"\1")
    has_zone, null = pc.match_substring_regex(short, _ZONE), pa.scalar(None, pa.string())
    zoned = pc.cast(pc.if_else(has_zone, short, null), pa.timestamp("us", tz="UTC"))
    plain = pc.cast(pc.if_else(has_zone, null, short), _MICROSECONDS)
    times = pc.coalesce(pc.cast(zoned, pa.int64()), pc.cast(plain, pa.int64()))
    return times, not short.equals(text)


def _whole_microseconds(stamps: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    """Of timestamps and dates, rounded down."""
    if not pa.types.is_timestamp(stamps.type):
        return pc.cast(pc.cast(stamps, _MICROSECONDS), pa.int64()), False
    counts = pc.cast(stamps, pa.int64())  # a zone changes nothing: the counts are of UTC
    given = pc.cast(counts, pa.timestamp(stamps.type.unit))
    floored = given
    if stamps.type.unit == "ns":
        floored = pc.floor_temporal(given, unit="microsecond")
    return pc.cast(pc.cast(floored, _MICROSECONDS), pa.int64()), not floored.equals(given)


def read_weights(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The weights as float32.

    Raises:
        ValueError: one is null, negative or not finite.
    """
    _check_no_nulls(column, place)
    weights = pc.cast(column, pa.float32(), safe=False)
    wrong = pc.invert(pc.and_(pc.is_finite(weights), pc.greater_equal(weights, 0.0)))
    if pc.any(wrong).as_py():
        value = weights.filter(wrong)[0].as_py()
        raise ValueError(
            f"{place} must hold finite weights of 0 or more, got {value}; "
            "correct or drop those rows"
        )
    return weights


def _check_no_nulls(column: pa.ChunkedArray, place: str) -> None:
    if column.null_count:
        raise ValueError(
            f"{place} must have no nulls, got {column.null_count}; drop those rows or fill them"
        )


def first_line(error: Exception) -> str:
    """Of the message."""
    return str(error).split("\n", 1)[0]
