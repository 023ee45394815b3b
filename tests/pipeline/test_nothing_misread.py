"""Logs that look right and would be read wrongly: read exactly, or refused with the reason."""

import datetime
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.logs_as_written import columns, expected, prepared, read, sequences, write

from shardrec.launch.cli import main
from shardrec.pipeline.log.files import decoding_remedy
from shardrec.pipeline.prepared.data_files import find_files, natural_order
from shardrec.pipeline.prepared.ids import stored

ORDER: Any = "little"  # of the bytes of DuckDB's md5_number
NO_END = datetime.datetime(9999, 12, 31)


def test_int96_times_beyond_nanoseconds_keep_their_order(tmp_path: Path) -> None:
    start = datetime.datetime(2024, 1, 1)
    times = [start + datetime.timedelta(seconds=int(t)) for t in columns()["timestamp"]]
    times[5::6] = [NO_END] * 30
    times[0::6] = [datetime.datetime(1, 1, 1)] * 30
    table = pa.table(columns() | {"timestamp": pa.array(times, pa.timestamp("us"))})
    log = tmp_path / "int96.parquet"
    pq.write_table(table, log, use_deprecated_int96_timestamps=True)
    assert "int96" in str(pq.ParquetFile(log).schema)
    assert read(log, tmp_path / "out") == expected()


def test_int96_times_in_lists_are_checked_too(tmp_path: Path) -> None:
    for base, log in ((253_402_300_000, tmp_path / "a.parquet"), (10**13, tmp_path / "b.parquet")):
        times = (columns()["timestamp"] + base).reshape(30, 6).tolist()
        lists = {
            "user_id": range(30),
            "item_id": columns()["item_id"].reshape(30, 6).tolist(),
            "timestamp": pa.array(times, pa.list_(pa.timestamp("s"))),
        }
        pq.write_table(pa.table(lists), log, use_deprecated_int96_timestamps=True)
    assert read(tmp_path / "a.parquet", tmp_path / "out", layout="sequences") == expected()
    with pytest.raises(ValueError, match="'timestamp' must hold times that fit into microseconds"):
        prepared(tmp_path / "b.parquet", tmp_path / "no", layout="sequences")


def test_int96_times_beyond_microseconds_are_refused(tmp_path: Path) -> None:
    times = pa.array(columns()["timestamp"] + 10**13, pa.timestamp("s"))
    table = pa.table(columns() | {"timestamp": times})
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    with pytest.raises(ValueError, match="'timestamp' must hold times that fit into microseconds"):
        prepared(tmp_path / "a.parquet", tmp_path / "out")


def test_parquet_is_known_by_its_first_bytes_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["part-0.parquet", "part-1.PARQUET", "part-2.parquet.snappy", "000003_0", "data.csv"]
    for number, name in enumerate(names):
        write(tmp_path / "log" / name, slice(number * 36, (number + 1) * 36))
    (tmp_path / "log" / "README.md").write_text("what this is")
    (tmp_path / "log" / "manifest.json").write_text("{}")
    for marker in ("_SUCCESS", ".part-0.parquet.crc", "done"):
        (tmp_path / "log" / marker).touch()
    manifest = prepared(tmp_path / "log", tmp_path / "out")
    assert sequences(tmp_path / "out") == expected()
    assert (manifest.counts["files_read"], manifest.counts["files_passed_over"]) == (5, 2)
    assert "2 file(s) without events passed over: README.md, manifest.json" in caplog.text


def test_an_empty_file_that_should_be_parquet_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.parquet")
    (tmp_path / "log" / "b.parquet").touch()
    with pytest.raises(ValueError, match="b.parquet' must be a complete Parquet file"):
        prepared(tmp_path / "log", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.orc", b"ORC....", "got ORC; write it as Parquet"),
        ("part-0", b"Obj\x01....", "got Avro; write it as Parquet"),
        ("a.feather", b"ARROW1..", "got Arrow; write it as Parquet"),
        ("a.csv.xz", b"\xfd7zXZ\0..", "got xz; write it as Parquet"),
        ("a.parquet.gz", b"\x1f\x8b......", "got gzip; write it as Parquet"),
        ("b.csv", b"user_id,item_id\n", "must be files of one format, got csv .* and parquet"),
    ],
)
def test_events_of_a_format_that_is_not_read_are_not_passed_over(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write(tmp_path / "log" / "z.parquet")
    (tmp_path / "log" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "log", tmp_path / "out")
    assert read(f"{tmp_path}/log/z*.parquet", tmp_path / "out") == expected()


def delta(folder: Path) -> None:
    (folder / "_delta_log").mkdir(parents=True)
    (folder / "_delta_log" / "0.json").write_text('{"remove": {"path": "part-0.parquet"}}')


def hudi(folder: Path) -> None:
    (folder / ".hoodie").mkdir(parents=True)


def iceberg(folder: Path) -> None:
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "00001-a.metadata.json").write_text("{}")


