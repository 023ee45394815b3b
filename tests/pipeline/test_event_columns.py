"""Values of the log's columns: what each becomes, and what is refused."""

from typing import Any

import pyarrow as pa
import pytest

from shardrec.pipeline.log.columns import (
    EventColumns,
    check_columns,
    read_ids,
    same_kind,
)
from shardrec.pipeline.log.times import read_times
from shardrec.pipeline.prepared.ids import plain_text, require_ids

DAY_US = 86_400 * 10**6
COLUMNS = EventColumns(user="u", item="i", time="t", event="kind", event_types=("buy",))
SCHEMA = pa.schema([(name, pa.int64()) for name in ("u", "i", "t", "kind")])


def chunked(values: list[Any], dtype: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, dtype)])


def unchecked_text(values: list[bytes], dtype: pa.DataType) -> pa.ChunkedArray:
    """Text as a careless writer stores it."""
    binary = pa.array(values, pa.binary() if dtype == pa.string() else pa.large_binary())
    return pa.chunked_array([pa.Array.from_buffers(dtype, len(values), binary.buffers())])


TIMES: dict[str, tuple[pa.ChunkedArray, list[int], bool]] = {
    "no-zone": (chunked(["1970-01-02T00:00:01"]), [DAY_US + 10**6], False),
    "utc": (
        chunked(["1970-01-02T00:00:01Z", "1970-01-02 00:00Z"]),
        [DAY_US + 10**6, DAY_US],
        False,
    ),
    "offset": (
        chunked(["1970-01-02T02:00:00+02:00", "1970-01-01T21:30:00.5-0230", "1970-01-02 00+00"]),
        [DAY_US, DAY_US + 500_000, DAY_US],
        False,
    ),
    "some-have-a-zone": (
        chunked(["1970-01-02", "1970-01-02T00:00:00", "1970-01-02T01:00:00+01:00"]),
        [DAY_US] * 3,
        False,
    ),
    "many-decimals": (
        chunked(["1970-01-01T00:00:00.1234569", "1970-01-01T00:00:00.123456789Z"]),
        [123_456] * 2,
        True,
    ),
    "categories": (chunked(["1970-01-02"]).dictionary_encode(), [DAY_US], False),
    "large-text": (chunked(["1970-01-02Z"[:-1]], pa.large_string()), [DAY_US], False),
    "whole-ns": (chunked([-1000, 0, 5000], pa.timestamp("ns")), [-1, 0, 5], False),
    "ns": (chunked([-1, 999, 1001], pa.timestamp("ns")), [-1, 0, 1], True),
    "ns-with-a-zone": (
        # The hour that Berlin had twice: wall clocks are no way to round.
        chunked([1698541200000000001, 1698544800000000001], pa.timestamp("ns", "Europe/Berlin")),
        [1698541200000000, 1698544800000000],
        True,
    ),
    "seconds": (chunked([1], pa.timestamp("s", "UTC")), [10**6], False),
    "numbers": (chunked([-(2**63), 2**63 - 1]), [-(2**63), 2**63 - 1], False),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_are_whole_microseconds_of_utc(name: str) -> None:
    given, expected, cut = TIMES[name]
    times, was_cut = read_times(given, "here")
    assert (times.type, times.to_pylist(), was_cut) == (pa.int64(), expected, cut)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "1970-01-02T00:00:00 CET", "1970-01-02Z", "1970-01-02T00:00:00+25:00"]
    + ["1970-01-02 00:00:00[Europe/Berlin]", "1970-01-02T23:59:60", "1970-01-02 08:00:00 PM"]
    + ["1970-1-2", "1970-01-02T00:00:00,5", "10000-01-01"],
)
def test_a_time_that_cannot_be_read_says_what_can(text: str) -> None:
    for before in ("1970-01-02", "1970-01-02T00:00:00Z"):
        with pytest.raises(ValueError, match=r"^here must hold times, .* \(Z, UTC or \+02:00 may"):
            read_times(chunked([before, text]), "here")


@pytest.mark.parametrize("dtype", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "categories"])
def test_ids_that_are_not_utf8_are_shown(dtype: pa.DataType, encoded: bool) -> None:
    column = unchecked_text([b"fine", b"\xe9t\xe9"], dtype)
    column = column.dictionary_encode() if encoded else column
    with pytest.raises(
        ValueError, match=r"^here must hold text in UTF-8, got b'\\xe9t\\xe9'; decode"
    ):
        read_ids(column, "here")


def test_text_of_any_type_becomes_strings() -> None:
    for given in (["é", None], [b"\xc3\xa9", None]):
        assert plain_text(chunked(given), "here").to_pylist() == ["é", None]
    assert plain_text(chunked([7, None]), "here").to_pylist() == ["7", None]
    with pytest.raises(ValueError, match=r"got b'\\xff'"):
        plain_text(chunked([b"ok", b"\xff"]), "here")


@pytest.mark.parametrize(
    ("dtype", "is_fine"),
    [
        (pa.string(), True),
        (pa.dictionary(pa.int8(), pa.string()), True),
        (pa.int8(), True),
        (pa.bool_(), True),
        (pa.timestamp("us"), True),
        (pa.binary(), True),
        (pa.list_(pa.int64()), False),
        (pa.struct([("a", pa.int64())]), False),
        (pa.map_(pa.string(), pa.int64()), False),
    ],
    ids=str,
)
def test_event_types_must_be_single_values(dtype: pa.DataType, is_fine: bool) -> None:
    schema = SCHEMA.set(3, pa.field("kind", dtype))
    if is_fine:
        check_columns("log", schema, COLUMNS)
        return
    with pytest.raises(ValueError, match="column 'kind' of 'log' must hold single values"):
        check_columns("log", schema, COLUMNS)


def test_a_column_that_is_missing_or_there_twice_is_named_with_its_option() -> None:
    with pytest.raises(ValueError, match=r"'log': --item-column must be .* got 'i'; known names: "):
        check_columns("log", SCHEMA.remove(1), COLUMNS)
    with pytest.raises(ValueError, match="'log' must have one column 'u', got 2; rename all but"):
        check_columns("log", SCHEMA.append(pa.field("u", pa.string())), COLUMNS)
    twice_unread = SCHEMA.append(pa.field("x", pa.int8())).append(pa.field("x", pa.int8()))
    check_columns("log", twice_unread, COLUMNS)
    assert same_kind({"log": twice_unread}, "u", require_ids) == "int64"
