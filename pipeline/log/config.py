"""Options of the prepare stage, with their ranges and combinations checked."""

import dataclasses
import itertools
import math
import os
import re
from typing import Literal

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.prepared.data_files import check_path

MAX_THREADS = 256
DUCKDB_MEMORY = "512MB"
MAX_GROUP_ROWS = 1 << 30
# Options that do nothing without item_attributes.
ATTRIBUTES = ("attribute_item_column", "attributes", "attribute_numbers", "attribute_buckets")
_COLUMN_OPTIONS = ("user_column", "item_column", "time_column", "event_column", "weight_column")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Options of ``prepare``.

    Attributes:
        events: file, folder, glob, or URI that pyarrow opens, of Parquet, CSV or JSON lines.
        output: folder to write; it must be new, or hold the same result.
        layout: "events" (a row is an event) or "sequences" (a row is a user, and all other columns
            hold lists).
        user_column, item_column, time_column: names of the columns in the log. Ids are non-negative
            integers or strings; times are whole numbers, timestamps, dates or ISO text, in UTC
            unless they have an offset, and rounded down to microseconds. With layout=sequences the
            time column may be none: then only the order of the lists is known, and split must be
            leave_one_out.
        event_column: column that ``event_types`` or ``event_weights`` selects from.
        event_types: values of ``event_column`` to keep; other events are counted and left out. In
            double quotes a value may hold commas and outer blanks.
        event_weights: instead of event_types, values to keep with a weight for each, such as
            view=1,cart=3,buy=5; multiplies the weight of weight_column, if there is one.
        weight_column: column of non-negative numbers that multiply the loss of an event as a
            target.
        split: "temporal" or "leave_one_out".
        test_quantile: share of the events, in global time order, before the test part (0.9).
        test_time: instead of test_quantile, the first time of the test part: a number, or ISO
            text if the log has timestamps (numbers are then microseconds).
        validation: "users", "time" (temporal split only), or "none".
        validation_users: with validation "users", how many; by default all users with
            leave_one_out, else one user in ten and at most 10,000.
        validation_quantile: with validation "time", share of the events before the validation part
            (0.8).
        validation_time: instead of validation_quantile, the first time of the validation part.
        targets: which held-out events of a user are targets: the "last" one, or "all".
        min_user_events: fewest events of a user before the test part (leave_one_out: in total).
        min_item_events: fewest events of an item before the test part (leave_one_out: in total),
            counted before users are dropped.
        keep_duplicates: keep events that equal another one in every column read.
        ties: order of a user's events at the same time: that of the "log", or "shuffle", which
            depends only on user, item, time and seed, because the order of the log may leak the
            future.
        drop_repeats: keep only the first of a user's consecutive events with the same item.
        items: items.parquet of an earlier prepared folder: its items keep their indices, even if
            this log or min_item_events would leave them out; new items get the next indices.
        item_attributes: Parquet with one row per item (file, folder, glob, or URI), for
            catalog.attributes of train. Text, integers, booleans and lists of them are categories,
            floats and times are numbers in buckets, lists of floats are vectors.
        attribute_item_column: column of the item ids in item_attributes; none: the same as
            item_column.
        attributes: columns of item_attributes to read; by default all except the item ids.
        attribute_numbers: integer columns that are numbers and not categories.
        attribute_buckets: largest number of buckets for a number, which hold about equally many
            items each (16).
        admit_items: add items that occur only in item_attributes to the catalog, with 0 training
            events.
        rebalance: with items, give every item a new index, so that popular items are spread evenly
            over the ranks, and write item_map.parquet (former_item, item), which train --init-from
            applies.
        sequences_per_row_group: rows per row group in train, validation and test.
        seed: seed of the order of the users, and of ties=shuffle.
        engine: "duckdb", in this process, or "spark", on a cluster; both write the same files.
        master: with engine=spark, the URL of the master, such as local[4] or spark://host:7077; by
            default the one that Spark is configured for.
        memory_limit: memory limit of DuckDB, such as "512MB"; the process needs about 0.5 GB more.
        threads: threads of DuckDB, at most 256; by default all CPUs available to this process.
        force: prepare again; a prepared folder in output is replaced once the new one is complete.
            Anything else is never replaced.
    """

    events: str
    output: str
    layout: Literal["events", "sequences"] = "events"
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = "timestamp"
    event_column: str | None = None
    event_types: tuple[str, ...] = ()
    event_weights: tuple[str, ...] = ()
    weight_column: str | None = None
    split: Literal["temporal", "leave_one_out"] = "temporal"
    test_quantile: float | None = None
    test_time: int | str | None = None
    validation: Literal["users", "time", "none"] = "users"
    validation_users: int | None = None
    validation_quantile: float | None = None
    validation_time: int | str | None = None
    targets: Literal["last", "all"] = "last"
    min_user_events: int = 2
    min_item_events: int = 0
    keep_duplicates: bool = False
    ties: Literal["log", "shuffle"] = "log"
    drop_repeats: bool = False
    items: str | None = None
    item_attributes: str | None = None
    attribute_item_column: str | None = None
    attributes: tuple[str, ...] = ()
    attribute_numbers: tuple[str, ...] = ()
    attribute_buckets: int | None = None
    admit_items: bool = True
    rebalance: bool = False
    sequences_per_row_group: int = 2048
    seed: int = 0
    engine: Literal["duckdb", "spark"] = "duckdb"
    master: str | None = None
    memory_limit: str = DUCKDB_MEMORY
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and refuse options that would have no effect."""
        _check_choice("split", self.split, ("temporal", "leave_one_out"))
        _check_choice("validation", self.validation, ("users", "time", "none"))
        _check_choice("targets", self.targets, ("last", "all"))
        _check_choice("layout", self.layout, ("events", "sequences"))
        _check_choice("ties", self.ties, ("log", "shuffle"))
        _check_choice("engine", self.engine, ("duckdb", "spark"))
        for name in ("events", "output", "items", "item_attributes"):
            path = getattr(self, name)
            if path is not None:
                check_path(name, path)
        _check_columns(self)
        _check_numbers(self)
        _check_used(self)
        _check_engine(self)
        _check_event_weights(self)
        if "://" in self.output:
            raise ValueError(
                f"output must be a local folder, got {self.output!r}; prepare here and copy it"
            )
        if not re.fullmatch(r"\d{1,6}(\.\d+)?\s*[KMGT]i?B", self.memory_limit):
            raise ValueError(
                f"memory_limit must be a size, got {self.memory_limit!r}; use 512MB or 2GiB"
            )

    def columns(self) -> EventColumns:
        """The columns of the log to read."""
        weights = [_parse_weight(text) for text in self.event_weights]
        return EventColumns(
            user=self.user_column,
            item=self.item_column,
            time=self.time_column,
            event=self.event_column,
            event_types=self.event_types or tuple(kind for kind, _ in weights),
            type_weights=tuple(weight for _, weight in weights),
            weight=self.weight_column,
            is_lists=self.layout == "sequences",
        )


