"""Preparing a newer log: old items keep their indices, and new ones get the next."""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.log.item_indices import index_order
from shardrec.pipeline.prepare import PrepareConfig, prepare, prepare_once
from shardrec.pipeline.prepared.balance import (
    TOO_UNEVEN,
    describe_uneven_load,
    largest_load,
    load_per_rank,
)
from shardrec.pipeline.prepared.manifest import read_manifest

Event = tuple[int, int, int]
KINDS = ["int64", "string"]


def write_log(path: Path, events: list[Event], kind: str = "int64") -> str:
    user, item, time = zip(*events, strict=True)
    ids = [f"item {k:03d}" for k in item] if kind == "string" else list(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": user, "item_id": ids, "timestamp": time}), path)
    return str(path)


def first_day(num: int = 2000) -> list[Event]:
    """Events on items 10 .. 49 and 90 .. 93."""
    draw = random.Random(1)
    items = [*range(10, 50), *range(90, 94)]
    return [(draw.randrange(60), draw.choice(items), draw.randrange(400)) for _ in range(num)]


def second_day(num: int = 2000) -> list[Event]:
    """Events on items 0 .. 49: 0 .. 9 are new, 90 .. 93 have vanished."""
    draw = random.Random(2)
    return [(draw.randrange(60), int(50 * draw.random()), draw.randrange(400)) for _ in range(num)]


def prepared(folder: Path, events: list[Event], kind: str = "int64", **options: Any) -> Path:
    """A folder prepared from ``events``."""
    log = write_log(folder.parent / f"{folder.name}.parquet", events, kind)
    prepare(PrepareConfig(events=log, output=str(folder), **options))
    return folder


@pytest.fixture(scope="module")
def first_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first day, prepared with ids of each kind."""
    return {
        kind: prepared(tmp_path_factory.mktemp(kind) / "first", first_day(), kind) for kind in KINDS
    }


def catalog(folder: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(folder / "items.parquet").to_pydict()
    return columns


def sequences(folder: Path) -> dict[Any, list[Any]]:
    ids = catalog(folder)["item_id"]
    rows = [
        row
        for name in ("train/part-00000.parquet", "test.parquet")
        for row in pq.read_table(folder / name).to_pylist()
    ]
    return {(row["user_id"], "targets" in row): [ids[k] for k in row["items"]] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_item_events", [0, 30])
def test_old_items_keep_their_index_and_new_ones_follow(
    tmp_path: Path, first_folders: dict[str, Path], kind: str, min_item_events: int
) -> None:
    first = first_folders[kind]
    second = prepared(
        tmp_path / "second",
        second_day(),
        kind,
        items=str(first / "items.parquet"),
        min_item_events=min_item_events,
    )
    alone = prepared(tmp_path / "alone", second_day(), kind, min_item_events=min_item_events)
    old, now, fresh = catalog(first), catalog(second), catalog(alone)
    count = len(old["item_id"])
    assert now["item_id"][:count] == old["item_id"]
    assert set(now["item_id"][count:]) == set(fresh["item_id"]) - set(old["item_id"])
    assert now["item"] == list(range(len(now["item"])))
    manifest = read_manifest(second, verify_checksums=True)
    assert manifest.counts["former_items"] == count
    assert manifest.counts["new_items"] == len(now["item"]) - count
    assert manifest.source["items"]["fingerprint"] == read_manifest(first).fingerprint
    if min_item_events:
        assert 0 < manifest.counts["items_dropped"] < 10  # of the new ones only
        return
    counts = dict(zip(now["item_id"], now["count"], strict=True))
    assert {i: n for i, n in counts.items() if n} == {
        i: n for i, n in zip(fresh["item_id"], fresh["count"], strict=True) if n
    }
    vanished = set(old["item_id"]) - set(fresh["item_id"])
    assert len(vanished) == 4 and not any(counts[item] for item in vanished)
    assert manifest.counts["former_items_without_training_events"] == 4
    assert sequences(second) == sequences(alone)


def test_items_keep_their_index_over_three_folders(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "day-0", first_day())
    old = catalog(folder)["item_id"]
    for day, events in enumerate([second_day(), first_day(900)], 1):
        folder = prepared(tmp_path / f"day-{day}", events, items=str(folder / "items.parquet"))
    assert catalog(folder)["item_id"][: len(old)] == old


def test_new_items_are_spread_among_themselves() -> None:
    counts = (1e6 / np.arange(10, 4010)).astype(np.int64)
    np.random.default_rng(0).shuffle(counts)
    former = np.append(np.random.default_rng(1).permutation(2000), np.full(2000, -1))
    order = index_order(counts, np.arange(4000), former, False)
    assert sorted(order.tolist()) == list(range(4000))
    assert np.array_equal(former[order[:2000]], np.arange(2000))
    for num_ranks in (2, 3, 4, 8):
        new = load_per_rank(counts[order[2000:]], num_ranks)
        assert 0.88 < min(new) * num_ranks <= max(new) * num_ranks < 1.12


def test_an_uneven_load_is_reported_and_rebalance_fixes_it(
    tmp_path: Path, first_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = first_folders["int64"]
    events = [(user, 100 + item % 40, time) for user, item, time in second_day()]
    items = str(first / "items.parquet")
    second = prepared(tmp_path / "second", events, items=items)
    manifest = read_manifest(second)
    assert largest_load(manifest.load_per_rank)[0] > TOO_UNEVEN
    assert "prepare with rebalance would make it 1." in caplog.text
    caplog.clear()
    third = prepared(tmp_path / "third", events, items=items, rebalance=True)
    assert largest_load(read_manifest(third).load_per_rank)[0] < TOO_UNEVEN
    assert not caplog.text
    table = pq.read_table(third / "item_map.parquet").to_pydict()
    ids = catalog(third)["item_id"]
    assert table["former_item"] == list(range(len(table["item"])))
    assert [ids[item] for item in table["item"]] == catalog(first)["item_id"]
    assert table["item"] != table["former_item"]
    assert (
        read_manifest(third, verify_checksums=True).file("item_map.parquet").rows == len(ids) - 40
    )
    assert sequences(third) == sequences(second)


def test_an_uneven_load_that_no_order_can_fix_gets_no_advice() -> None:
    counts = np.array([1000, *[1] * 99])
    said = describe_uneven_load(counts)
    assert said is not None and "a few items have very many" in said
    assert describe_uneven_load(np.ones(800, np.int64)) is None


def test_the_same_again_does_nothing_and_other_items_are_refused(tmp_path: Path) -> None:
    first = prepared(tmp_path / "first", first_day())
    config = PrepareConfig(
        events=write_log(tmp_path / "log.parquet", second_day()),
        output=str(tmp_path / "second"),
        items=str(first / "items.parquet"),
    )
    assert prepare_once(config).is_new
    assert not prepare_once(config).is_new
    shutil.rmtree(first)
    prepared(tmp_path / "first", first_day(1900))
    with pytest.raises(FileExistsError, match="which differs in items;"):
        prepare(config)


def test_a_folder_can_be_replaced_by_one_that_keeps_its_items(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "data", first_day())
    old = catalog(folder)["item_id"]
    prepared(folder, second_day(), items=str(folder / "items.parquet"), force=True)
    assert catalog(folder)["item_id"][: len(old)] == old
    assert Counter(path.name for path in tmp_path.iterdir()) == Counter(["data", "data.parquet"])


def refused(tmp_path: Path, items: Path, error: type[Exception] = ValueError) -> str:
    """The message for an unusable file of items, which leaves no other file."""
    log = write_log(tmp_path / "log.parquet", second_day())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        prepare(PrepareConfig(events=log, output=str(tmp_path / "out"), items=str(items)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


def test_ids_of_another_type_are_refused(tmp_path: Path, first_folders: dict[str, Path]) -> None:
    said = refused(tmp_path, first_folders["string"] / "items.parquet")
    assert "items must have ids of the log's type, int64, got string" in said


def test_a_damaged_file_is_refused_with_its_folder_and_alone(tmp_path: Path) -> None:
    path = prepared(tmp_path / "first", first_day()) / "items.parquet"
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data[place.data_page_offset + place.total_compressed_size - 3] ^= 1
    path.write_bytes(bytes(data))
    assert "SHA-256" in refused(tmp_path, path)
    alone = tmp_path / "items.parquet"
    path.rename(alone)
    assert "items.parquet, row group 0, column item_id must be readable" in refused(tmp_path, alone)
    alone.write_bytes(bytes(data[:-9]))
    assert "readable Parquet footer" in refused(tmp_path, alone)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": [5, 6, 5], "item": [0, 1, 2]}, "must name each id once, got 5"),
        ({"item_id": [5, 6, 7], "item": [0, 2, 1]}, "column item must count from 0"),
        ({"item_id": [5, None, 7], "item": [0, 1, 2]}, "must have no nulls"),
        ({"item_id": [5, 6, 7], "index": [0, 1, 2]}, "without item;"),
    ],
    ids=["twice", "another order", "null", "no column"],
)
def test_a_file_that_prepare_did_not_write_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    assert message in refused(tmp_path, tmp_path / "items.parquet")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "check the path" in refused(tmp_path, tmp_path / "no.parquet", FileNotFoundError)
    assert "; choose " in refused(tmp_path, tmp_path, FileNotFoundError)


def test_rebalance_needs_items() -> None:
    with pytest.raises(ValueError, match="rebalance must come with items"):
        PrepareConfig(events="log", output="out", rebalance=True)
