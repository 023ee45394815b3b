"""The catalog on Spark: training events and dense index of each item."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from shardrec.pipeline.log.engine import Histogram
from shardrec.pipeline.prepared.balance import (
    NUMBERS_OF_RANKS,
    describe_uneven_loads,
    load_shares,
    spread_keys,
)
from shardrec.pipeline.spark.split import Split
from shardrec.pipeline.spark.workspace import Batches, Workspace, guarded

__all__ = ["Catalog", "index_items"]

_COLUMNS = ("item", "item_id", "former", "count")


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """The items with their dense indices.

    Attributes:
        items: item, item_id, former, count (training events) and index.
        counts: different counts, and how many items have each.
        load_per_rank: as in the manifest.
        uneven: a warning if the load is uneven.
        former_counts: numbers of former and new items, by their names in the manifest.
    """

    items: DataFrame
    counts: Histogram
    load_per_rank: dict[str, list[float]]
    uneven: str | None
    former_counts: dict[str, int]


def index_items(workspace: Workspace, split: Split, has_former: bool, rebalance: bool) -> Catalog:
    """Count the training events and assign the indices, as ``index_order`` does."""
    trains = split.events.join(split.users.select("user", "train_end"), "user")
    trains = trains.filter(F.col("position") < F.col("train_end"))
    counts = trains.groupBy("item").agg(F.count("*").alias("count"))
    joined = split.items.join(counts, "item", "left").fillna(0, ["count"])
    items = workspace.hold(joined.select(*_COLUMNS))
    if has_former and not rebalance:
        former = items.filter("former >= 0").withColumn("index", F.col("former"))
        spread = _spread(workspace, items.filter("former < 0"), former.count())
        indexed = former.unionByName(spread)
    else:
        indexed = _spread(workspace, items, 0)
    indexed = workspace.hold(indexed)
    load = _loads(indexed, split.num_items)
    return Catalog(
        items=indexed,
        counts=histogram(items, "count"),
        load_per_rank=load,
        uneven=describe_uneven_loads(
            load, lambda: _loads(_spread(workspace, items, 0), split.num_items)
        ),
        former_counts=_former_counts(items) if has_former else {},
    )


def histogram(table: DataFrame, name: str) -> Histogram:
    """The different values of a column: of sums over users or items, few even where those are many.

    All events together bound their sum, so there are at most sqrt(2 * events) of them.
    """
    found = table.groupBy(name).agg(F.count("*")).orderBy(name).collect()
    values, counts = zip(*found, strict=True) if found else ((), ())
    return Histogram(np.array(values, np.int64), np.array(counts, np.int64))


def _spread(workspace: Workspace, items: DataFrame, first: int) -> DataFrame:
    """With the index from ``first`` on, spread by popularity as ``spread_by_popularity`` does."""
    ranked, count = workspace.numbered(items, "rank", F.desc("count"), F.asc("item"))

    def add_keys(batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            keys = spread_keys(batch.column("rank").to_numpy(), count)
            place = batch.schema.get_field_index("rank")
            yield batch.set_column(place, "rank", pa.array(keys))

    schema = ", ".join(f"`{name}` {dtype}" for name, dtype in ranked.dtypes)
    keyed = ranked.mapInArrow(guarded(add_keys), schema).withColumnRenamed("rank", "key")
    spread, _ = workspace.numbered(keyed, "index", "key")
    return spread.drop("key").withColumn("index", F.col("index") + first)


def _loads(items: DataFrame, num_items: int) -> dict[str, list[float]]:
    """``loads`` of the balance module."""
    shares = {}
    for ranks in NUMBERS_OF_RANKS:
        rows = -(-num_items // ranks)
        rank = F.expr(f"index div {rows}").alias("rank")
        found = dict(items.groupBy(rank).agg(F.sum("count")).collect())
        shares[str(ranks)] = load_shares([found.get(rank, 0) for rank in range(ranks)])
    return shares


def _former_counts(items: DataFrame) -> dict[str, int]:
    is_former = F.col("former") >= 0
    row = items.agg(
        F.count_if(is_former), F.count_if(is_former & (F.col("count") == 0)), F.count_if(~is_former)
    ).head()
    assert row is not None
    names = ("former_items", "former_items_without_training_events", "new_items")
    return dict(zip(names, row, strict=True))
