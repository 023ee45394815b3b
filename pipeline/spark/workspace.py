"""Spark tables and tasks: what is held on the executors, rows numbered in an order, refusals."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyspark import AccumulatorParam, TaskContext
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

__all__ = ["SPARK_TYPES", "Tallies", "Workspace", "guarded", "map_on_executors", "refusals"]

# Of a session of our own, so that those of the user's session stay as they are.
_SETTINGS = {
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.adaptive.skewJoin.enabled": "true",  # an item with a tenth of all events
    # Joins with users and items need no sort of the events where a partition's part fits.
    "spark.sql.adaptive.maxShuffledHashJoinLocalMapThreshold": "64MB",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16384",
    "spark.sql.execution.arrow.maxBytesPerBatch": "67108864",
    "spark.sql.execution.arrow.useLargeVarTypes": "false",
}
SPARK_TYPES = {"int64": "bigint", "string": "string"}
_TASKS_PER_CORE = 4
_PATTERNS = "*?[]{}\\"
_ROW_BITS = 33  # of monotonically_increasing_id, below the partition
_MARK = "shardrec refuses: "
_ERRORS: dict[str, type[Exception]] = {
    "FileNotFoundError": FileNotFoundError,
    "PermissionError": PermissionError,
    "OSError": OSError,
    "MemoryError": MemoryError,
}

Batches = Iterable[pa.RecordBatch]
Result = TypeVar("Result")


class Workspace:
    """A session within the user's, and the tables that it holds in a folder.

    Attributes:
        session: has settings and temporary names of its own, and shares everything else.
        folder: a temporary one that all executors see.
    """

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        """Make the session.

        Raises:
            ValueError: the path of the folder has characters that Spark takes for a pattern.
        """
        if set(str(folder)) & set(_PATTERNS):
            raise ValueError(
                f"output must be in a folder without any of {' '.join(_PATTERNS)}, got "
                f"{str(folder.parent)!r}; move it"
            )
        self.session = spark.newSession()
        for name, value in _SETTINGS.items():
            self.session.conf.set(name, value)
        self.folder = folder
        self._num_held = 0

    def hold(self, table: DataFrame) -> DataFrame:
        """The table, computed once and then read from the folder.

        Not ``persist``: plans of tables that build on each other grow without bound, and what lies
        on an executor goes with it.
        """
        path = f"file://{self.folder}/table-{self._num_held}"
        self._num_held += 1
        table.write.parquet(path)
        return self.session.read.schema(table.schema).parquet(path)

    def tasks(self, count: int, work: Callable[[int], Batches], schema: str) -> DataFrame:
        """The rows that ``work`` makes on the executors for 0 .. count - 1, a task for each."""

        def run(batches: Batches) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for index in batch.column(0).to_pylist():
                    yield from work(index)

        numbers = self.session.range(0, count, 1, max(count, 1))
        return numbers.mapInArrow(guarded(run), schema)

    def numbered(self, table: DataFrame, name: str, *order: str | Column) -> tuple[DataFrame, int]:
        """The rows with their place 0, 1, 2, ... in an order without ties, and how many they are.

        Only the number of rows in each partition comes to the driver.
        """
        ordered = self.hold(
            table.orderBy(*order).withColumn("_place", F.monotonically_increasing_id())
        )
        part = f"CAST(shiftright(_place, {_ROW_BITS}) AS INT)"
        sizes = dict(ordered.groupBy(F.expr(part)).count().collect())
        shifts, total = ["0L"], 0
        for index in range(max(sizes, default=-1) + 1):
            shifts[index:] = [f"{total - (index << _ROW_BITS)}L"]
            total += sizes.get(index, 0)
        number = F.expr(f"_place + array({', '.join(shifts)})[{part}]")
        return ordered.select(*table.columns, number.alias(name)), total


def map_on_executors(
    spark: SparkSession, function: Callable[[Any], Result], arguments: Iterable[Any]
) -> list[Result]:
    """Like the built-in ``map``, on the executors; arguments and results are few and small."""
    arguments, context = list(arguments), spark.sparkContext
    slices = min(len(arguments), _TASKS_PER_CORE * context.defaultParallelism)
    run = guarded(functools.partial(map, function))
    results = context.parallelize(arguments, max(slices, 1)).mapPartitions(run).collect()
    return list(results)


class Tallies:
    """What the tasks of a table count, by task: one that runs again counts once."""

    def __init__(self, workspace: Workspace) -> None:
        """Begin with nothing."""
        self._found = workspace.session.sparkContext.accumulator({}, _ByTask())

    def add(self, value: Any, task: int | None = None) -> None:
        """In a task: what it has counted; by its partition, if it has no other number."""
        context = TaskContext.get()
        assert context is not None
        self._found.add({context.partitionId() if task is None else task: value})

    def by_task(self) -> dict[int, Any]:
        """On the driver, once the table has been computed."""
        return dict(self._found.value)


class _ByTask(AccumulatorParam[dict[int, Any]]):
    def zero(self, value: dict[int, Any]) -> dict[int, Any]:
        return {}

    def addInPlace(self, value1: dict[int, Any], value2: dict[int, Any]) -> dict[int, Any]:
        return {**value1, **value2}


def guarded(
    work: Callable[[Iterable[Any]], Iterable[Any]],
) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """The same work, whose errors ``refusals`` finds again on the driver."""

    def run(rows: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from work(rows)
        except (ValueError, OSError, MemoryError) as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            said = [kinds, str(error), getattr(error, "errno", None)]
            raise RuntimeError(_MARK + json.dumps(said)) from error

    return run


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Context manager: an error of the work on an executor is raised as it was raised there."""
    try:
        yield
    except Exception as error:
        _, mark, rest = str(error).partition(_MARK)
        if not mark:
            raise
        (kinds, text, number), _ = json.JSONDecoder().raw_decode(rest)
        raise _same_error(kinds, text, number) from None


def _same_error(kinds: Sequence[str], text: str, number: int | None) -> Exception:
    kind = next((_ERRORS[name] for name in kinds if name in _ERRORS), ValueError)
    if kind is OSError and number is not None:
        return OSError(number, text)
    return kind(text)
