"""What warehouses write is taken as it is: types, folders, names, addresses, lists, weights."""

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.logs_as_written import columns, expected, prepared, read, sequences, write
from tests.pipeline.object_store import inside, object_store

from shardrec.pipeline.config import parse
from shardrec.pipeline.log.times import parse_time
from shardrec.pipeline.prepare import PrepareConfig

USERS = columns()["user_id"]
ITEMS = columns()["item_id"]
TIMES = columns()["timestamp"]


def test_names_of_folders_are_columns(tmp_path: Path) -> None:
    for kind in ("buy", "view"):
        write(tmp_path / "log" / f"event_type={kind}" / "a.parquet")
    write(tmp_path / "log" / "event_type=__HIVE_DEFAULT_PARTITION__" / "a.parquet")
    options: dict[str, Any] = {"event_column": "event_type", "event_types": ("buy",)}
    manifest = prepared(tmp_path / "log", tmp_path / "out", **options)
    assert sequences(tmp_path / "out") == expected()
    assert manifest.counts["events_other_type"] == 360
    source = f"{tmp_path}/log/event_type=[bv]*/*"
    assert read(source, tmp_path / "glob", **options) == expected()


@pytest.mark.parametrize(
    "days",
    [["2024-01-09", "2024-01-10"], ["9", "10"], ["2024-01-09 08%3A00%3A00", "2024-01-10"]],
    ids=["dates", "numbers", "escaped"],
)
def test_names_of_folders_may_be_the_times(tmp_path: Path, days: list[str]) -> None:
    for part, day in enumerate(days):
        rows = np.arange(180) % 6 // 3 == part
        write(tmp_path / "log" / f"day={day}" / "a.parquet", rows, drop=("timestamp",))
    assert read(tmp_path / "log", tmp_path / "out", time_column="day") == expected()


def test_ids_with_leading_zeros_in_names_of_folders_stay_text(tmp_path: Path) -> None:
    for user in range(30):
        write(tmp_path / "log" / f"u={user:02d}" / "a.parquet", USERS == user, drop=("user_id",))
    found = read(tmp_path / "log", tmp_path / "out", user_column="u")
    assert found == {f"{user:02d}": items for user, items in expected().items()}


def test_a_glob_of_folders_means_the_files_in_them(tmp_path: Path) -> None:
    for part in range(2):
        name = f"day{part}.parquet/part-00000-x.c000.snappy.parquet"
        write(tmp_path / "in" / "log" / name, slice(part * 90, part * 90 + 90))
    for source in ("log", "log/*.parquet", "log/*", "l*", "**/*.parquet", "log/day[01]*"):
        assert read(tmp_path / "in" / source, tmp_path / "out", force=True) == expected()


