"""Bad input to prepare: a clear message, and nothing half-written."""

import datetime
import fcntl
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.config import from_json
from shardrec.pipeline.prepare import PrepareConfig, prepare, prepare_once
from shardrec.pipeline.prepared.manifest import read_manifest

NUM = 2000


def good_columns() -> dict[str, Any]:
    return {
        "user_id": [k % 50 for k in range(NUM)],
        "item_id": [k % 31 for k in range(NUM)],
        "timestamp": list(range(NUM)),
    }


def write(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=500)
    return str(path)


def fails_cleanly(tmp_path: Path, source: str, error: type[Exception], **options: Any) -> str:
    """Run prepare, check that it raises and leaves no other file; returns the message."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        prepare(PrepareConfig(events=source, output=str(tmp_path / "out"), **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


def changed(name: str, row: int, value: Any) -> dict[str, Any]:
    """A column of the good log with another value in one row."""
    values = good_columns()[name]
    values[row] = value
    return {name: values}


def not_utf8(num: int) -> pa.Array:
    """Latin-1 bytes declared as text, as some writers store them."""
    values = pa.array([b"\xe9t\xe9%d" % (k % 31) for k in range(num)])
    return pa.Array.from_buffers(pa.string(), num, values.buffers())


def null(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    place = r"log\.parquet', row group 2"
    return changed(name, 1200, None), {}, f"{place}.*column '{name}' must have no nulls, got 1"


def weight(value: float | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    values = [1.0] * (NUM - 1) + [value]
    return {"value": values}, {"weight_column": "value"}, "row group 3, column 'value'"


USERS = good_columns()["user_id"]
BY_TIME = {"test_time": 100, "validation": "time", "validation_time": 200}
BUY = {"event_column": "kind", "event_types": ("buy",)}
ONE = {"event_column": "kind", "event_types": ("1",)}
# Case -> columns that replace those of a good log (None removes one), options, the message.
REFUSED_LOGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing column": (
        {"user_id": None, "userid": USERS},
        {},
        "--user-column must be a known name, got 'user_id'; did you mean userid",
    ),
    "null user": null("user_id"),
    "null item": null("item_id"),
    "null time": null("timestamp"),
    "negative id": (
        changed("item_id", 700, -1),
        {},
        "row group 1, column 'item_id' must hold ids of 0 or more, got -1",
    ),
    "fractional ids": (
        {"user_id": [k / 2 for k in range(NUM)]},
        {},
        "0, column 'user_id' must fit into int64 as whole numbers, got .*0.5",
    ),
    "ids beyond int64": (
        {"user_id": pa.array([2**63 + k for k in range(NUM)], pa.uint64())},
        {},
        "must fit into int64",
    ),
    "time: text": ({"timestamp": ["yesterday"] * NUM}, {}, "column 'timestamp'.*yesterday"),
    "time: fraction": (
        {"timestamp": [k + 0.5 for k in range(NUM)]},
        {},
        r"column 'timestamp'.*0\.5",
    ),
    "time: nan": ({"timestamp": [float("nan")] * NUM}, {}, "column 'timestamp'.*whole numbers"),
    "time: of day": ({"timestamp": [datetime.time(1)] * NUM}, {}, "column 'timestamp'.*time64"),
    "time: bool": ({"timestamp": [True] * NUM}, {}, "column 'timestamp'.*bool"),
    "no event": (
        {name: pa.array([], pa.int64()) for name in good_columns()},
        {},
        "at least one event, got none",
    ),
    "one item": ({"item_id": [3] * NUM}, {}, "at least 2 items, got 1"),
    "one event a user": (
        {"user_id": list(range(NUM))},
        {"split": "leave_one_out"},
        "at least one user must have 2 or more training events",
    ),
    "one time": ({"timestamp": [7] * NUM}, {}, "split=leave_one_out"),
    "test after the log": ({}, {"test_time": 5000}, "0 to 1999"),
    "validation after test": ({}, BY_TIME, "before the test part at 100, got 200"),
    "text for a number": ({}, {"test_time": "2024-01-01"}, "must be a number"),
    "unknown event type": (
        {"kind": ["view", "buy"] * (NUM // 2)},
        {"event_column": "kind", "event_types": ("purchase",)},
        "'buy', 'view'",
    ),
    "many event types": (
        {"kind": [f"k{k}" for k in range(NUM)]},
        BUY,
        r"where the log has ('k\d+', ){9}'k\d+', …; fix the names",
    ),
    "latin-1 ids": (
        {"item_id": not_utf8(NUM), "kind": ["1"] * NUM},
        ONE,
        "0, column 'item_id' must hold text in UTF-8, got b'.xe9t.xe90'",
    ),
    "latin-1 event types": (
        {"kind": not_utf8(NUM)},
        ONE,
        "0, column 'kind' must hold text in UTF-8, got b'.xe9t",
    ),
    "event types of bytes": (
        {"kind": [b"\xff"] * NUM},
        ONE,
        "0, column 'kind' must hold text in UTF-8, got b'.xff'",
    ),
    "event types of lists": (
        {"kind": [[1]] * NUM},
        ONE,
        "column 'kind' of .* must hold single values",
    ),
    "event types of structs": (
        {"kind": [{"a": 1}] * NUM},
        ONE,
        "column 'kind' of .* must hold single values",
    ),
    "weight: negative": weight(-1.0),
    "weight: nan": weight(float("nan")),
    "weight: infinite": weight(float("inf")),
    "weight: null": weight(None),
    "weights of text": (
        {"value": ["x"] * NUM},
        {"weight_column": "value"},
        "must be numeric, got string",
    ),
}


@pytest.mark.parametrize("case", REFUSED_LOGS)
def test_an_invalid_log_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    columns, options, expected = REFUSED_LOGS[case]
    given = {name: v for name, v in (good_columns() | columns).items() if v is not None}
    log = write(tmp_path / "log.parquet", given)
    assert re.search(expected, fails_cleanly(tmp_path, log, ValueError, **options))


def test_ids_of_two_types_are_refused_with_both_files(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs / "a.parquet", good_columns())
    write(logs / "b.parquet", good_columns() | {"user_id": [str(k % 50) for k in range(NUM)]})
    message = fails_cleanly(tmp_path, str(logs), ValueError)
    assert "one type in all files, got int64" in message
    assert "b.parquet" in message


def test_one_user_is_enough(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns() | {"user_id": [3] * NUM})
    manifest = prepare(PrepareConfig(events=log, output=str(tmp_path / "out")))
    assert manifest.counts["users"] == manifest.counts["train_sequences"] == 1


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    write(log, good_columns())
    log.write_bytes(log.read_bytes()[:-200])
    message = fails_cleanly(tmp_path, str(log), ValueError)
    assert "log.parquet' must be a complete Parquet file" in message
    log.write_bytes(b"")
    assert "complete Parquet file" in fails_cleanly(tmp_path, str(log), ValueError)


def test_a_corrupt_row_group_is_named_with_its_column(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    write(log, good_columns())
    place = pq.ParquetFile(log).metadata.row_group(2).column(1)
    data = bytearray(log.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    data[start : start + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    log.write_bytes(bytes(data))
    message = fails_cleanly(tmp_path, str(log), ValueError)
    assert "log.parquet', row group 2, column 'item_id' must be valid Parquet data" in message


def test_a_log_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", tmp_path / "no*" / "*.parquet", tmp_path):
        assert "events must" in fails_cleanly(tmp_path, str(source), FileNotFoundError)
    message = fails_cleanly(tmp_path, "ftp://somewhere/log.parquet", ValueError)
    assert "a URI that pyarrow opens" in message


def test_two_columns_of_one_name_are_refused_where_the_name_is_asked_for(tmp_path: Path) -> None:
    columns = good_columns()
    names, values = [*columns, "user_id"], [*columns.values(), columns["item_id"]]
    log = str(tmp_path / "log.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(one) for one in values], names), log)
    assert "must have one column 'user_id', got 2" in fails_cleanly(tmp_path, log, ValueError)


def test_another_run_in_the_output_is_kept(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    output = tmp_path / "out"
    first = prepare(PrepareConfig(events=log, output=str(output)))
    message = fails_cleanly(tmp_path, log, FileExistsError, seed=5)
    assert "differs in seed; choose another folder" in message
    assert read_manifest(output, verify_checksums=True) == first
    write(tmp_path / "log.parquet", good_columns() | {"item_id": [k % 29 for k in range(NUM)]})
    assert "the log's files" in fails_cleanly(tmp_path, log, FileExistsError)
    assert read_manifest(output, verify_checksums=True) == first


def test_foreign_files_in_the_output_are_kept(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years of work")
    assert "a complete result" in fails_cleanly(tmp_path, log, FileExistsError)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years of work"


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    (tmp_path / "out").write_text("a file")
    assert "a complete result" in fails_cleanly(tmp_path, log, FileExistsError)


def test_a_result_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    prepare(PrepareConfig(events=log, output=str(tmp_path / "out")))
    (tmp_path / "out" / "test.parquet").unlink()
    assert "test.parquet' must exist" in fails_cleanly(tmp_path, log, FileExistsError)


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    (tmp_path / "out").mkdir()
    manifest = prepare(PrepareConfig(events=log, output=str(tmp_path / "out")))
    assert read_manifest(tmp_path / "out") == manifest


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    left = tmp_path / ".out.partial" / "result" / "train"
    left.mkdir(parents=True)
    (left / "part-00099.parquet").write_text("half")
    prepare(PrepareConfig(events=log, output=str(tmp_path / "out")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "out"]
    assert not (tmp_path / "out" / "train" / "part-00099.parquet").exists()


def test_two_runs_into_one_output_do_not_mix(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "one process at a time" in fails_cleanly(tmp_path, log, FileExistsError)
    shutil.rmtree(partial)


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(tmp_path / "log.parquet", good_columns())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardrec.pipeline.prepare.write_manifest", full_disk)
    assert "No space left" in fails_cleanly(tmp_path, log, OSError)


def test_too_small_a_memory_limit_is_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    message = fails_cleanly(tmp_path, log, MemoryError, memory_limit="1MB")
    assert "memory_limit must be large enough" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "random"}, "temporal or leave_one_out"),
        ({"targets": "first"}, "last or all"),
        ({"test_quantile": 1.0}, "between 0 and 1"),
        ({"min_user_events": 0}, "at least 1"),
        ({"memory_limit": "lots"}, "use 512MB"),
        ({"output": "s3://bucket/x"}, "local folder"),
        ({"split": "leave_one_out", "test_quantile": 0.9}, "must come with split=temporal"),
        ({"split": "leave_one_out", "validation": "time"}, "users or none"),
        ({"test_time": 5, "test_quantile": 0.9}, "no test_time"),
        ({"validation_quantile": 0.5}, "validation=time"),
        ({"validation": "none", "validation_users": 5}, "validation=users"),
        ({"event_types": ("buy",)}, "must come with event_column"),
        ({"event_column": "kind"}, "must come with event_types"),
        ({"events": ""}, "events must be a path, got ''"),
        ({"events": "log\0.parquet"}, "events must be a path without NUL"),
        ({"output": "out\0"}, "output must be a path without NUL"),
        ({"output": "out\udcff"}, "output must be a path in UTF-8, got 'out.udcff'"),
        ({"items": ""}, "items must be a path, got ''"),
        ({"threads": 20_000}, "threads must be at most 256, got 20000; lower it"),
        ({"sequences_per_row_group": 10**20}, "at most 1073741824"),
        ({"memory_limit": "99999999999999999999TB"}, "use 512MB"),
        ({"user_column": "x", "item_column": "x"}, "item_column must be another .* got 'x' for"),
        ({"time_column": "user_id"}, "time_column must be another column than user_column"),
        ({"weight_column": "timestamp"}, "weight_column must be another column than time_column"),
        (
            {"event_column": "item_id", "event_types": ("1",)},
            "event_column must be another column than item_column",
        ),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, Any], expected: str) -> None:
    given = {"events": "log.parquet", "output": "out"} | options
    with pytest.raises(ValueError, match=expected):
        PrepareConfig(**given)


def test_a_misspelt_option_lists_near_matches() -> None:
    data = {"events": "log.parquet", "output": "out", "user_colum": "u"}
    with pytest.raises(ValueError, match="did you mean user_column"):
        from_json(PrepareConfig, data)


def test_force_replaces_what_prepare_wrote_and_nothing_else(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    output = tmp_path / "out"
    first = prepare(PrepareConfig(events=log, output=str(output)))
    again = prepare_once(PrepareConfig(events=log, output=str(output), force=True))
    assert again.is_new and again.manifest == first
    (output / "test.parquet").unlink()
    second = prepare(PrepareConfig(events=log, output=str(output), force=True, seed=5))
    assert read_manifest(output, verify_checksums=True) == second
    assert second.config["seed"] == 5
    with pytest.raises(ValueError, match="at least 2 items"):
        prepare(PrepareConfig(events=log, output=str(output), force=True, min_item_events=NUM))
    assert read_manifest(output, verify_checksums=True) == second
    (output / "manifest.json").write_text('{"format": "theirs"}')
    message = fails_cleanly(tmp_path, log, FileExistsError, force=True)
    assert "choose another folder or delete it" in message
    assert (output / "test.parquet").exists()
