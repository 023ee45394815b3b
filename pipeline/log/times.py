"""Event times of every kind, as integers: microseconds since 1970, or the log's own numbers."""

import datetime

import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.prepared.ids import (
    is_text,
    plain_text,
    short_message,
    value_type,
    whole_numbers,
)

__all__ = ["as_date", "date_of_digits", "parse_time", "read_times", "time_kind", "unix_unit"]

_MICROSECONDS = pa.timestamp("us")
_ZONE = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"
_FINER_THAN_MICROSECONDS = r"(\.\d{6})\d+"
# How exports write what ISO 8601 writes otherwise, and the ISO form.
_SPELLINGS = (
    (r"^\s+|\s+$", ""),
    (r"^(\d{4})/(\d{2})/(\d{2})", r"\1-\2-\3"),
    (r"(Z|[+-]\d{2}:?\d{2})\[[A-Za-z0-9_+/-]+\]$", r"\1"),  # Java's name of the zone
    (r"(:\d{2}(?:\.\d+)?) ([+-]\d{2}(?::?\d{2})?)(?: [A-Z]{1,5})?$", r"\1\2"),
    (r"(:\d{2}(?:\.\d+)?) ?(?:UTC|GMT|utc|z)$", r"\1Z"),
)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_DATE_DIGITS = 8
_UNITS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}  # microseconds of each
_RECENT = (631_152_000_000_000, 4_102_444_800_000_000)  # 1990 and 2100, in microseconds


def time_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of a time column: "int64" (of unknown unit) or "timestamp[us]".

    Raises:
        ValueError: the type cannot hold times, or is a float type too coarse to tell seconds apart.
    """
    value = value_type(dtype)
    if pa.types.is_float32(value) or pa.types.is_float16(value):
        raise ValueError(
            f"column {name!r} of {path!r} must hold times of a type that tells seconds apart, got "
            f"{dtype}, whose steps are 128 s in 2024; write them as integers or timestamps"
        )
    if pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_decimal(value):
        return "int64"
    if pa.types.is_timestamp(value) or pa.types.is_date(value) or is_text(value):
        return "timestamp[us]"
    raise ValueError(
        f"column {name!r} of {path!r} must be integer, timestamp, date or ISO text, got {dtype}; "
        "convert the times"
    )


def read_times(column: pa.ChunkedArray, place: str) -> tuple[pa.ChunkedArray, bool]:
    """(n,) times as int64, and whether any of them was rounded down to microseconds.

    Numbers are unchanged; timestamps, dates and text become microseconds since 1970, in UTC if
    they have no zone or offset.

    Raises:
        ValueError: a time is a fraction, out of range, or cannot be parsed.
    """
    dtype = value_type(column.type)
    if time_kind(dtype, "time", place) == "int64":
        return whole_numbers(column, place), False
    try:
        plain = pc.cast(column, dtype)
        return _parse(plain_text(plain, place)) if is_text(dtype) else _whole_microseconds(plain)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{place} must hold times, got {short_message(error)}; use timestamps, dates, text "
            "such as 2024-01-31T08:00:00 (Z, UTC or +02:00 may follow), or, for numbers that are "
            "stored as text, whole numbers: cast them to integers"
        ) from error


def parse_time(text: str) -> int:
    """Microseconds since 1970 of a time that a user typed; UTC if it has no offset.

    Example:
        >>> parse_time("1970-01-02") == parse_time("1970/01/02 01:00:00 +01:00") == 86_400_000_000
        True

    Raises:
        ValueError: the text is no time.
    """
    try:
        return int(read_times(pa.chunked_array([[text]], pa.string()), "time")[0][0].as_py())
    except ValueError:
        moment = datetime.datetime.fromisoformat(text.strip())
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return (moment - _EPOCH) // _MICROSECOND


def date_of_digits(number: int) -> int | None:
    """Microseconds since 1970 of a date typed as 20240131; None for any other number."""
    text = str(number)
    try:
        return parse_time(text) if len(text) == _DATE_DIGITS and 19000101 <= number else None
    except ValueError:
        return None


def as_date(microseconds: int) -> str:
    """The time as ISO text in UTC; the number itself outside the years 1 to 9999.

    Example:
        >>> as_date(86_400_000_000)
        '1970-01-02T00:00:00Z'
    """
    try:
        return (_EPOCH + microseconds * _MICROSECOND).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return str(microseconds)


def unix_unit(first: int, last: int) -> tuple[str, float] | None:
    """The unit, and its microseconds, in which both numbers are of 1990 to 2100; None for none.

    Example:
        >>> unix_unit(1_630_298_749, 1_630_298_750), unix_unit(1, 7)
        (('s', 1000000.0), None)
    """
    for unit, scale in _UNITS.items():
        if _RECENT[0] <= int(first * scale) and int(last * scale) <= _RECENT[1]:
            return unit, scale
    return None


def _parse(text: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    try:
        return pc.cast(pc.cast(text, _MICROSECONDS), pa.int64()), False
    except pa.ArrowInvalid:  # Arrow parses neither offsets nor more than six decimals here.
        pass
    iso = text
    for spelling, form in _SPELLINGS:
        iso = pc.replace_substring_regex(iso, spelling, form)
    short = pc.replace_substring_regex(iso, _FINER_THAN_MICROSECONDS, r"\1")
    has_zone, null = pc.match_substring_regex(short, _ZONE), pa.scalar(None, text.type)
    zoned = pc.cast(pc.if_else(has_zone, short, null), pa.timestamp("us", tz="UTC"))
    plain = pc.cast(pc.if_else(has_zone, null, short), _MICROSECONDS)
    times = pc.coalesce(pc.cast(zoned, pa.int64()), pc.cast(plain, pa.int64()))
    return times, not short.equals(iso)


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
