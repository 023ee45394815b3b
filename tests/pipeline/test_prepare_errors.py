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
    """Run prepare, check that it raises and leaves nothing beside the log; returns the message."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        prepare(PrepareConfig(events=source, output=str(tmp_path / "out"), **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


def replaced(name: str, values: Any) -> dict[str, Any]:
    return good_columns() | {name: values}


def test_a_missing_column_lists_near_matches(tmp_path: Path) -> None:
    columns = good_columns()
    columns["userid"] = columns.pop("user_id")
    log = write(tmp_path / "log.parquet", columns)
    message = fails_cleanly(tmp_path, log, ValueError)
    assert "--user-column must be a known name, got 'user_id'; did you mean userid" in message


@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp"])
def test_a_null_is_named_with_file_row_group_and_column(tmp_path: Path, name: str) -> None:
    values = good_columns()[name]
    values[1200] = None
    log = write(tmp_path / "log.parquet", replaced(name, values))
    message = fails_cleanly(tmp_path, log, ValueError)
    assert "log.parquet', row group 2" in message
    assert f"column '{name}' must have no nulls, got 1" in message


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    values = good_columns()["item_id"]
    values[700] = -1
    message = fails_cleanly(
        tmp_path, write(tmp_path / "log.parquet", replaced("item_id", values)), ValueError
    )
    assert "row group 1, column 'item_id' must hold ids of 0 or more, got -1" in message


def test_ids_of_two_types_are_refused_with_both_files(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs / "a.parquet", good_columns())
    write(logs / "b.parquet", replaced("user_id", [str(k % 50) for k in range(NUM)]))
    message = fails_cleanly(tmp_path, str(logs), ValueError)
    assert "one type in all files, got int64" in message
    assert "b.parquet" in message


def test_fractional_ids_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", replaced("user_id", [k / 2 for k in range(NUM)]))
    assert "must be integer or string, got double" in fails_cleanly(tmp_path, log, ValueError)


def test_ids_beyond_int64_are_refused(tmp_path: Path) -> None:
    values = pa.array([2**63 + k for k in range(NUM)], pa.uint64())
    log = write(tmp_path / "log.parquet", replaced("user_id", values))
    assert "must fit into int64" in fails_cleanly(tmp_path, log, ValueError)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["yesterday"] * NUM, "yesterday"),
        ([k + 0.5 for k in range(NUM)], "0.5"),
        ([float("nan")] * NUM, "whole numbers"),
        ([datetime.time(1)] * NUM, "time64"),
        ([True] * NUM, "bool"),
    ],
    ids=["text", "fraction", "nan", "time-of-day", "bool"],
)
def test_an_unparsable_time_is_refused(tmp_path: Path, values: Any, expected: str) -> None:
    log = write(tmp_path / "log.parquet", replaced("timestamp", values))
    message = fails_cleanly(tmp_path, log, ValueError)
    assert "column 'timestamp'" in message
    assert expected in message


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    empty = {name: pa.array([], pa.int64()) for name in good_columns()}
    log = write(tmp_path / "log.parquet", empty)
    assert "at least one event, got none" in fails_cleanly(tmp_path, log, ValueError)


def test_one_item_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", replaced("item_id", [3] * NUM))
    assert "at least 2 items, got 1" in fails_cleanly(tmp_path, log, ValueError)


def test_one_user_is_enough(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", replaced("user_id", [3] * NUM))
    manifest = prepare(PrepareConfig(events=log, output=str(tmp_path / "out")))
    assert manifest.counts["users"] == manifest.counts["train_sequences"] == 1


def test_users_with_one_event_each_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", replaced("user_id", list(range(NUM))))
    message = fails_cleanly(tmp_path, log, ValueError, split="leave_one_out")
    assert "at least one user must have 2 or more training events" in message


def test_times_without_an_order_point_to_leave_one_out(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", replaced("timestamp", [7] * NUM))
    assert "split=leave_one_out" in fails_cleanly(tmp_path, log, ValueError)


def test_a_cut_outside_the_log_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    assert "0 to 1999" in fails_cleanly(tmp_path, log, ValueError, test_time=5000)
    message = fails_cleanly(
        tmp_path, log, ValueError, test_time=100, validation="time", validation_time=200
    )
    assert "before the test part at 100, got 200" in message
    assert "must be a number" in fails_cleanly(tmp_path, log, ValueError, test_time="2024-01-01")


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


def test_an_unknown_event_type_lists_what_is_there(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns() | {"kind": ["view", "buy"] * (NUM // 2)})
    message = fails_cleanly(
        tmp_path, log, ValueError, event_column="kind", event_types=("purchase",)
    )
    assert "'buy', 'view'" in message


def test_of_many_event_types_ten_are_listed(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns() | {"kind": [f"k{k}" for k in range(NUM)]})
    message = fails_cleanly(tmp_path, log, ValueError, event_column="kind", event_types=("buy",))
    assert message.count("'k") == 10
    assert ", …; correct the spelling" in message


def not_utf8(num: int) -> pa.Array:
    """What a writer stores that takes bytes for text."""
    values = pa.array([b"\xe9t\xe9%d" % (k % 31) for k in range(num)])
    return pa.Array.from_buffers(pa.string(), num, values.buffers())


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        (
            "item_id",
            not_utf8(NUM),
            "0, column 'item_id' must hold text in UTF-8, got b'.xe9t.xe90'",
        ),
        ("kind", not_utf8(NUM), "0, column 'kind' must hold text in UTF-8, got b'.xe9t"),
        ("kind", [b"\xff"] * NUM, "0, column 'kind' must hold text in UTF-8, got b'.xff'"),
        ("kind", [[1]] * NUM, "column 'kind' of .* must hold single values"),
        ("kind", [{"a": 1}] * NUM, "column 'kind' of .* must hold single values"),
    ],
    ids=["ids", "event-text", "event-bytes", "event-list", "event-struct"],
)
def test_values_that_are_no_text_are_refused(
    tmp_path: Path, column: str, values: Any, expected: str
) -> None:
    log = write(tmp_path / "log.parquet", good_columns() | {"kind": ["1"] * NUM, column: values})
    message = fails_cleanly(tmp_path, log, ValueError, event_column="kind", event_types=("1",))
    assert re.search(expected, message)


def test_two_columns_of_one_name_are_refused_where_the_name_is_asked_for(tmp_path: Path) -> None:
    columns = good_columns()
    names, values = [*columns, "user_id"], [*columns.values(), columns["item_id"]]
    log = str(tmp_path / "log.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(one) for one in values], names), log)
    assert "must have one column 'user_id', got 2" in fails_cleanly(tmp_path, log, ValueError)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), None])
def test_a_bad_weight_is_refused(tmp_path: Path, weight: float | None) -> None:
    values = [1.0] * (NUM - 1) + [weight]
    log = write(tmp_path / "log.parquet", good_columns() | {"value": values})
    message = fails_cleanly(tmp_path, log, ValueError, weight_column="value")
    assert "row group 3, column 'value'" in message


def test_weights_of_text_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns() | {"value": ["x"] * NUM})
    message = fails_cleanly(tmp_path, log, ValueError, weight_column="value")
    assert "must be numeric, got string" in message


def test_another_run_in_the_output_is_kept(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", good_columns())
    output = tmp_path / "out"
    first = prepare(PrepareConfig(events=log, output=str(output)))
    message = fails_cleanly(tmp_path, log, FileExistsError, seed=5)
    assert "differs in seed; choose another folder" in message
    assert read_manifest(output, verify_checksums=True) == first
    write(tmp_path / "log.parquet", replaced("item_id", [k % 29 for k in range(NUM)]))
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
        ({"memory_limit": "lots"}, "say 512MB"),
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
        ({"memory_limit": "99999999999999999999TB"}, "say 512MB"),
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
