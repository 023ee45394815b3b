"""Read and sort a log on Spark: the phases of ``pipeline/log/sort.py``, each over all executors.

The tasks read the files with the readers of the other engine, so both take and refuse the same. The
order of the users is that of the same hash, so both write the same order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.engine import Source
from shardrec.pipeline.log.item_indices import FormerItems
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.repetition import Repetition, Repetitions, tie_aligned
from shardrec.pipeline.log.sort import TIME_CELLS, require_events, time_of_share
from shardrec.pipeline.spark.workspace import (
    SPARK_TYPES,
    Batches,
    Tallies,
    Workspace,
    guarded,
)

__all__ = ["SparkLog", "sort_log"]

Array = npt.NDArray[np.int64]
_PART_ROWS = 2_000_000
_HASH_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SparkLog:
    """A log sorted by user and time, as tables.

    Attributes:
        users: user (number in the seeded order of the hash) and user_id.
        items: item (number in the order of the ids), item_id, and former, the earlier index or -1.
        events: user, item, place (0, 1, 2, ... inside a user), time, and weight if there is one.
        num_users: rows of ``users``.
        num_items: rows of ``items``.
        num_events: rows of ``events``.
        time_range: the first and the last time.
        repetition: numbers of events that tie, repeat or duplicate another one.
    """

    users: DataFrame
    items: DataFrame
    events: DataFrame
    num_users: int
    num_items: int
    num_events: int
    time_range: tuple[int, int]
    repetition: Repetition

    def time_at(self, share: float) -> int:
        """The time of event floor(share * events) in global time order."""
        return time_of_share(share, self.num_events, self.time_range, self._count_times)

    def _count_times(self, low: int, high: int, width: int) -> tuple[int, Array]:
        # Two times may lie 2**64 apart: such distances are decimals, which take ten times as long.
        whole = f"CAST({{}} AS {'BIGINT' if high - low < 2**63 else 'DECIMAL(20, 0)'})".format
        cell = F.expr(f"({whole('time')} - {whole(repr(str(low)))}) DIV {whole(width)}")
        cell = F.when(F.col("time") < low, F.lit(-1)).otherwise(cell).alias("cell")
        inside = self.events.filter(F.col("time") <= high)
        found = dict(inside.groupBy(cell).count().collect())
        below, counts = found.pop(-1, 0), np.zeros(TIME_CELLS, np.int64)
        counts[list(found)] = list(found.values())
        return below, counts


def sort_log(workspace: Workspace, source: Source, config: PrepareConfig) -> SparkLog:
    """Read the log once and sort it.

    Raises:
        ValueError: a value of the log is invalid, no event is left, or the former items are not
            those of a prepared folder.
    """
    log = source.log
    events = _read(workspace, log)
    seed = f"{config.seed}:"
    key = _hash_key(F.concat(F.lit(seed), F.col("user_id").cast("string")))
    users = workspace.hold(events.select("user_id").distinct().withColumn("key", key))
    users, num_users = workspace.numbered(users, "user", "key", "user_id")
    users = workspace.hold(users.drop("key"))  # small, so that it may be broadcast
    items, num_items = _number_items(workspace, events, source.former)
    found = Tallies(workspace)
    ordered = _ordered(events, users, items, config, log.columns.has_weights)
    schema = "user bigint, item bigint, place bigint, time bigint"
    schema += ", weight float" if log.columns.has_weights else ""
    reduced = workspace.hold(ordered.mapInArrow(guarded(_reduce(config, found)), schema))
    row = reduced.agg(F.count("*"), F.min("time"), F.max("time")).head()
    assert row is not None
    count, first, last = row
    return SparkLog(
        users=users,
        items=items,
        events=reduced,
        num_users=num_users,
        num_items=num_items,
        num_events=count,
        time_range=(first, last),
        repetition=sum(found.by_task().values(), Repetition()),
    )


def _read(workspace: Workspace, log: EventLog) -> DataFrame:
    """The checked events; what the tasks have seen of the log is added to ``log``."""
    parts = log.parts(_PART_ROWS)
    seen = Tallies(workspace)

    def read(index: int) -> Iterator[pa.RecordBatch]:
        part = parts[index]
        for table in part.small_tables():
            yield from _narrow(table).to_batches()
        seen.add(replace(part, inputs=()), index)

    user, item = SPARK_TYPES[log.user_type], SPARK_TYPES[log.item_type]
    weight = ", weight float" if log.columns.has_weights else ""
    schema = f"user_id {user}, item_id {item}, time bigint, row bigint, event int{weight}"
    events = workspace.hold(workspace.tasks(len(parts), read, schema))
    num_events = events.count()
    for index, part in seen.by_task().items():
        log.add(part, parts[index].events_read)
    require_events(num_events, log)
    log.report_missing_types()
    return events


def _narrow(table: pa.Table) -> pa.Table:
    """With text as Spark has it, which a table of few rows can always be."""
    fields = [
        field.with_type(pa.string()) if field.type == pa.large_string() else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _hash_key(text: Column) -> Column:
    """Text whose order is that of DuckDB's md5_number: the digest with its last byte first."""
    digest = F.md5(text)
    pairs = range(2 * _HASH_BYTES - 1, 0, -2)
    return F.concat(*(F.substring(digest, place, 2) for place in pairs))


