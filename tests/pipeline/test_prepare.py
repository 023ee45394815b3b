"""prepare on small logs: what it writes equals what a few lines of plain Python say."""

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.manifest import Manifest, read_manifest
from shardrec.pipeline.prepare import PrepareConfig, prepare, prepare_once
from shardrec.pipeline.spread import load_per_rank, spread_by_popularity

Event = tuple[int, int, int]


def make_events(num: int = 3000, seed: int = 0) -> list[Event]:
    """Events with ties in time, repeats, exact duplicates, skewed users and items."""
    draw = random.Random(seed)
    events = [
        (int(80 * draw.random() ** 2), int(50 * draw.random() ** 3), draw.randrange(400))
        for _ in range(num)
    ]
    return events + draw.sample(events, num // 20)


def write_log(path: Path, events: list[Event], **extra: Any) -> str:
    user, item, time = zip(*events, strict=True)
    columns = {"user_id": user, "item_id": item, "timestamp": time} | extra
    pq.write_table(pa.table(columns), path, row_group_size=700)
    return str(path)


def run(folder: Path, events: list[Event], **options: Any) -> tuple[Manifest, Path]:
    folder.mkdir(exist_ok=True)
    log = write_log(folder / "log.parquet", events)
    output = folder / "out"
    return prepare(PrepareConfig(events=log, output=str(output), **options)), output


def read_rows(output: Path, name: str, column: str = "items") -> dict[Any, list[Any]]:
    """user id -> the column, with dense indices turned back into item ids."""
    item_ids = pq.read_table(output / "items.parquet")["item_id"].to_pylist()
    files = sorted(output.glob(name))
    tables = [pq.read_table(path) for path in files]
    rows = [(r["user_id"], r[column]) for table in tables for r in table.to_pylist()]
    assert len({user for user, _ in rows}) == len(rows)
    return {user: [item_ids[item] for item in items] for user, items in rows}


def sequences_of(events: list[Event]) -> dict[int, list[tuple[int, int]]]:
    """user -> (item, time) without exact duplicates, by time and then by place in the log."""
    users: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for user, item, time in dict.fromkeys(events):
        users[user].append((item, time))
    return {user: sorted(pairs, key=lambda pair: pair[1]) for user, pairs in users.items()}


def cut_time(events: list[Event], share: float) -> int:
    times = sorted(time for _, _, time in dict.fromkeys(events))
    return times[int(share * len(times))]


def items_before(pairs: list[tuple[int, int]], time: int) -> list[int]:
    return [item for item, when in pairs if when < time]


def test_leave_one_out_equals_plain_python(tmp_path: Path) -> None:
    events = make_events() + [(900, 1, 5), (901, 2, 5), (901, 3, 6)]
    manifest, output = run(tmp_path, events, split="leave_one_out")
    users = {user: [item for item, _ in pairs] for user, pairs in sequences_of(events).items()}
    long = {user: items for user, items in users.items() if len(items) >= 3}
    train = {user: items[:-2] for user, items in long.items() if len(items) >= 4} | {901: [2, 3]}
    assert read_rows(output, "train/*.parquet") == train
    assert read_rows(output, "test.parquet") == {u: items[:-1] for u, items in long.items()}
    assert read_rows(output, "test.parquet", "targets") == {u: i[-1:] for u, i in long.items()}
    assert read_rows(output, "validation.parquet") == {u: i[:-2] for u, i in long.items()}
    assert read_rows(output, "validation.parquet", "targets") == {
        u: items[-2:-1] for u, items in long.items()
    }
    assert manifest.counts["users_dropped"] == 1
    assert manifest.counts["duplicates_dropped"] == len(events) - len(dict.fromkeys(events))


@pytest.mark.parametrize("targets", ["last", "all"])
def test_temporal_split_equals_plain_python(tmp_path: Path, targets: str) -> None:
    events = make_events()
    options = {"validation": "time", "validation_quantile": 0.6, "test_quantile": 0.8}
    manifest, output = run(tmp_path, events, targets=targets, **options)
    first, second = cut_time(events, 0.6), cut_time(events, 0.8)
    assert manifest.split["validation_time"] == first
    assert manifest.split["test_time"] == second
    train, histories, wanted = {}, {}, {}
    for user, pairs in sequences_of(events).items():
        items, before = [item for item, _ in pairs], items_before(pairs, second)
        if len(before) < 2:
            continue
        if len(items_before(pairs, first)) >= 2:
            train[user] = items_before(pairs, first)
        if len(before) < len(items):
            start = len(items) - 1 if targets == "last" else len(before)
            histories[user], wanted[user] = items[:start], items[start:]
    assert read_rows(output, "train/*.parquet") == train
    assert read_rows(output, "test.parquet") == histories
    assert read_rows(output, "test.parquet", "targets") == wanted
    assert manifest.counts["test_targets"] == sum(map(len, wanted.values()))


def test_validation_users_give_up_their_last_event_before_the_cut(tmp_path: Path) -> None:
    events = make_events()
    manifest, output = run(tmp_path, events, validation_users=7)
    train = read_rows(output, "train/*.parquet")
    targets = read_rows(output, "validation.parquet", "targets")
    cut = manifest.split["test_time"]
    assert len(targets) == 7
    for user, pairs in sequences_of(events).items():
        before = items_before(pairs, cut)
        held_out = targets.get(user, [])
        if len(before) >= 3:
            assert train[user] + held_out == before


def test_nothing_after_the_cut_changes_what_training_sees(tmp_path: Path) -> None:
    events = make_events()
    cut = cut_time(events, 0.8)
    changed = [(user, item, t) if t < cut else (user + 3, 49 - item, t) for user, item, t in events]
    first = run(tmp_path / "a", events, test_time=cut, min_user_events=5)[1]
    second = run(tmp_path / "b", changed, test_time=cut, min_user_events=5)[1]
    assert read_rows(first, "train/*.parquet") == read_rows(second, "train/*.parquet")
    assert item_counts(first) == item_counts(second)


def item_counts(output: Path) -> dict[Any, int]:
    table = pq.read_table(output / "items.parquet").to_pydict()
    counts = zip(table["item_id"], table["count"], strict=True)
    return {item: count for item, count in counts if count}


def test_counts_are_of_training_events_only(tmp_path: Path) -> None:
    manifest, output = run(tmp_path, make_events(), validation="none")
    train = read_rows(output, "train/*.parquet")
    expected = Counter(item for items in train.values() for item in items)
    assert item_counts(output) == expected
    assert manifest.counts["train_events"] == sum(expected.values())


def test_items_first_seen_after_the_split_stay_in_the_catalog(tmp_path: Path) -> None:
    events = [(user, user % 3, time) for user in range(6) for time in range(5)]
    events += [(0, 77, 10), (1, 0, 10)]
    manifest, output = run(tmp_path, events, test_time=10)
    assert 77 in pq.read_table(output / "items.parquet")["item_id"].to_pylist()
    assert manifest.counts["items_without_training_events"] == 1
    assert manifest.counts["test_targets_new_items"] == 1
    assert manifest.counts["test_targets"] == 2


def test_users_without_history_are_counted(tmp_path: Path) -> None:
    events = [(user, user % 3, time) for user in range(6) for time in range(5)]
    manifest, output = run(tmp_path, [*events, (50, 1, 10), (51, 1, 10), (2, 0, 11)], test_time=10)
    assert manifest.counts["test_users_without_history"] == 2
    assert list(read_rows(output, "test.parquet")) == [2]


def test_minimum_counts_drop_items_then_users(tmp_path: Path) -> None:
    events = make_events()
    options = {"split": "leave_one_out", "min_item_events": 40, "min_user_events": 30}
    manifest, output = run(tmp_path, events, **options)
    unique = list(dict.fromkeys(events))
    popular = {i for i, n in Counter(item for _, item, _ in unique).items() if n >= 40}
    left = Counter(user for user, item, _ in unique if item in popular)
    active = {user for user, n in left.items() if n >= 30}
    assert set(pq.read_table(output / "items.parquet")["item_id"].to_pylist()) == popular
    assert set(read_rows(output, "test.parquet")) == active
    counts = manifest.counts
    assert counts["events_of_dropped_items"] == len(unique) - sum(left.values())
    assert counts["events_of_dropped_users"] == sum(n for u, n in left.items() if u not in active)


def test_ties_in_time_keep_the_order_of_files_and_rows(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    rows = [(user, item, 0) for user in range(5) for item in range(40)]
    random.Random(1).shuffle(rows)
    write_log(logs / "b.parquet", rows[120:])
    write_log(logs / "a.parquet", rows[:120])
    config = PrepareConfig(events=str(logs), output=str(tmp_path / "out"), split="leave_one_out")
    prepare(config)
    for user, items in read_rows(tmp_path / "out", "test.parquet").items():
        assert items == [item for who, item, _ in rows if who == user][:-1]


def test_duplicates_stay_when_asked(tmp_path: Path) -> None:
    events = [
        (0, 1, 1),
        (0, 1, 1),
        (0, 2, 1),
        (0, 1, 1),
        (0, 3, 2),
        (0, 4, 3),
        (1, 1, 1),
        (1, 2, 2),
    ]
    dropped, first = run(tmp_path / "a", events, split="leave_one_out")
    kept, second = run(tmp_path / "b", events, split="leave_one_out", keep_duplicates=True)
    assert read_rows(first, "train/*.parquet")[0] == [1, 2]
    assert read_rows(second, "train/*.parquet")[0] == [1, 1, 2, 1]
    assert (dropped.counts["duplicates_dropped"], kept.counts["duplicates_dropped"]) == (2, 0)


def test_string_ids_give_the_same_sequences_as_integers(tmp_path: Path) -> None:
    events = make_events()
    output = run(tmp_path, events, split="leave_one_out")[1]
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
    expected = read_rows(run(tmp_path / "plain", events)[1], "train/*.parquet")
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
    manifest, _ = run(tmp_path, events, test_quantile=0.7, validation="none")
    assert manifest.split["test_time"] == cut_time(events, 0.7) == 2**63 - 2
    assert run(tmp_path / "low", events, test_quantile=0.3)[0].split["test_time"] == -(2**63) + 1


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


@pytest.mark.parametrize("form", ["folder", "glob", "deep glob", "uri"])
def test_a_log_may_be_a_folder_a_glob_or_a_uri(tmp_path: Path, form: str) -> None:
    events = make_events(600)
    single = run(tmp_path / "single", events)[1]
    logs = tmp_path / "logs" / "day=1"
    logs.mkdir(parents=True)
    write_log(logs / "a.parquet", events[:300])
    write_log(logs / "b.parquet", events[300:])
    (logs / "_SUCCESS").write_text("")
    source = {
        "folder": str(tmp_path / "logs"),
        "glob": str(tmp_path / "logs" / "day=*" / "?.parquet"),
        "deep glob": str(tmp_path / "logs" / "**" / "*.parquet"),
        "uri": (tmp_path / "logs").as_uri(),
    }[form]
    prepare(PrepareConfig(events=source, output=str(tmp_path / "out")))
    assert read_rows(tmp_path / "out", "train/*.parquet") == read_rows(single, "train/*.parquet")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    events = make_events()
    first = run(tmp_path / "a", events, seed=3, threads=1)[0]
    second = run(tmp_path / "b", events, seed=3, threads=2, memory_limit="200MB")[0]
    other, output = run(tmp_path / "c", events, seed=4)
    assert first.files == second.files
    assert first.files != other.files
    users = read_rows(tmp_path / "a" / "out", "train/*.parquet")
    assert list(users) != sorted(users)
    assert list(users) != list(read_rows(output, "train/*.parquet"))
    assert users.keys() | read_rows(output, "train/*.parquet").keys() == users.keys()


def test_row_groups_have_the_size_asked_for(tmp_path: Path) -> None:
    manifest, output = run(tmp_path, make_events(), sequences_per_row_group=16)
    file = pq.ParquetFile(output / "train" / "part-00000.parquet")
    sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    assert set(sizes[:-1]) == {16}
    assert sum(sizes) == manifest.counts["train_sequences"]
    assert manifest.file("train/part-00000.parquet").row_groups == len(sizes)


def test_the_manifest_fits_the_files(tmp_path: Path) -> None:
    manifest, output = run(tmp_path, make_events())
    assert read_manifest(output, verify_checksums=True) == manifest
    on_disk = {str(p.relative_to(output)) for p in output.rglob("*.parquet")}
    assert on_disk == {entry.path for entry in manifest.files}
    items = pq.read_table(output / "items.parquet")
    assert items["item"].to_pylist() == list(range(manifest.counts["items"]))
    lengths = [len(s) for s in read_rows(output, "train/*.parquet").values()]
    assert manifest.quantiles["train_sequence_length"]["1"] == max(lengths)
    assert manifest.counts["train_sequence_events"] == sum(lengths)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_items", [1000, 4096, 50_001])
def test_every_rank_gets_its_share_of_popular_items(num_ranks: int, num_items: int) -> None:
    counts = (1e6 / np.arange(10, num_items + 10)).astype(np.int64)
    np.random.default_rng(0).shuffle(counts)
    order = spread_by_popularity(counts)
    assert sorted(order.tolist()) == list(range(num_items))
    loads = load_per_rank(counts[order], num_ranks)
    assert max(loads) * num_ranks < 1.12
    assert min(loads) * num_ranks > 0.88


def test_a_second_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    first, output = run(tmp_path, make_events())
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    config = PrepareConfig(
        events=str(tmp_path / "log.parquet"), output=str(output), threads=1, memory_limit="1GB"
    )
    again = prepare_once(config)
    assert (again.manifest, again.is_new) == (first, False)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_skewed_user_longer_than_a_block_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrec.pipeline.sorted_log._BLOCK_EVENTS", 64)
    monkeypatch.setattr("shardrec.pipeline.sorted_log._ARROW_ROWS", 2048)
    events = make_events() + [(7, k % 50, 1000 + k) for k in range(6000)]
    small = run(tmp_path / "a", events, split="leave_one_out")[0]
    monkeypatch.undo()
    assert run(tmp_path / "b", events, split="leave_one_out")[0].files == small.files
