"""Check the column types of an event log in its footers, and its values as they are read."""

import dataclasses
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.config import unknown_name
from shardrec.pipeline.prepared.parquet_files import is_text, value_type

_MICROSECONDS = pa.timestamp("us")
_ZONE = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"
_FINER_THAN_MICROSECONDS = r"(\.\d{6})\d+"
LARGEST_WEIGHT = 1e30  # sums of a batch must fit float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """Names of the columns of the log to read.

    Attributes:
        user: user ids.
        item: item ids.
        time: event times.
        event: event types; None reads every row.
        event_types: values of ``event`` to keep.
        weight: weights of the targets, or None.
    """

    user: str
    item: str
    time: str
    event: str | None = None
    event_types: tuple[str, ...] = ()
    weight: str | None = None

    def options(self) -> dict[str, str]:
        """The column names by the option that sets each, in a fixed order."""
        asked = {"user": self.user, "item": self.item, "time": self.time}
        asked |= {} if self.event is None else {"event": self.event}
        asked |= {} if self.weight is None else {"weight": self.weight}
        return {f"--{role}-column": name for role, name in asked.items()}

    def names(self) -> list[str]:
        """The column names without repetition, in a fixed order."""
        return list(dict.fromkeys(self.options().values()))


def check_columns(path: str, schema: pa.Schema, columns: EventColumns) -> None:
    """Raise ValueError for a missing column, a repeated one, or event types of a nested type."""
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
    """The kind of a column, after checking that it is the same in all files.

    Raises:
        ValueError: two files differ, or ``kind`` refuses the type in one of them.
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


def time_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of times: "int64", of an unknown unit, or "timestamp[us]"."""
    value = value_type(dtype)
    if pa.types.is_integer(value) or pa.types.is_floating(value):
        return "int64"
    if pa.types.is_timestamp(value) or pa.types.is_date(value) or is_text(value):
        return "timestamp[us]"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer, timestamp, date or ISO text, got {dtype}; "
        "convert the times"
    )


def weight_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of weights: "float" for every numeric type."""
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return "float"
    raise ValueError(
        f"column {name!r} of {path!r} must be numeric, got {dtype}; convert the weights"
    )


def _check_event_type(dtype: pa.DataType, name: str, path: str) -> None:
    try:
        pc.cast(pa.array([], value_type(dtype)), pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"column {name!r} of {path!r} must hold single values such as text or integers, got "
            f"{dtype}; convert the event types"
        ) from error


def read_ids(column: pa.ChunkedArray, kind: str, place: str) -> pa.ChunkedArray:
    """The ids as non-negative int64 or as strings, by ``kind`` ("int64" or "string").

    Raises:
        ValueError: an id is null, negative, beyond int64, or not UTF-8; the message starts with
            ``place``.
    """
    _check_no_nulls(column, place)
    if kind == "string":
        return read_text(column, place)
    try:
        column = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must fit into int64, got {short_message(error)}; store such ids as strings"
        ) from error
    low = pc.min(column).as_py()
    if low is not None and low < 0:
        raise ValueError(
            f"{place} must hold ids of 0 or more, got {low}; "
            "drop rows with placeholder ids, or store the ids as strings"
        )
    return column


def read_text(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The values as strings; nulls stay nulls.

    Raises:
        ValueError: a value is not UTF-8, which Parquet does not guarantee.
    """
    unchecked = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    text = pc.cast(column, options=unchecked)
    try:
        text.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must hold text in UTF-8, got {_first_invalid(text)!r}; decode such "
            "values in their own encoding, or drop the rows"
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
    """The times as int64, and whether any was rounded down to microseconds.

    Numbers stay as they are; timestamps, dates and text become microseconds since 1970. Without a
    zone or offset they are in UTC.

    Raises:
        ValueError: a time is null, a fraction, out of range, or cannot be parsed.
    """
    _check_no_nulls(column, place)
    dtype = value_type(column.type)
    try:
        plain = pc.cast(column, dtype)
        if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
            return pc.cast(plain, pa.int64()), False
        return _parse(read_text(plain, place)) if is_text(dtype) else _whole_microseconds(plain)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{place} must hold times, got {short_message(error)}; use whole numbers, timestamps, "
            "dates or text such as 2024-01-31T08:00:00 (Z or +02:00 may follow)"
        ) from error


def _parse(text: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    try:
        return pc.cast(pc.cast(text, _MICROSECONDS), pa.int64()), False
    except pa.ArrowInvalid:  # Arrow parses neither offsets nor more than six decimals here.
        short = pc.replace_substring_regex(text, _FINER_THAN_MICROSECONDS, r"\1")
    has_zone, null = pc.match_substring_regex(short, _ZONE), pa.scalar(None, pa.string())
    zoned = pc.cast(pc.if_else(has_zone, short, null), pa.timestamp("us", tz="UTC"))
    plain = pc.cast(pc.if_else(has_zone, null, short), _MICROSECONDS)
    times = pc.coalesce(pc.cast(zoned, pa.int64()), pc.cast(plain, pa.int64()))
    return times, not short.equals(text)


def _whole_microseconds(stamps: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    """Timestamps and dates in microseconds since 1970, rounded down."""
    if not pa.types.is_timestamp(stamps.type):
        return pc.cast(pc.cast(stamps, _MICROSECONDS), pa.int64()), False
    counts = pc.cast(stamps, pa.int64())  # in UTC, whatever the zone
    given = pc.cast(counts, pa.timestamp(stamps.type.unit))
    floored = given
    if stamps.type.unit == "ns":
        floored = pc.floor_temporal(given, unit="microsecond")
    return pc.cast(pc.cast(floored, _MICROSECONDS), pa.int64()), not floored.equals(given)


def read_weights(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The weights as float32.

    Raises:
        ValueError: a weight is null, negative, not finite, or so large that sums would not be.
    """
    _check_no_nulls(column, place)
    weights = pc.cast(column, pa.float32(), safe=False)
    small = pc.and_(pc.is_finite(weights), pc.less_equal(weights, LARGEST_WEIGHT))
    wrong = pc.invert(pc.and_(small, pc.greater_equal(weights, 0.0)))
    if pc.any(wrong).as_py():
        value = weights.filter(wrong)[0].as_py()
        raise ValueError(
            f"{place} must hold finite weights of 0 or more, and at most {LARGEST_WEIGHT:g}, got "
            f"{value}; fix or drop those rows"
        )
    return weights


def _check_no_nulls(column: pa.ChunkedArray, place: str) -> None:
    if column.null_count:
        raise ValueError(
            f"{place} must have no nulls, got {column.null_count}; drop those rows or fill them"
        )


def short_message(error: Exception) -> str:
    """The first line of the error's message."""
    return str(error).split("\n", 1)[0]