def _number_items(
    workspace: Workspace, events: DataFrame, former: FormerItems | None
) -> tuple[DataFrame, int]:
    """Number the items of the log and the former ones, by id."""
    ids = events.select("item_id").distinct()
    if former is None:
        ids = ids.withColumn("former", F.lit(-1).cast("bigint"))
    else:
        ids = ids.join(_former_items(workspace, former), "item_id", "full").fillna(-1, ["former"])
    return workspace.numbered(workspace.hold(ids), "item", "item_id")


def _former_items(workspace: Workspace, former: FormerItems) -> DataFrame:
    def read(index: int) -> Iterator[pa.RecordBatch]:
        table = former.table(former.groups(), index).rename_columns(["item_id", "former"])
        yield from table.to_batches()

    schema = f"item_id {SPARK_TYPES[former.kind]}, former bigint"
    items = workspace.hold(workspace.tasks(len(former.groups()), read, schema))
    counts = items.groupBy("item_id").count()
    former.require_once(counts.filter(F.col("count") > 1).select("item_id").head())
    return items


def _ordered(
    events: DataFrame,
    users: DataFrame,
    items: DataFrame,
    config: PrepareConfig,
    has_weights: bool,
) -> DataFrame:
    """User, item, time, event and weight: all of a user in one partition, in order."""
    columns = ["user", "item", "time", "event", *(["weight"] if has_weights else [])]
    joined = events.join(items.drop("former"), "item_id").join(users, "user_id")
    ties = ["row"]
    if config.ties == "shuffle":
        ids = [F.col(name).cast("string") for name in ("user_id", "item_id", "time")]
        key = _hash_key(F.concat_ws(":", F.lit(str(config.seed)), *ids))
        joined, ties = joined.withColumn("key", key), ["key", "event", "row"]
    kept = joined.select(*columns, *(name for name in ties if name not in columns))
    return kept.repartition("user").sortWithinPartitions("user", "time", *ties).select(*columns)


def _places(user: Array, last: tuple[int, int]) -> Array:
    """0, 1, 2, ... inside each user, who stand together; ``last`` is the user before, and how many.

    Example:
        >>> _places(np.array([7, 7, 8]), (7, 5)).tolist()
        [5, 6, 0]
    """
    first = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    starts = first.copy()
    starts[0] = -last[1] if user[0] == last[0] else 0
    places: Array = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(first, len(user))))
    return places


def _reduce(config: PrepareConfig, found: Tallies) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    """Drops duplicates and repeats as the other engine does, and numbers the places."""

    def reduce(batches: Batches) -> Iterator[pa.RecordBatch]:
        repetitions = Repetitions(config.keep_duplicates, config.drop_repeats)
        last = (-1, 0)
        for columns in tie_aligned(batch for batch in batches if batch.num_rows):
            user, item, time, _, *weight = repetitions.reduce(columns)
            if not len(user):
                continue
            places = _places(user, last)
            last = (int(user[-1]), int(places[-1]) + 1)
            arrays = [user, item, places, time, *weight]
            names = ["user", "item", "place", "time", "weight"][: len(arrays)]
            yield pa.RecordBatch.from_arrays([pa.array(array) for array in arrays], names)
        found.add(repetitions.total)

    return reduce