def sort_threads(threads: int | None) -> int:
    """Number of DuckDB threads: as requested, or all available CPUs; at most 256."""
    return threads or min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}; choose one")


def _check_columns(config: PrepareConfig) -> None:
    """Refuse one column in two roles, except as both event type and weight (a rating)."""
    for first, second in itertools.combinations(_COLUMN_OPTIONS, 2):
        name = getattr(config, first)
        may_be_same = name is None or (first, second) == ("event_column", "weight_column")
        if not may_be_same and name == getattr(config, second):
            raise ValueError(
                f"{second} must be another column than {first}, got {name!r} for both; change one"
            )


def _parse_weight(text: str) -> tuple[str, float]:
    """An event type and its weight.

    Example:
        >>> _parse_weight("buy=5")
        ('buy', 5.0)
    """
    kind, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not equals or not 0 <= weight < math.inf:
        raise ValueError(
            f"event_weights must be type=weight with weights of 0 or more, got {text!r}; "
            "write view=1,cart=3,buy=5"
        )
    return kind, weight


def _check_event_weights(config: PrepareConfig) -> None:
    kinds = [_parse_weight(text)[0] for text in config.event_weights]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"event_weights must name a type once, got {twice!r} twice; remove one")


def _check_numbers(config: PrepareConfig) -> None:
    least = {"min_user_events": 1, "min_item_events": 0, "sequences_per_row_group": 1, "seed": 0}
    least |= {"threads": 1, "validation_users": 1, "attribute_buckets": 2}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}; raise it")
    for name, high in (("threads", MAX_THREADS), ("sequences_per_row_group", MAX_GROUP_ROWS)):
        value = getattr(config, name)
        if value is not None and value > high:
            raise ValueError(f"{name} must be at most {high}, got {value}; lower it")
    for name in ("test_quantile", "validation_quantile"):
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}; use 0.9")


def _check_engine(config: PrepareConfig) -> None:
    """Refuse options that the engine does not have."""
    if config.engine != "spark":
        return
    others = {"memory_limit": DUCKDB_MEMORY, "threads": None, "item_attributes": None}
    for name, left_out in others.items():
        value = getattr(config, name)
        if value != left_out:
            raise ValueError(
                f"{name} must come with engine=duckdb, got {value!r} with engine=spark; remove it "
                "or prepare with engine=duckdb"
            )


def _check_used(config: PrepareConfig) -> None:
    """Refuse options that have no effect with the others."""
    temporal, by_time = config.split == "temporal", config.validation == "time"
    rules = [
        ("test_quantile", temporal, "split=temporal"),
        ("test_time", temporal, "split=temporal"),
        ("test_quantile", config.test_time is None, "no test_time"),
        ("validation_quantile", by_time, "validation=time"),
        ("validation_time", by_time, "validation=time"),
        ("validation_quantile", config.validation_time is None, "no validation_time"),
        ("validation_users", config.validation == "users", "validation=users"),
        (
            "event_column",
            bool(config.event_types or config.event_weights),
            "event_types or event_weights",
        ),
        ("event_types", config.event_column is not None, "event_column"),
        ("event_weights", config.event_column is not None, "event_column"),
        ("event_weights", not config.event_types, "no event_types"),
        ("rebalance", config.items is not None, "items"),
        ("master", config.engine == "spark", "engine=spark"),
        *((name, config.item_attributes is not None, "item_attributes") for name in ATTRIBUTES),
    ]
    for name, used, needs in rules:
        value = getattr(config, name)
        if value not in (None, ()) and value is not False and not used:
            raise ValueError(
                f"{name} must come with {needs}, got {value!r} without; remove one or set the other"
            )
    has_order = config.layout == "sequences" and not temporal
    if config.time_column is None and not has_order:
        raise ValueError(
            "time_column must be set unless layout=sequences and split=leave_one_out, got none; "
            "name the column of times"
        )
    if not config.admit_items and config.item_attributes is None:
        raise ValueError(
            "admit_items must come with item_attributes, got False without; remove one or set the "
            "other"
        )
    if by_time and not temporal:
        raise ValueError(
            "validation must be users or none with split=leave_one_out, got 'time'; choose one"
        )
