"""Prepare on Spark writes byte for byte what DuckDB writes, or refuses in the same words."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.prepare import prepare
from shardrec.pipeline.prepared.manifest import Manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

HAS_SPARK = importlib.util.find_spec("pyspark") is not None and shutil.which("java") is not None
needs_spark = pytest.mark.skipif(not HAS_SPARK, reason="needs shardrec[spark] and Java")


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    from pyspark.sql import SparkSession

    settings = {
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "3",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.memory": "600m",
    }
    session = SparkSession.builder.config(map=settings).getOrCreate()
    session.sparkContext.setLogLevel("FATAL")
    yield session
    session.stop()


def write_random_log(folder: Path, seed: int, *, users: int = 400, text: bool = True) -> str:
    """Two files: ties, repeats, duplicates, one user and one item with a tenth of all events."""
    draw = random.Random(seed)
    events = []
    for _ in range(12 * users):
        user = 0 if draw.random() < 0.1 else draw.randrange(users)
        item = 7 if draw.random() < 0.1 else int(90 * draw.random() ** 2)
        events.append((user, item, draw.randrange(500), draw.choice(["view", "buy", "see"])))
    events += draw.sample(events, users // 3)
    folder.mkdir()
    for part, chosen in enumerate((events[: 5 * users], events[5 * users :])):
        user_ids, item_ids, times, kinds = zip(*chosen, strict=True)
        table = {
            "user_id": [f"ü{user}" for user in user_ids] if text else list(user_ids),
            "item_id": list(item_ids) if text else [f"{item % 10}-{item}" for item in item_ids],
            "timestamp": pa.array([time * 10**6 for time in times], pa.timestamp("us")),
            "kind": kinds,
        }
        pq.write_table(pa.table(table), folder / f"part-{part}.parquet", row_group_size=1000)
    return str(folder)


def on_both(
    spark: SparkSession, folder: Path, events: str, **options: Any
) -> tuple[Manifest, Manifest]:
    from shardrec.pipeline.spark.prepare import prepare_spark

    config = PrepareConfig(events=events, output=str(folder / "duckdb"), **options)
    found = prepare(config)
    other = dataclasses.replace(config, output=str(folder / "spark"), engine="spark")
    return found, prepare_spark(spark, other)


def require_equal(found: Manifest, other: Manifest) -> None:
    for part in ("config", "source", "columns", "split", "counts", "quantiles", "load_per_rank"):
        assert getattr(other, part) == getattr(found, part), part
    assert other.files == found.files
    assert other.fingerprint == found.fingerprint


@needs_spark
@pytest.mark.spark
def test_both_engines_write_the_same_bytes(spark: SparkSession, tmp_path: Path) -> None:
    first = write_random_log(tmp_path / "first", 0, users=60)
    prepare(PrepareConfig(events=first, output=str(tmp_path / "before"), min_item_events=8))
    found, other = on_both(
        spark,
        tmp_path / "out",
        write_random_log(tmp_path / "second", 1),
        items=str(tmp_path / "before" / "items.parquet"),
        event_column="kind",
        event_weights=("view=1", "buy=3"),
        ties="shuffle",
        min_item_events=20,
        sequences_per_row_group=1,  # 256 sequences a file
    )
    require_equal(found, other)
    assert len([entry for entry in found.files if entry.path.startswith("train/")]) > 1
    assert found.counts["validation_users"] > 10
    assert found.counts["former_items"] and found.counts["items_dropped"]
    settings = spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch")
    assert settings == "10000"  # those of the user's session stay


@needs_spark
@pytest.mark.spark
def test_what_duckdb_refuses_spark_refuses_in_the_same_words(
    spark: SparkSession, tmp_path: Path
) -> None:
    broken = {"user_id": [1, 1, None], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table(broken), log)
    with pytest.raises(ValueError, match="must have no nulls") as by_duckdb:
        prepare(PrepareConfig(events=str(log), output=str(tmp_path / "out")))
    from shardrec.pipeline.spark.prepare import prepare_spark

    config = PrepareConfig(events=str(log), output=str(tmp_path / "out"), engine="spark")
    with pytest.raises(ValueError, match="must have no nulls") as by_spark:
        prepare_spark(spark, config)
    assert str(by_spark.value) == str(by_duckdb.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"memory_limit": "1GB"}, {"threads": 2}, {"item_attributes": "a.parquet"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_spark_does_not_have_are_refused_by_name(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must come with engine=duckdb"):
        PrepareConfig(events=".", output="out", engine="spark", **options)


def test_a_master_needs_the_engine() -> None:
    with pytest.raises(ValueError, match="master must come with engine=spark"):
        PrepareConfig(events=".", output="out", master="local[2]")
