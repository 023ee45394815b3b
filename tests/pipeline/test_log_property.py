"""Any log is read exactly, or refused by name: logs of random types, formats and values."""

import csv
import dataclasses
import datetime
import decimal
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.sort import SortOptions, sort_log
from shardrec.pipeline.prepared.data_files import natural_order

COLUMNS = EventColumns(user="user_id", item="item_id", time="timestamp")
OPTIONS = SortOptions(memory_limit="200MB", threads=1, seed=0, keep_duplicates=True)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

numbers = st.integers(0, 2**63 - 1) | st.integers(0, 12) | st.integers(2**53 - 2, 2**53 + 2)
texts = st.text(max_size=5) | st.sampled_from(["007", "7", " 7", "1.0", "é", "NULL", "", "a,b"])
moments = st.datetimes(
    datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31), timezones=st.just(datetime.UTC)
)

# Name of a column's type -> the values, how Parquet stores them, and what they are read as.
IDS: dict[str, tuple[Any, Any, Any]] = {
    "int64": (numbers, lambda v: pa.array(v, pa.int64()), int),
    "uint64": (numbers, lambda v: pa.array(v, pa.uint64()), int),
    "double": (numbers, lambda v: pa.array([float(x) for x in v]), int),
    "float": (st.integers(0, 2**25), lambda v: pa.array(np.array(v, np.float32)), int),
    "decimal": (
        numbers,
        lambda v: pa.array([decimal.Decimal(x) for x in v], pa.decimal128(38, 0)),
        int,
    ),
    "string": (texts, lambda v: pa.array(v, pa.string()), str),
    "dictionary": (texts, lambda v: pa.array(v, pa.string()).dictionary_encode(), str),
    "large_string": (texts, lambda v: pa.array(v, pa.large_string()), str),
    "binary": (texts, lambda v: pa.array([x.encode() for x in v], pa.binary()), str),
    "uuid": (st.uuids(), lambda v: pa.array([x.bytes for x in v], pa.uuid()), str),
}


def microseconds(moment: datetime.datetime) -> int:
    return (moment - EPOCH) // datetime.timedelta(microseconds=1)


def whole_seconds(moment: datetime.datetime) -> int:
    return (moment - EPOCH) // datetime.timedelta(seconds=1) * 10**6


TIMES: dict[str, tuple[Any, Any, Any]] = {
    "int64": (st.integers(-(2**63), 2**63 - 1), lambda v: pa.array(v, pa.int64()), int),
    "double": (st.integers(-(2**54), 2**54), lambda v: pa.array([float(x) for x in v]), int),
    "us": (moments, lambda v: pa.array(v, pa.timestamp("us", "UTC")), microseconds),
    "ns": (
        st.datetimes(
            datetime.datetime(1700, 1, 1),
            datetime.datetime(2200, 1, 1),
            timezones=st.just(datetime.UTC),
        ),
        lambda v: pa.array(v, pa.timestamp("ns", "Asia/Tokyo")),
        microseconds,
    ),
    "text": (moments, lambda v: pa.array([x.isoformat() for x in v]), microseconds),
    "UTC": (
        moments,
        lambda v: pa.array([f"{x.replace(microsecond=0, tzinfo=None)} UTC" for x in v]),
        whole_seconds,
    ),
}


@st.composite
def logs(draw: st.DrawFn) -> tuple[dict[str, pa.Array], list[tuple[Any, Any, int]]]:
    """Columns as Parquet stores them, and the events that they mean."""
    kinds = draw(st.tuples(*(st.sampled_from(sorted(kind)) for kind in (IDS, IDS, TIMES))))
    stored, meant, count = {}, [], draw(st.integers(1, 12))
    for name, table, kind in zip(COLUMNS.names(), (IDS, IDS, TIMES), kinds, strict=True):
        values, write, read = table[kind]
        pool = draw(st.lists(values, min_size=1, max_size=4))
        chosen = draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count))
        stored[name] = write(chosen)
        meant.append([read(value) for value in chosen])
    return stored, list(zip(*meant, strict=True))


def in_order(events: list[tuple[Any, Any, int]]) -> dict[Any, list[tuple[Any, int]]]:
    """user -> (item, time) by time and then by place in the log: what the log means."""
    users: dict[Any, list[tuple[Any, int]]] = {}
    for user, item, time in sorted(events, key=lambda event: event[2]):
        users.setdefault(user, []).append((item, time))
    return users


def sorted_events(
    source: str, folder: Path, columns: EventColumns
) -> dict[Any, list[tuple[Any, int]]]:
    log = sort_log(EventLog.open(source, columns), folder, OPTIONS)
    users, items = log.user_ids.to_pylist(), log.item_ids.to_pylist()
    found: dict[Any, list[tuple[Any, int]]] = {user: [] for user in users}
    for block in log.blocks():
        for user, item, time in zip(block.user, block.item, block.time, strict=True):
            found[users[user]].append((items[item], int(time)))
    return found