UUIDS = [uuid.uuid5(uuid.NAMESPACE_OID, str(user)) for user in range(30)]
TAKEN: dict[str, tuple[dict[str, Any], Any]] = {
    "uuid": (
        {"user_id": pa.array([UUIDS[user].bytes for user in USERS], pa.uuid())},
        lambda user: str(UUIDS[user]),
    ),
    "binary": ({"user_id": [b"u\xc3\xbc%d" % user for user in USERS]}, "uü{}".format),
    "large-binary": (
        {"user_id": pa.array([b"%d " % user for user in USERS], pa.large_binary())},
        "{} ".format,
    ),
    "float": ({"user_id": USERS.astype("float64")}, int),
    "float32": ({"user_id": USERS.astype("float32")}, int),
    "decimal": (
        {"user_id": pa.array([decimal.Decimal(int(u)) for u in USERS], pa.decimal128(38, 0))},
        int,
    ),
    "decimal-with-zeros": (
        {"user_id": pa.array([decimal.Decimal(int(u)) for u in USERS], pa.decimal128(12, 2))},
        int,
    ),
    "uint8": ({"user_id": USERS.astype("uint8")}, int),
    "text-with-zeros-and-blanks": (
        {"user_id": [f" 00{user}" for user in USERS]},
        " 00{}".format,
    ),
    "long-text": ({"user_id": [f"{user}" * 9000 for user in USERS]}, lambda user: f"{user}" * 9000),
    "decimal-times": (
        {"timestamp": pa.array([decimal.Decimal(int(t)) for t in TIMES], pa.decimal128(20, 0))},
        int,
    ),
    "negative-times": ({"timestamp": TIMES - 10**15}, int),
    "times-before-1970": ({"timestamp": pa.array(TIMES - 10**10, pa.timestamp("s"))}, int),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_column_of_this_type_is_read_exactly(tmp_path: Path, case: str) -> None:
    changed, name = TAKEN[case]
    log = write(tmp_path / "a.parquet", **changed)
    assert read(log, tmp_path / "out") == {name(user): x for user, x in expected().items()}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction": ({"item_id": ITEMS + 0.5}, "must fit into int64 as whole numbers"),
    "nan": ({"item_id": ITEMS * np.nan}, "must hold whole numbers below"),
    "infinite": ({"item_id": np.where(ITEMS == 9, np.inf, ITEMS)}, "got inf; store them as"),
    "floats beyond 2**53": (
        {"item_id": ITEMS + 2.0**53},
        r"below 2\*\*53 where their type is double",
    ),
    "float32 beyond 2**24": (
        {"item_id": (ITEMS + 2**24).astype("float32")},
        r"below 2\*\*24 where their type is float,",
    ),
    "decimal beyond int64": (
        {"item_id": pa.array([decimal.Decimal(10**30)] * 180, pa.decimal128(38, 0))},
        "must fit into int64",
    ),
    "decimal with a fraction": ({"item_id": [decimal.Decimal("1.5")] * 180}, "whole numbers"),
    "binary that is no text": ({"item_id": [b"\xff%d" % item for item in ITEMS]}, "in UTF-8"),
    "bytes of a fixed size": (
        {"item_id": pa.array([b"abcd"] * 180, pa.binary(4))},
        "must be integer or string, got fixed_size_binary",
    ),
    "nulls alone": ({"item_id": pa.nulls(180)}, "'item_id' must have no nulls, got 180"),
    "null among floats": ({"item_id": pa.array([None, *ITEMS[1:] * 1.0])}, "must have no nulls"),
    "dates as ids": ({"item_id": [datetime.date(2024, 1, 1)] * 180}, "must be integer or string"),
    "digits as times": ({"timestamp": ["1609459200"] * 180}, "cast them to integers"),
    "compact dates": ({"timestamp": ["20191001"] * 180}, "cast them to integers"),
    "day first": ({"timestamp": ["31.12.2019"] * 180}, "must hold times"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_cannot_be_read_exactly_is_refused(tmp_path: Path, case: str) -> None:
    changed, message = REFUSED[case]
    log = write(tmp_path / "a.parquet", **changed)
    with pytest.raises(ValueError, match=message):
        prepared(log, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_uuid_that_is_null_is_refused(tmp_path: Path) -> None:
    ids = pa.array([None, *(UUIDS[user].bytes for user in USERS[1:])], pa.uuid())
    with pytest.raises(ValueError, match="must have no nulls, got 1"):
        prepared(write(tmp_path / "a.parquet", user_id=ids), tmp_path / "out")


def test_a_file_without_rows_may_have_any_types(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.parquet")
    none = {name: pa.array([], pa.null()) for name in columns()}
    pq.write_table(pa.table(none), tmp_path / "log" / "b.parquet")
    pq.write_table(pa.table({"x": pa.array([], pa.int8())}), tmp_path / "log" / "c.parquet")
    assert read(tmp_path / "log", tmp_path / "out") == expected()
    with pytest.raises(ValueError, match="must hold at least one event"):
        prepared(f"{tmp_path}/log/[bc].parquet", tmp_path / "none")


def test_a_column_of_nulls_in_one_file_selects_nothing(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.parquet", kind=["buy"] * 180)
    nulls = {name: pa.nulls(180) for name in ("user_id", "item_id", "timestamp")}
    write(tmp_path / "log" / "b.parquet", kind=pa.nulls(180), **nulls)
    options: dict[str, Any] = {"event_column": "kind", "event_types": ("buy",)}
    assert read(tmp_path / "log", tmp_path / "out", **options) == expected()


@pytest.mark.parametrize(
    ("form", "offset"),
    [
        ("%Y-%m-%d %H:%M:%S UTC", 0),
        ("%Y/%m/%d %H:%M:%S", 0),
        ("%Y/%m/%dT%H:%M:%SZ", 0),
        (" %Y-%m-%d %H:%M:%S.25GMT ", 0),
        ("%Y-%m-%d %H:%M:%S +0200", -7200),
        ("%Y-%m-%d %H:%M:%S -05:30 UTC", 19800),
        ("%Y-%m-%dT%H:%M:%S+01:00[Europe/Berlin]", -3600),
    ],
)
def test_times_are_read_as_exports_spell_them(tmp_path: Path, form: str, offset: int) -> None:
    start = datetime.datetime(2019, 10, 1, tzinfo=datetime.UTC)
    texts = [(start + datetime.timedelta(seconds=int(t))).strftime(form) for t in TIMES]
    log = write(tmp_path / "a.parquet", timestamp=texts)
    cut = prepared(log, tmp_path / "out", split="temporal").split["test_time"]
    seconds = int(start.timestamp()) + sorted(TIMES)[162] + offset
    assert cut == seconds * 10**6 + (250_000 if ".25" in form else 0)


@pytest.mark.parametrize(
    "text",
    ["20240131", "2024-01-31", "2024/01/31", "2024-01-31 00:00:00 UTC", "2024-01-31T01:00+01:00"],
)
def test_a_cut_may_be_typed_as_people_type_dates(tmp_path: Path, text: str) -> None:
    midnight = parse_time("2024-01-31")
    log = write(tmp_path / "a.parquet", timestamp=pa.array(TIMES * 10**6 + midnight - 4 * 10**9,
                                                           pa.timestamp("us")))  # fmt: skip
    typed = parse(int | str | None, text, "--test-time")
    manifest = prepared(log, tmp_path / "out", split="temporal", test_time=typed)
    assert manifest.split["test_time"] == midnight == 1_706_659_200 * 10**6


def test_a_cut_outside_of_the_log_is_refused_with_dates(tmp_path: Path) -> None:
    log = write(tmp_path / "a.parquet", timestamp=pa.array(TIMES + 86_400, pa.timestamp("s")))
    for typed, shown in ((20240101, "2024-01-01T00:00:00Z"), (2024, "1970-01-01T00:00:00.002024Z")):
        with pytest.raises(ValueError, match=rf"1970-01-02T00:00:00Z to .*, got {shown};"):
            prepared(log, tmp_path / "out", split="temporal", test_time=typed)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("purchase (completed)", ("purchase (completed)",)),
        ("(none),[click]", ("(none)", "[click]")),
        ('"add,to,cart", view', ("add,to,cart", "view")),
        ('" view ","say ""hi"""', (" view ", 'say "hi"')),
        ('5" screen', ('5" screen',)),
    ],
)
def test_event_types_are_taken_as_typed(tmp_path: Path, text: str, kinds: tuple[str, ...]) -> None:
    assert parse(tuple[str, ...], text, "--event-types") == kinds
    given = [kinds[user % len(kinds)] if user < 20 else "other" for user in USERS]
    log = write(tmp_path / "a.parquet", kind=given)
    found = read(log, tmp_path / "out", event_column="kind", event_types=kinds)
    assert found == {user: items for user, items in expected().items() if user < 20}


def test_lists_of_numbers_may_still_stand_in_brackets() -> None:
    assert parse(tuple[int, ...], "(5, 10)", "ks") == parse(tuple[int, ...], "[5,10]", "ks")


def test_event_types_may_weigh_their_events(tmp_path: Path) -> None:
    kinds = ["view", "cart", "buy", "a=b", "other", "view"] * 30
    log = write(tmp_path / "a.parquet", kind=kinds, value=np.full(180, 0.5))
    weights = ("view=1", "cart=3", "buy=5", "a=b=0")
    options: dict[str, Any] = {"event_column": "kind", "event_weights": weights}
    manifest = prepared(log, tmp_path / "out", **options)
    train = pq.read_table(tmp_path / "out" / "train").to_pylist()
    assert {tuple(row["weights"]) for row in train} == {(1.0, 3.0, 5.0, 0.0)}
    assert manifest.counts["events_other_type"] == 30
    assert manifest.columns["weight"] == {"name": "kind", "type": "float"}
    prepared(log, tmp_path / "both", weight_column="value", **options)
    train = pq.read_table(tmp_path / "both" / "train").to_pylist()
    assert {tuple(row["weights"]) for row in train} == {(0.5, 1.5, 2.5, 0.0)}


def test_an_event_type_that_never_occurs_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = write(tmp_path / "a.parquet", kind=["buy", "view"] * 90)
    prepared(log, tmp_path / "out", event_column="kind", event_types=("view", "purchse"))
    assert "no event is of type 'purchse', where the log has 'buy', 'view'" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_weights": ("view",)}, "must be type=weight"),
        ({"event_weights": ("view=much",)}, "got 'view=much'"),
        ({"event_weights": ("view=-1",)}, "weights of 0 or more"),
        ({"event_weights": ("a=1", "a=2")}, "must name a type once, got 'a' twice"),
        ({"event_weights": ("a=1",), "event_types": ("a",)}, "must come with no event_types"),
        ({"event_weights": ("a=1",), "event_column": None}, "must come with event_column"),
        ({"ties": "first"}, "log or shuffle"),
        ({"layout": "wide"}, "events or sequences"),
        ({"time_column": None}, "must be set unless layout=sequences and split=leave_one_out"),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, Any], message: str) -> None:
    column = {} if "event_weights" not in options else {"event_column": "kind"}
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"events": "a", "output": "b"} | column | options))


