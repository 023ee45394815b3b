"""prepare on small logs gives the same data as a few lines of plain Python."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.pipeline.event_logs import (
    Event,
    cut_time,
    make_events,
    prepare_events,
    read_rows,
    write_log,
)

from shardrec.pipeline.prepare import PrepareConfig, prepare, prepare_once
from shardrec.pipeline.prepared.balance import load_per_rank, spread_by_popularity
from shardrec.pipeline.prepared.manifest import Manifest, read_manifest


def sequences_of(events: list[Event]) -> dict[int, list[tuple[int, int]]]:
    """user -> (item, time) without exact duplicates, by time and then by place in the log."""
    users: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for user, item, time in dict.fromkeys(events):
        users[user].append((item, time))
    return {user: sorted(pairs, key=lambda pair: pair[1]) for user, pairs in users.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    """The events of ``make_events``, prepared with default options."""
    return prepare_events(tmp_path_factory.mktemp("plain"), make_events())


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """Training sequences of 600 events in one file."""
    output = prepare_events(tmp_path_factory.mktemp("single"), make_events(600))[1]
    return read_rows(output, "train/*.parquet")


def items_before(pairs: list[tuple[int, int]], time: int) -> list[int]:
    return [item for item, when in pairs if when < time]


def test_leave_one_out_equals_plain_python(tmp_path: Path) -> None:
    events = make_events() + [(900, 1, 5), (901, 2, 5), (901, 3, 6)]
    manifest, output = prepare_events(tmp_path, events, split="leave_one_out")
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
    manifest, output = prepare_events(tmp_path, events, targets=targets, **options)
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


def test_validation_takes_the_last_event_before_the_cut_of_some_users(tmp_path: Path) -> None:
    events = make_events()
    manifest, output = prepare_events(tmp_path, events, validation_users=7)
    train = read_rows(output, "train/*.parquet")
    targets = read_rows(output, "validation.parquet", "targets")
    cut = manifest.split["test_time"]
    assert len(targets) == 7
    for user, pairs in sequences_of(events).items():
        before = items_before(pairs, cut)
        held_out = targets.get(user, [])
        if len(before) >= 3:
            assert train[user] + held_out == before


def test_events_after_the_cut_do_not_change_the_training_data(tmp_path: Path) -> None:
    events = make_events()
    cut = cut_time(events, 0.8)
    changed = [(user, item, t) if t < cut else (user + 3, 49 - item, t) for user, item, t in events]
    first = prepare_events(tmp_path / "a", events, test_time=cut, min_user_events=5)[1]
    second = prepare_events(tmp_path / "b", changed, test_time=cut, min_user_events=5)[1]
    assert read_rows(first, "train/*.parquet") == read_rows(second, "train/*.parquet")
    assert item_counts(first) == item_counts(second)


def item_counts(output: Path) -> dict[Any, int]:
    table = pq.read_table(output / "items.parquet").to_pydict()
    counts = zip(table["item_id"], table["count"], strict=True)
    return {item: count for item, count in counts if count}


def test_counts_are_of_training_events_only(tmp_path: Path) -> None:
    manifest, output = prepare_events(tmp_path, make_events(), validation="none")
    train = read_rows(output, "train/*.parquet")
    expected = Counter(item for items in train.values() for item in items)
    assert item_counts(output) == expected
    assert manifest.counts["train_events"] == sum(expected.values())


def test_items_first_seen_after_the_split_stay_in_the_catalog(tmp_path: Path) -> None:
    events = [(user, user % 3, time) for user in range(6) for time in range(5)]
    events += [(0, 77, 10), (1, 0, 10)]
    manifest, output = prepare_events(tmp_path, events, test_time=10)
    assert 77 in pq.read_table(output / "items.parquet")["item_id"].to_pylist()
    assert manifest.counts["items_without_training_events"] == 1
    assert manifest.counts["test_targets_new_items"] == 1
    assert manifest.counts["test_targets"] == 2


def test_users_without_history_are_counted(tmp_path: Path) -> None:
    events = [(user, user % 3, time) for user in range(6) for time in range(5)]
    manifest, output = prepare_events(
        tmp_path, [*events, (50, 1, 10), (51, 1, 10), (2, 0, 11)], test_time=10
    )
    assert manifest.counts["test_users_without_history"] == 2
    assert list(read_rows(output, "test.parquet")) == [2]


def test_minimum_counts_drop_items_then_users(tmp_path: Path) -> None:
    events = make_events()
    options = {"split": "leave_one_out", "min_item_events": 40, "min_user_events": 30}
    manifest, output = prepare_events(tmp_path, events, **options)
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
    dropped, first = prepare_events(tmp_path / "a", events, split="leave_one_out")
    kept, second = prepare_events(
        tmp_path / "b", events, split="leave_one_out", keep_duplicates=True
    )
    assert read_rows(first, "train/*.parquet")[0] == [1, 2]
    assert read_rows(second, "train/*.parquet")[0] == [1, 1, 2, 1]
    assert (dropped.counts["duplicates_dropped"], kept.counts["duplicates_dropped"]) == (2, 0)


@pytest.mark.parametrize("form", ["folder", "glob", "deep glob", "uri"])
def test_a_log_may_be_a_folder_a_glob_or_a_uri(
    tmp_path: Path, single_file: dict[Any, list[Any]], form: str
) -> None:
    events = make_events(600)
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
    assert read_rows(tmp_path / "out", "train/*.parquet") == single_file


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    events = make_events()
    first = prepare_events(tmp_path / "a", events, seed=3, threads=1)[0]
    second = prepare_events(tmp_path / "b", events, seed=3, threads=2, memory_limit="200MB")[0]
    other, output = prepare_events(tmp_path / "c", events, seed=4)
    assert first.files == second.files
    assert first.files != other.files
    users = read_rows(tmp_path / "a" / "out", "train/*.parquet")
    assert list(users) != sorted(users)
    assert list(users) != list(read_rows(output, "train/*.parquet"))
    assert users.keys() | read_rows(output, "train/*.parquet").keys() == users.keys()


def test_row_groups_have_the_size_asked_for(tmp_path: Path) -> None:
    manifest, output = prepare_events(tmp_path, make_events(), sequences_per_row_group=16)
    file = pq.ParquetFile(output / "train" / "part-00000.parquet")
    sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    assert set(sizes[:-1]) == {16}
    assert sum(sizes) == manifest.counts["train_sequences"]
    assert manifest.file("train/part-00000.parquet").row_groups == len(sizes)


def test_the_manifest_fits_the_files(plain: tuple[Manifest, Path]) -> None:
    manifest, output = plain
    assert read_manifest(output, verify_checksums=True) == manifest
    on_disk = {str(p.relative_to(output)) for p in output.rglob("*.parquet")}
    assert on_disk == {entry.path for entry in manifest.files}
    items = pq.read_table(output / "items.parquet")
    assert items["item"].to_pylist() == list(range(manifest.counts["items"]))
    lengths = [len(s) for s in read_rows(output, "train/*.parquet").values()]
    assert manifest.quantiles["train_sequence_length"]["1"] == max(lengths)
    assert manifest.counts["train_sequence_events"] == sum(lengths)


def test_the_manifest_has_a_schema_version_and_each_rank_s_share_of_the_events(
    plain: tuple[Manifest, Path],
) -> None:
    manifest, output = plain
    written = json.loads((output / "manifest.json").read_text())
    assert (written["format"], written["schema_version"]) == ("shardrec.prepared", 1)
    assert written["load_per_rank"] == manifest.load_per_rank
    counts = pq.read_table(output / "items.parquet")["count"].to_pylist()
    assert list(manifest.load_per_rank) == ["2", "3", "4", "8"]
    for num_ranks, shares in manifest.load_per_rank.items():
        rows = -(-len(counts) // int(num_ranks))
        expected = [0.0] * int(num_ranks)
        for item, count in enumerate(counts):
            expected[item // rows] += count / sum(counts)
        assert shares == pytest.approx(expected, abs=1e-6)


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


def test_a_second_run_says_so_and_changes_nothing(plain: tuple[Manifest, Path]) -> None:
    first, output = plain
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    config = PrepareConfig(
        events=str(output.parent / "log.parquet"), output=str(output), threads=1, memory_limit="1GB"
    )
    again = prepare_once(config)
    assert (again.manifest, again.is_new) == (first, False)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_skewed_user_longer_than_a_block_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrec.pipeline.log.sort._BLOCK_EVENTS", 64)
    monkeypatch.setattr("shardrec.pipeline.log.sort._ARROW_ROWS", 2048)
    events = make_events() + [(7, k % 50, 1000 + k) for k in range(6000)]
    small = prepare_events(tmp_path / "a", events, split="leave_one_out")[0]
    monkeypatch.undo()
    assert prepare_events(tmp_path / "b", events, split="leave_one_out")[0].files == small.files
