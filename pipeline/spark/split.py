"""Split a log on Spark: the cuts of ``pipeline/log/split.py`` by sums over each user's events."""

from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.split import (
    LEAST_TO_HOLD_OUT,
    cut_times,
    is_kept,
    num_validation_users,
    require_catalog,
)
from shardrec.pipeline.log.write import LEAST_TO_TRAIN
from shardrec.pipeline.spark.sort import SparkLog
from shardrec.pipeline.spark.workspace import Workspace

__all__ = ["Split", "split_log"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A log with its cuts.

    Attributes:
        test_time, validation_time: as in ``Cuts``.
        items: the catalog: the rows of ``SparkLog.items`` that are kept.
        num_items: rows of ``items``.
        users: of kept users: user, total, train_end, test_start (as in ``Cuts``), and train_row,
            the row in the training files, null without one.
        num_train: training sequences.
        events: those of ``items``, also of users who are not kept: user, item, position in the
            sequence, and weight.
        events_in_catalog: events of ``items``, with those of dropped users.
        counts: numbers of users, by their names in the manifest.
    """

    test_time: int | None
    validation_time: int | None
    items: DataFrame
    num_items: int
    users: DataFrame
    num_train: int
    events: DataFrame
    events_in_catalog: int
    counts: dict[str, int]


def split_log(workspace: Workspace, log: SparkLog, config: PrepareConfig, time_type: str) -> Split:
    """Choose the catalog and the cut positions of every user; see ``Split``.

    Raises:
        ValueError: a cut is not inside the log, or the catalog has fewer than two items.
    """
    test_time = validation_time = None
    if config.split == "temporal":
        test_time, validation_time = cut_times(log, config, time_type)
    items, num_items = _kept_items(workspace, log, config, test_time)
    require_catalog(num_items)
    events = log.events
    placed = events.drop("time").withColumnRenamed("place", "position")
    if num_items < log.num_items:
        events = events.join(items.select("item"), "item", "left_semi")
        place = F.row_number().over(Window.partitionBy("user").orderBy("place")) - 1
        placed = events.withColumn("position", place.cast("bigint")).drop("place", "time")
        placed = workspace.hold(placed)
    users = _cut_users(workspace, events, config, test_time, validation_time)
    trains = F.col("kept") & (F.col("train_end") >= LEAST_TO_TRAIN)
    rows, num_train = workspace.numbered(users.filter(trains).select("user"), "train_row", "user")
    kept = workspace.hold(users.filter("kept").drop("kept").join(rows, "user", "left"))
    counts, in_catalog = _count_users(users, log.num_users)
    return Split(
        test_time=test_time,
        validation_time=validation_time,
        items=items,
        num_items=num_items,
        users=kept,
        num_train=num_train,
        events=placed,
        events_in_catalog=in_catalog,
        counts=counts,
    )


def _kept_items(
    workspace: Workspace, log: SparkLog, config: PrepareConfig, test_time: int | None
) -> tuple[DataFrame, int]:
    """The catalog; filters count events before ``test_time`` or in all."""
    if not config.min_item_events:
        return log.items, log.num_items
    before = log.events if test_time is None else log.events.filter(F.col("time") < test_time)
    counts = before.groupBy("item").agg(F.count("*").alias("before"))
    enough = F.coalesce("before", F.lit(0)) >= config.min_item_events
    joined = log.items.join(counts, "item", "left").filter(enough | (F.col("former") >= 0))
    kept = workspace.hold(joined.drop("before"))
    return kept, kept.count()


def _cut_users(
    workspace: Workspace,
    events: DataFrame,
    config: PrepareConfig,
    test_time: int | None,
    validation_time: int | None,
) -> DataFrame:
    """User, total, train_end, test_start, kept, of users with events in the catalog."""
    sums = [F.count("*").alias("total")]
    for name, time in (("test_start", test_time), ("train_end", validation_time)):
        sums += [] if time is None else [_number(F.col("time") < time).alias(name)]
    users = events.groupBy("user").agg(*sums)
    if test_time is None:
        held_out = (F.col("total") >= LEAST_TO_HOLD_OUT).cast("bigint")
        users = users.withColumn("test_start", F.col("total") - held_out)
    counted = F.col("total" if test_time is None else "test_start")
    users = workspace.hold(users.withColumn("kept", is_kept(counted, config)))
    if validation_time is not None:
        return users
    eligible = F.col("kept") & (counted >= LEAST_TO_HOLD_OUT)
    return _hold_out_validation(workspace, users, eligible, config)


def _hold_out_validation(
    workspace: Workspace, users: DataFrame, eligible: Column, config: PrepareConfig
) -> DataFrame:
    """With train_end: the event before the test part is for validation, of some users."""
    total = users.filter(eligible).count()
    count = num_validation_users(config, total)
    if count in (0, total):
        chosen = eligible if count else F.lit(False)
        return users.withColumn("train_end", F.col("test_start") - chosen.cast("bigint"))
    places, _ = workspace.numbered(users.filter(eligible).select("user"), "number", "user")
    # The numbers i * total // count: i is the least whose share is not below.
    evenly = f"(((number * {count} + {total - 1}) div {total}) * {total}) div {count} = number"
    some = places.filter(F.expr(evenly)).select("user", F.lit(1).cast("bigint").alias("one"))
    held_out = F.coalesce("one", F.lit(0).cast("bigint"))
    joined = users.join(some, "user", "left")
    return workspace.hold(
        joined.withColumn("train_end", F.col("test_start") - held_out).drop("one")
    )


def _number(condition: Column) -> Column:
    return F.coalesce(F.sum(condition.cast("bigint")), F.lit(0))


def _count_users(users: DataFrame, num_users: int) -> tuple[dict[str, int], int]:
    """The numbers of the manifest, and the events of all users."""
    kept, dropped = F.col("kept"), ~F.col("kept")
    found = users.agg(
        F.coalesce(F.sum("total"), F.lit(0)).alias("events"),
        F.coalesce(F.sum(F.when(dropped, F.col("total"))), F.lit(0)).alias("of_dropped"),
        _number(kept).alias("kept"),
        _number(kept & (F.col("train_end") > 0)).alias("train"),
        _number(F.col("test_start") == 0).alias("without_history"),
    ).head()
    assert found is not None
    counts = {
        "events_of_dropped_users": found["of_dropped"],
        "users": found["kept"],
        "users_dropped": num_users - found["kept"],
        "train_users": found["train"],
        "test_users_without_history": found["without_history"],
    }
    return counts, found["events"]