def as_lists(kind: Any = pa.list_) -> dict[str, pa.Array]:
    lists = {"item_id": ITEMS, "timestamp": TIMES, "value": np.ones(180)}
    return {
        name: pa.array(values.reshape(30, 6).tolist(), kind(pa.from_numpy_dtype(values.dtype)))
        for name, values in lists.items()
    } | {"user_id": pa.array(range(30))}


@pytest.mark.parametrize(
    "kind", [pa.list_, pa.large_list, pa.list_view, "fixed"], ids=["list", "large", "view", "fixed"]
)
def test_one_row_a_user_is_a_log(tmp_path: Path, kind: Any) -> None:
    table = pa.table(as_lists((lambda value: pa.list_(value, 6)) if kind == "fixed" else kind))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    options: dict[str, Any] = {"layout": "sequences"}
    assert read(tmp_path / "a.parquet", tmp_path / "out", **options) == expected()
    manifest = prepared(tmp_path / "a.parquet", tmp_path / "w", weight_column="value", **options)
    assert manifest.counts["events_read"] == 180
    plain = write(tmp_path / "plain.parquet")
    expected_files = prepared(plain, tmp_path / "plain").files
    assert prepared(tmp_path / "a.parquet", tmp_path / "out", **options).files == expected_files


def test_lists_without_times_keep_their_order_and_rows_of_one_user_are_joined(
    tmp_path: Path,
) -> None:
    rows = {"user_id": [1, 2, 1, 3, 4], "item_id": [[9, 2, 2], [5, 6, 7], [1, 4], [], None]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    options: dict[str, Any] = {"layout": "sequences", "time_column": None}
    found = read(tmp_path / "a.parquet", tmp_path / "out", **options)
    assert found == {1: [9, 2, 2, 1, 4], 2: [5, 6, 7]}


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"timestamp": [[1]] * 30}, {"layout": "sequences"}, "got 6 in 'item_id' and 1 in 'times"),
        ({"timestamp": [1] * 30}, {"layout": "sequences"}, "'timestamp' of .* must be a list for"),
        ({}, {}, "'item_id' of .* must hold one id, got list.*; for one row a user add --layout"),
        ({"item_id": [[1, None, 2, 3, 4, 5]] * 30}, {"layout": "sequences"}, "no nulls, got 30"),
    ],
    ids=["lengths", "no-list", "no-layout", "null"],
)
def test_lists_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(as_lists() | changed), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "a.parquet", tmp_path / "out", **options)