def require_exact_or_refused(
    write: Any,
    events: list[tuple[Any, Any, int]],
    *,
    text: bool = False,
    columns: EventColumns = COLUMNS,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "log")
        source.mkdir()
        write(source)
        Path(folder, "work").mkdir()
        try:
            found = sorted_events(str(source), Path(folder, "work"), columns)
        except ValueError as error:
            assert " must " in str(error) and str(source) in str(error), error
            return
    expected = in_order(events)
    if text:
        expected = in_order([(_typed(u, events, 0), _typed(i, events, 1), t) for u, i, t in events])
    assert found == expected


def _typed(value: Any, events: list[tuple[Any, Any, int]], place: int) -> Any:
    """CSV has no types: a column of whole numbers alone, all with .0 or none, is numbers."""
    column = [str(event[place]) for event in events]
    for zeros in ("", r"\.00?"):
        whole = re.compile(rf"[ \t\n\r\f]*(0|-?[1-9][0-9]{{0,14}}){zeros}[ \t\n\r\f]*")
        if all(whole.fullmatch(text) for text in column):
            return int(float(value))
    return str(value)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(log=logs(), cut=st.integers(0, 12))
def test_any_parquet_log_is_read_exactly_or_refused(
    log: tuple[dict[str, pa.Array], list[tuple[Any, Any, int]]], cut: int
) -> None:
    stored, events = log

    def write(folder: Path) -> None:
        table = pa.table(stored)
        pq.write_table(table.slice(0, cut), folder / "part-2", row_group_size=3)
        pq.write_table(table.slice(cut), folder / "part-10.PARQUET", row_group_size=3)

    require_exact_or_refused(write, events)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    events=st.lists(
        st.tuples(texts.filter(str.strip), st.integers(0, 9), st.integers(-(10**12), 10**12)),
        min_size=1,
        max_size=12,
    )
)
def test_any_json_log_is_read_exactly_or_refused(events: list[tuple[str, int, int]]) -> None:
    def write(folder: Path) -> None:
        lines = (json.dumps(dict(zip(COLUMNS.names(), event, strict=True))) for event in events)
        (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")

    require_exact_or_refused(write, events)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    events=st.lists(
        st.tuples(texts, texts, st.integers(-(10**12), 10**12)), min_size=1, max_size=12
    ),
    delimiter=st.sampled_from(",;\t|"),
)
def test_any_csv_log_is_read_exactly_or_refused(
    events: list[tuple[str, str, int]], delimiter: str
) -> None:
    def write(folder: Path) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerows([COLUMNS.names(), *events])
        (folder / "a.csv").write_text(text.getvalue(), encoding="utf-8", newline="")

    require_exact_or_refused(write, events, text=True)


lists_of_users = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.tuples(texts, st.integers(-(2**63), 2**63 - 1)), max_size=5),
    ),
    min_size=1,
    max_size=6,
).filter(lambda rows: any(events for _, events in rows))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(rows=lists_of_users, kind=st.sampled_from([pa.list_, pa.large_list]))
def test_any_log_of_lists_is_read_exactly_or_refused(
    rows: list[tuple[int, list[tuple[str, int]]]], kind: Any
) -> None:
    events = [(user, item, time) for user, listed in rows for item, time in listed]

    def write(folder: Path) -> None:
        columns = {
            "user_id": [user for user, _ in rows],
            "item_id": pa.array([[i for i, _ in listed] for _, listed in rows], kind(pa.string())),
            "timestamp": pa.array([[t for _, t in listed] for _, listed in rows], kind(pa.int64())),
        }
        pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=2)

    require_exact_or_refused(write, events, columns=dataclasses.replace(COLUMNS, is_lists=True))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["1", "01", "a b", "é", "12"]), st.integers()),
        min_size=1,
        max_size=12,
    )
)
def test_any_log_with_items_in_the_names_of_its_folders_is_read_exactly_or_refused(
    events: list[tuple[int, str, int]],
) -> None:
    events = [(user, item, time % 2**40) for user, item, time in events]
    items = sorted({item for _, item, _ in events})
    whole = all(re.fullmatch("0|[1-9][0-9]*", item) for item in items)
    events.sort(
        key=lambda event: natural_order([f"item_id={item}" for item in items]).index(
            f"item_id={event[1]}"
        )
    )

    def write(folder: Path) -> None:
        for item in items:
            chosen = [(user, time) for user, one, time in events if one == item]
            users, times = zip(*chosen, strict=True)
            (folder / f"item_id={item}").mkdir()
            table = pa.table({"user_id": users, "timestamp": times})
            pq.write_table(table, folder / f"item_id={item}" / "a.parquet")

    meant = [(user, int(item) if whole else item, time) for user, item, time in events]
    require_exact_or_refused(write, meant)