@pytest.mark.parametrize("make", [delta, hudi, iceberg])
def test_a_table_with_deleted_rows_is_refused_however_it_is_named(
    tmp_path: Path, make: Any
) -> None:
    table = tmp_path / "table"
    make(table)
    write(table / "data" / "day=1" / "part-0.parquet")
    for source in ("table", "table/data", "table/*/*/*.parquet", "t*", "table/data/day=1"):
        with pytest.raises(ValueError, match="must be plain files, got .* of the table .*table'"):
            prepared(tmp_path / source, tmp_path / "out")
    with pytest.raises(ValueError, match="write its current rows"):
        prepared(table / "data" / "day=1" / "part-0.parquet", tmp_path / "out")
    write(tmp_path / "plain" / "a.parquet")
    assert read(f"{tmp_path}/p*", tmp_path / "out") == expected()


@pytest.mark.parametrize("dtype", [pa.float32(), pa.float16()], ids=str)
def test_times_of_too_coarse_a_type_are_refused(tmp_path: Path, dtype: pa.DataType) -> None:
    times = pa.array((columns()["timestamp"] % 2000).astype(np.float64)).cast(dtype)
    log = write(tmp_path / "a.parquet", timestamp=times)
    with pytest.raises(ValueError, match="of a type that tells seconds apart"):
        prepared(log, tmp_path / "out")


def test_float_times_whose_neighbours_collapse_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "a.parquet", timestamp=columns()["timestamp"] + 1.7e18)
    with pytest.raises(ValueError, match=r"whole numbers below 2\*\*53 .* got 1.7e\+18"):
        prepared(log, tmp_path / "out")


def test_ties_follow_the_numbers_in_the_names_of_files(tmp_path: Path) -> None:
    day = [datetime.date(2024, 1, 1)] * 180
    for part, hour in enumerate((1, 2, 10)):
        rows = np.arange(180) % 6 // 2 == part
        write(tmp_path / "log" / f"h={hour}" / "a.parquet", rows, timestamp=day)
    assert read(tmp_path / "log", tmp_path / "out") == expected()


def test_only_numbers_of_different_lengths_sort_otherwise_than_text() -> None:
    names = ["part-2", "part-10", "part-002", "a", "a2", "a.parquet", "a-b/x", "a/x", "a1/x", "Z"]
    names += ["é", "a/-", "a/1", "part-", "part-.x", "day=2024-01-31", "day=2024-02-01"]
    assert natural_order(names) != sorted(names)
    same = [name for name in names if name not in ("part-10", "part-002")]
    assert natural_order(same) == sorted(same)
    assert natural_order(["x10", "x9", "x09"]) == ["x09", "x9", "x10"]


def test_ties_repeats_and_duplicates_are_counted_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [(1, 7, 1), (1, 7, 1), (1, 8, 1), (1, 8, 2), (2, 8, 3), (2, 9, 4), (2, 9, 5)]
    user, item, time = zip(*events, strict=True)
    log = write(tmp_path / "a.parquet", slice(7), user_id=_padded(user), item_id=_padded(item),
                timestamp=_padded(time))  # fmt: skip
    manifest = prepared(log, tmp_path / "out")
    names = ["events_duplicated", "duplicates_dropped", "events_tied_in_time"]
    names += ["events_repeating_an_item", "repeats_dropped"]
    assert [manifest.counts[name] for name in names] == [1, 1, 2, 2, 0]
    kept = prepared(log, tmp_path / "kept", keep_duplicates=True)
    assert [kept.counts[name] for name in names] == [1, 0, 3, 3, 0]
    output = str(tmp_path / "printed")
    words = ["--split", "leave_one_out", "--validation", "none"]
    assert main(["prepare", "--events", log, "--output", output, *words]) == 0
    printed = capsys.readouterr().out
    assert "14.3 % of the events equal an earlier one (--keep-duplicates keeps them)" in printed
    assert "28.6 % of the events share their time with another of the user" in printed
    assert "28.6 % of the events have the item of the user's event before" in printed