def test_an_address_may_hold_blanks_and_other_characters(tmp_path: Path) -> None:
    write(tmp_path / "trip data" / "a#1 ü.parquet")
    write(tmp_path / "trip data" / "ts=2024-01-01 00%3A00" / "b.parquet")
    for source in ("trip data/a#1 ü.parquet", "trip%20data/*.parquet", "trip data/a*"):
        assert read(f"file://{tmp_path}/{source}", tmp_path / "out", force=True) == expected()
    literal = f"file://{tmp_path}/trip data/ts=2024-01-01 00%3A00"
    assert read(literal, tmp_path / "literal") == expected()


@pytest.mark.slow
def test_an_object_store_may_be_called_s3a_and_hold_escaped_names(tmp_path: Path) -> None:
    log = write(tmp_path / "a.parquet")
    with object_store("logs") as address:
        from pyarrow import fs

        system, bucket = fs.FileSystem.from_uri(address)
        folder = f"{bucket.rstrip('/')}/trip data/ts=2024-01-01 00%3A00%3A00"
        with system.open_output_stream(f"{folder}/a.parquet") as file:
            file.write(Path(log).read_bytes())
        s3a = address.replace("s3://", "s3a://")
        for path in ("trip data", "trip data/ts=2024-01-01 00%3A00%3A00/a.parquet"):
            assert read(inside(s3a, path), tmp_path / "out", force=True) == expected()


def test_an_encrypted_log_is_refused_as_such(tmp_path: Path) -> None:
    log = Path(write(tmp_path / "a.parquet"))
    log.write_bytes(b"PARE" + log.read_bytes()[4:-4] + b"PARE")
    with pytest.raises(ValueError, match=r"\(encrypted\); write it without encryption"):
        prepared(log, tmp_path / "out")
