"""prepare on columns of every kind: ids, times, types and weights reach their sequences."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.event_logs import cut_time, make_events, prepare_events, read_rows, write_log

from shardrec.pipeline.prepare import PrepareConfig, prepare


def test_string_ids_give_the_same_sequences_as_integers(tmp_path: Path) -> None:
    events = make_events()
    output = prepare_events(tmp_path, events, split="leave_one_out")[1]
    user, item, time = zip(*events, strict=True)
    table = {
        "who": pa.array([f"u{u:02d}" for u in user]).dictionary_encode(),
        "what": [f"i{i:02d}" for i in item],
        "when": pa.array(time, pa.timestamp("s", tz="Europe/Paris")),
    }
    pq.write_table(pa.table(table), tmp_path / "text.parquet")
    names = {"user_column": "who", "item_column": "what", "time_column": "when"}
    text, source = tmp_path / "text", str(tmp_path / "text.parquet")
    prepare(PrepareConfig(events=source, output=str(text), split="leave_one_out", **names))  # type: ignore[arg-type]
    for name in ("train/*.parquet", "test.parquet", "validation.parquet"):
        expected = {
            f"u{u:02d}": [f"i{i:02d}" for i in s] for u, s in read_rows(output, name).items()
        }
        assert read_rows(text, name) == expected


@pytest.mark.parametrize(
    "times",
    [
        pa.array([0, 86_400, 172_800], pa.timestamp("s")),
        pa.array([0, 1, 2], pa.date32()),
        pa.array(["1970-01-01", "1970-01-02", "1970-01-03"]),
        pa.array(["1970-01-01T00:00:00", "1970-01-02T00:00:00", "1970-01-03T00:00:00"]),
    ],
    ids=["timestamp", "date", "iso-date", "iso-time"],
)
def test_times_of_any_kind_become_microseconds(tmp_path: Path, times: pa.Array) -> None:
    table = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    config = PrepareConfig(
        events=str(tmp_path / "log.parquet"), output=str(tmp_path / "out"), test_time="1970-01-03"
    )
    assert prepare(config).split["test_time"] == 2 * 86_400 * 10**6


def test_columns_may_have_any_names(tmp_path: Path) -> None:
    events = make_events(600)
    expected = read_rows(prepare_events(tmp_path / "plain", events)[1], "train/*.parquet")
    for names in (("__row", "event", "time"), ("time", "user_id", "row"), ("item_id", "ü.b", "")):
        log = tmp_path / "log.parquet"
        pq.write_table(pa.table(list(zip(*events, strict=True)), names=names), log)
        options = dict(zip(("user_column", "item_column", "time_column"), names, strict=True))
        config = PrepareConfig(events=str(log), output=str(tmp_path / "out"), force=True, **options)  # type: ignore[arg-type]
        prepare(config)
        assert read_rows(tmp_path / "out", "train/*.parquet") == expected


def test_a_rating_may_select_events_and_weigh_them(tmp_path: Path) -> None:
    events = [(user, item, item) for user in range(3) for item in range(6)]
    log = write_log(tmp_path / "log.parquet", events, stars=[item % 3 for _, item, _ in events])
    stars: dict[str, Any] = {"event_column": "stars", "event_types": ("1", "2")}
    output, more = str(tmp_path / "out"), {"test_time": 5, "validation": "none"}
    config = PrepareConfig(events=log, output=output, weight_column="stars", **stars, **more)  # type: ignore[arg-type]
    assert prepare(config).counts["events_other_type"] == 6
    assert read_weights(tmp_path / "out") == [[1.0, 2.0, 1.0]] * 3


def read_weights(output: Path) -> list[list[float]]:
    weights: list[list[float]] = pq.read_table(output / "train")["weights"].to_pylist()
    return weights


def test_times_at_both_ends_of_int64_are_cut_where_they_should_be(tmp_path: Path) -> None:
    ends = [-(2**63), -(2**63) + 1, -1, 0, 2**63 - 2, 2**63 - 1]
    events = [(user, item, ends[(user + item) % 6]) for user in range(8) for item in range(50)]
    manifest, _ = prepare_events(tmp_path, events, test_quantile=0.7, validation="none")
    assert manifest.split["test_time"] == cut_time(events, 0.7) == 2**63 - 2
    assert (
        prepare_events(tmp_path / "low", events, test_quantile=0.3)[0].split["test_time"]
        == -(2**63) + 1
    )


def test_nanoseconds_are_rounded_down_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = pa.array([3000, 2001, 2999, 1000, 5000], pa.timestamp("ns"))
    table = {"user_id": [1] * 5, "item_id": [4, 2, 3, 1, 9], "timestamp": times}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    config = PrepareConfig(
        events=str(tmp_path / "log.parquet"), output=str(tmp_path / "out"), validation="none"
    )
    assert prepare(config).split["test_time"] == 5
    assert read_rows(tmp_path / "out", "train/*.parquet") == {1: [1, 2, 3, 4]}
    assert caplog.text.count("finer than microseconds, which are rounded down") == 1


def test_event_types_and_weights_follow_their_events(tmp_path: Path) -> None:
    events = [(0, item, 10 - item) for item in range(6)] + [(1, 0, 0), (1, 1, 1)]
    kinds = ["buy", "view", "buy", "cart", "buy", "buy", "buy", "buy"]
    weights = [0.5 * k for k in range(8)]
    log = write_log(tmp_path / "log.parquet", events, kind=kinds, value=weights)
    config = PrepareConfig(
        events=log,
        output=str(tmp_path / "out"),
        split="leave_one_out",
        validation="none",
        event_column="kind",
        event_types=("buy", "cart"),
        weight_column="value",
    )
    manifest = prepare(config)
    train = pq.read_table(tmp_path / "out" / "train")
    row = next(row for row in train.to_pylist() if row["user_id"] == 0)
    assert read_rows(tmp_path / "out", "train/*.parquet")[0] == [5, 4, 3, 2]
    assert row["weights"] == [2.5, 2.0, 1.5, 1.0]
    assert manifest.counts["events_other_type"] == 1


def test_one_event_of_two_types_is_no_duplicate(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.parquet", [(0, 1, 1), (0, 1, 1), (0, 2, 2)], kind=["a", "b", "a"]
    )
    options: dict[str, Any] = {"split": "leave_one_out", "min_user_events": 1}
    config = PrepareConfig(
        events=log,
        output=str(tmp_path / "o"),
        event_column="kind",
        event_types=("a", "b"),
        **options,
    )
    with pytest.raises(ValueError, match="2 or more training events"):
        prepare(config)
    options["validation"] = "none"
    config = PrepareConfig(
        events=log,
        output=str(tmp_path / "o"),
        event_column="kind",
        event_types=("a", "b"),
        **options,
    )
    assert prepare(config).counts["duplicates_dropped"] == 0