def test_places_in_a_session_are_not_taken_for_a_clock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = write(tmp_path / "ticks.parquet", timestamp=columns()["timestamp"] // 1000)
    prepared(ticks, tmp_path / "out", split="temporal")
    assert "100 % of the users begin at time 0" in caplog.text
    caplog.clear()
    prepared(write(tmp_path / "times.parquet"), tmp_path / "real", split="temporal")
    assert "begin at time" not in caplog.text


def _padded(values: Any) -> np.ndarray[Any, Any]:
    return np.append(np.array(values), np.zeros(173, int))


def test_repeats_are_dropped_across_parts_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrec.pipeline.log.sort._ARROW_ROWS", 2048)
    items = np.repeat(columns()["item_id"][::2], 2)
    log = write(tmp_path / "a.parquet", item_id=items)
    manifest = prepared(log, tmp_path / "out", drop_repeats=True)
    assert sequences(tmp_path / "out") == {
        user: items[user * 6 : user * 6 + 6 : 2].tolist() for user in range(30)
    }
    assert manifest.counts["repeats_dropped"] == manifest.counts["events_repeating_an_item"] == 90


def test_shuffled_ties_do_not_depend_on_the_order_of_the_log(tmp_path: Path) -> None:
    times = np.arange(180) % 6 // 3
    log = write(tmp_path / "a.parquet", timestamp=times)
    back = write(tmp_path / "b.parquet", slice(None, None, -1), timestamp=times)
    shuffled = read(log, tmp_path / "a", ties="shuffle")
    assert read(back, tmp_path / "b", ties="shuffle") == shuffled
    assert read(log, tmp_path / "c", ties="shuffle", seed=1) != shuffled
    changed = 0
    for user, items in expected().items():
        for half in (slice(0, 3), slice(3, 6)):
            assert sorted(shuffled[user][half]) == sorted(items[half])
            changed += shuffled[user][half] != items[half]
    assert changed > 30  # five of six orders differ


def test_a_hidden_key_in_a_folder_s_name_is_no_hidden_folder(tmp_path: Path) -> None:
    write(tmp_path / "log" / "_day=1" / "a.parquet")
    write(tmp_path / "log" / "_temporary" / "b.parquet")
    assert [os.path.basename(path) for path in find_files(str(tmp_path)).paths] == ["a.parquet"]


def test_text_columns_are_joined_where_32_bit_offsets_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 2 GiB of text would meet: no join of ``string`` arrays, and chunks when written."""
    ids = {name: pa.array([f"{value:06d}" for value in columns()[name]]) for name in
           ("user_id", "item_id")}  # fmt: skip
    log = write(tmp_path / "a.parquet", **ids)
    whole = prepared(log, tmp_path / "whole")
    joins = {"concat_arrays": pa.concat_arrays}

    def concat_arrays(arrays: Any, *rest: Any) -> Any:
        assert not any(pa.types.is_string(array.type) for array in arrays), "offset overflow"
        return joins["concat_arrays"](arrays, *rest)

    monkeypatch.setattr(pa, "concat_arrays", concat_arrays)
    monkeypatch.setattr("shardrec.pipeline.prepared.ids._MOST_BYTES", 64)
    prepared(log, tmp_path / "parts")
    for name in (file.path for file in whole.files):
        assert pq.read_table(tmp_path / "parts" / name) == pq.read_table(tmp_path / "whole" / name)
        assert pq.read_schema(tmp_path / "parts" / name).field(0).type == pa.string()


def test_text_behind_2_gib_of_other_text_is_stored() -> None:
    words, before = [b"a", "ü".encode(), b""], 2**31
    text = np.zeros(before + 3, np.uint8)  # the system gives no memory to what is never touched
    text[before:] = np.frombuffer(b"".join(words), np.uint8)
    offsets = np.append(0, before + np.append(0, np.cumsum([len(word) for word in words])))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    column = pa.Array.from_buffers(pa.large_string(), len(words) + 1, buffers)
    table = pa.table({"id": column}).slice(1)
    found = stored(table, pa.schema({"id": pa.string()}))
    assert found["id"].to_pylist() == [word.decode() for word in words]


@pytest.mark.parametrize("kind", ["integers", "text"])
def test_the_order_of_users_is_the_same_under_every_release_of_the_engine(
    tmp_path: Path, kind: str
) -> None:
    """What md5 gives in Python; the order of the sequences decides the fingerprint."""
    users = [f"ü{user}" if kind == "text" else int(user) for user in columns()["user_id"]]
    found = read(write(tmp_path / "a.parquet", user_id=users), tmp_path / "out", seed=3)
    digests = {user: hashlib.md5(f"3:{user}".encode()).digest() for user in users}
    assert list(found) == sorted(digests, key=lambda user: int.from_bytes(digests[user], ORDER))


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["12MB", "30MB", "100MB"])
def test_many_users_under_a_small_limit_are_prepared_or_refused_in_one_line(
    tmp_path: Path, limit: str
) -> None:
    users = [f"{user:032d}" for user in range(60_000) for _ in range(2)]
    table = {"user_id": users, "item_id": np.arange(120_000) % 97, "timestamp": range(120_000)}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    try:
        manifest = prepared(tmp_path / "log.parquet", tmp_path / "out", memory_limit=limit)
    except MemoryError as error:
        assert str(error).startswith("memory_limit must be large enough to sort the log, got")
        assert limit != "100MB" and os.listdir(tmp_path) == ["log.parquet"]
    else:
        assert manifest.counts["users"] == 60_000


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("NotImplemented: Support for codec 'lzo' not built", "with another codec"),
        ("Cannot decrypt ColumnMetadata", "is encrypted"),
        ("Corrupt snappy compressed data", "corrupt or truncated"),
    ],
)
def test_a_codec_or_a_key_that_is_missing_is_not_called_a_corrupt_file(
    said: str, remedy: str
) -> None:
    assert remedy in decoding_remedy(OSError(said))
