"""Prepare a log on Spark: the same folder as by DuckDB, for logs that one machine cannot sort.

The driver plans and counts; events, users and items stay on the executors and in a folder that they
share, next to the output. What comes back to it is
one number a partition, the different values of counts, at most 65,536 cells of times, and an entry
a file. ``prepare_spark`` works inside somebody's own session; ``prepare --engine spark`` makes one.
"""

import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.engine import (
    Content,
    Folders,
    Histogram,
    Source,
    require_training_users,
)
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.write import LEAST_TO_TRAIN
from shardrec.pipeline.prepare import Preparation, prepare_with
from shardrec.pipeline.prepared.manifest import Manifest
from shardrec.pipeline.spark.catalog import histogram, index_items
from shardrec.pipeline.spark.sort import SparkLog, sort_log
from shardrec.pipeline.spark.split import split_log
from shardrec.pipeline.spark.workspace import Workspace, map_on_executors, refusals
from shardrec.pipeline.spark.write import write_item_map, write_items, write_sequences

__all__ = ["prepare_in_own_session", "prepare_spark"]


def prepare_spark(spark: SparkSession, config: PrepareConfig) -> Manifest:
    """Prepare a log in a session; returns the manifest of ``config.output``.

    The session's settings stay as they are. All executors must see ``config.output``, and the log,
    under the same paths as the driver.

    Args:
        spark: a classic session (no Spark Connect), whose executors can import shardrec.
        config: as for ``prepare``, with ``engine="spark"`` and no master.

    Raises:
        ValueError: as ``prepare``; or an option is one that Spark does not have.
        FileNotFoundError, FileExistsError, OSError: as ``prepare``.
    """
    if config.engine != "spark" or config.master is not None:
        raise ValueError(
            f"config must have engine='spark' and no master, got engine={config.engine!r}, "
            f"master={config.master!r}; the session has a master already"
        )
    return _prepare(spark, config).manifest


def prepare_in_own_session(config: PrepareConfig) -> Preparation:
    """Prepare a log in a new session on ``config.master``; see ``prepare_once``."""
    builder = SparkSession.builder.appName("shardrec prepare")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    if config.master is not None:
        builder = builder.master(config.master)
    spark = builder.getOrCreate()
    try:
        spark.sparkContext.setLogLevel("FATAL")  # what fails is raised and said once
        return _prepare(spark, config)
    finally:
        spark.stop()


def _prepare(spark: SparkSession, config: PrepareConfig) -> Preparation:
    with _stopped_on_failure(spark):
        return prepare_with(_Spark(spark), config)


@contextlib.contextmanager
def _stopped_on_failure(spark: SparkSession) -> Iterator[None]:
    """Context manager: jobs begun in it do not go on when it is left by an exception."""
    context, tag = spark.sparkContext, f"shardrec-{uuid.uuid4().hex}"
    context.addJobTag(tag)
    try:
        yield
    except BaseException:
        context.cancelJobsWithTag(tag)
        raise
    finally:
        context.removeJobTag(tag)


class _Spark:
    """See ``Engine``."""

    def __init__(self, spark: SparkSession) -> None:
        self.spark = spark

    def open(self, source: str, columns: EventColumns) -> EventLog:
        """The log, whose files are opened on the executors; see ``EventLog.open``."""
        with refusals():
            return EventLog.open(source, columns, functools.partial(map_on_executors, self.spark))

    def write(self, config: PrepareConfig, source: Source, folders: Folders) -> Content:
        """Write everything but the manifest; see ``Engine``."""
        with refusals():
            folder = folders.output.absolute()
            _require_shared(self.spark, folder, config.output)
            workspace = Workspace(self.spark, folders.work.absolute())
            log = sort_log(workspace, source, config)
            split = split_log(workspace, log, config, source.log.time_type)
            require_training_users(split.num_train, config)
            has_former = source.former is not None
            catalog = index_items(workspace, split, has_former, config.rebalance)
            if catalog.uneven:
                logging.getLogger(__name__).warning(catalog.uneven)
            files = [write_items(folder, catalog)]
            if config.rebalance and has_former:
                files.append(write_item_map(folder, catalog))
            written, targets = write_sequences(workspace, folder, log, split, catalog, config)
            lengths = histogram(
                split.users.filter(F.col("train_end") >= LEAST_TO_TRAIN), "train_end"
            )
            return Content(
                test_time=split.test_time,
                validation_time=split.validation_time,
                num_events=log.num_events,
                repetition=log.repetition,
                events_in_catalog=split.events_in_catalog,
                former_counts=catalog.former_counts,
                counts=split.counts
                | _item_counts(log, catalog.counts)
                | targets
                | _train_counts(lengths),
                lengths=lengths,
                item_counts=catalog.counts,
                load_per_rank=catalog.load_per_rank,
                files=(*files, *written),
            )


def _require_shared(spark: SparkSession, folder: Path, output: str) -> None:
    """Refuse an output that some executor does not see, as far as a job of few tasks shows."""
    count = 2 * spark.sparkContext.defaultParallelism
    if not all(map_on_executors(spark, _is_writable, [str(folder)] * count)):
        raise ValueError(
            f"output must be in a folder that the driver and all executors share, got {output!r}, "
            "which an executor does not see or may not write; mount one on all of them"
        )


def _is_writable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


def _item_counts(log: SparkLog, counts: Histogram) -> dict[str, int]:
    items = int(counts.counts.sum())
    return {
        "items": items,
        "items_dropped": log.num_items - items,
        "items_without_training_events": int(counts.counts[counts.values == 0].sum()),
        "train_events": int((counts.values * counts.counts).sum()),
    }


def _train_counts(lengths: Histogram) -> dict[str, int]:
    return {
        "train_sequences": int(lengths.counts.sum()),
        "train_sequence_events": int((lengths.values * lengths.counts).sum()),
    }
