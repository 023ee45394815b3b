"""Describe an event log before it is prepared: its contents, and the options of prepare it needs.

The log is sorted as in ``prepare``, in bounded memory; only temporary files are written. A column
that no option names is guessed from the usual names.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from shardrec.pipeline.log.columns import EventColumns, is_list
from shardrec.pipeline.log.config import PrepareConfig, sort_threads
from shardrec.pipeline.log.reader import EventLog, read_schema
from shardrec.pipeline.log.sort import SortedLog, SortOptions, sort_log
from shardrec.pipeline.log.split import Cuts, split_log, training_counts
from shardrec.pipeline.log.times import as_date, unix_unit

__all__ = ["DescribeConfig", "Description", "describe"]

Array = npt.NDArray[Any]
_BATCH_ROWS = 65_536
_QUANTILES = {"least": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
_TIME_PARTS = 50
_SHARES = (0.001, 0.01, 0.1, 0.5)
# Names of columns as logs have them, without case and punctuation, the likeliest first.
_NAMES = {
    "user": "userid user uid customerid customer clientid visitorid memberid accountid profileid "
    "kundennr kundennummer kunde reviewerid sessionid session",
    "item": "itemid item iid productid product sku articleid article artikel artikelnummer asin "
    "movieid trackid songid bookid contentid videoid newsid parentasin",
    "time": "timestamp time eventtime ts datetime unixtime createdat occurredat date when zeit "
    "zeitpunkt zeitstempel datum",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DescribeConfig:
    """Options of ``describe``; they have the same meaning as in ``prepare``.

    Attributes:
        layout: "events" (a row is an event) or "sequences" (a row is a user, and all other columns
            hold lists).
        user_column, item_column, time_column: names of the columns in the log; guessed by default.
        event_column: column that ``event_types`` selects from.
        event_types: values of ``event_column`` to keep.
        memory_limit: memory limit of DuckDB.
        threads: threads of DuckDB; by default all CPUs available to this process.
    """

    layout: Literal["events", "sequences"] = "events"
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    event_column: str | None = None
    event_types: tuple[str, ...] = ()
    memory_limit: str = "512MB"
    threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The result of ``describe``.

    Attributes:
        facts: columns, counts, times, distributions and splits, as JSON.
        warnings: likely problems, each with the option that solves it.
        curves: points of distributions, at equal distances up to 100 %; none without events.
    """

    facts: dict[str, Any]
    warnings: list[str]
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def as_json(self) -> str:
        """Facts, curves and warnings as JSON text."""
        more = {"curves": self.curves, "warnings": self.warnings}
        return json.dumps(self.facts | more, indent=1, ensure_ascii=False)

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each fact."""
        return list(_lines(self.facts))

    def as_text(self) -> str:
        """Facts as text, one per line, then the warnings."""
        lines = [f"{name:<34} {value}" for name, value in self.lines()]
        return "\n".join([*lines, "", *(f"! {warning}" for warning in self.warnings)]).rstrip()


def describe(events: str, config: DescribeConfig | None = None) -> Description:
    """What an event log holds, and which options of ``prepare`` it needs.

    If a column that may have no nulls has some, the facts are only files, rows, columns and nulls.

    Args:
        events: file, folder, glob or URI of the log, as for ``prepare``.
        config: columns and limits; None takes the defaults.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log cannot be read without loss, or a column is missing or cannot be
            guessed.
        MemoryError: ``memory_limit`` is too low.
    """
    config = config or DescribeConfig()
    columns, roles = _columns(events, config)
    log = EventLog.open(events, columns)
    options = SortOptions(
        memory_limit=config.memory_limit,
        threads=sort_threads(config.threads),
        seed=0,
        keep_duplicates=False,
    )
    nulls = _nulls(log)
    if any(nulls.values()):
        rows = sum(file.rows for file in log.files)
        facts = {"files": len(log.files), "rows": rows, "nulls": nulls, "columns": roles}
        warnings = [
            f"{count:,} values of {name!r} are null: prepare refuses them; drop those rows"
            for name, count in nulls.items()
            if count
        ]
        return Description(facts=facts, warnings=warnings)
    with tempfile.TemporaryDirectory(prefix="shardrec-describe-") as folder:
        found = sort_log(log, Path(folder), options)
        counts = _item_counts(found)
        facts = _facts(log, found, counts) | {"nulls": nulls, "columns": roles}
        facts["splits"] = {split: _split(found, log, split) for split in _splits(found)}
        curves = _curves(found, counts)
    return Description(facts=facts, warnings=list(_warnings(facts)), curves=curves)


def _columns(events: str, config: DescribeConfig) -> tuple[EventColumns, dict[str, str]]:
    """The columns to read, and type and role of each column of the log, as text by name."""
    schema = read_schema(events)
    names = {
        role: getattr(config, f"{role}_column") or _guess(role, schema.names) for role in _NAMES
    }
    columns = EventColumns(
        user=names["user"],
        item=names["item"],
        time=names["time"],
        event=config.event_column,
        event_types=config.event_types,
        is_lists=config.layout == "sequences",
    )
    roles = {name: role for role, name in names.items()}
    roles |= {} if config.event_column is None else {config.event_column: "event type"}
    said = {name: f"{schema.field(i).type}" for i, name in enumerate(schema.names)}
    return columns, {name: f"{kind}, {roles.get(name, 'not read')}" for name, kind in said.items()}


def _guess(role: str, names: Sequence[str]) -> str:
    plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in reversed(names)}
    for known in _NAMES[role].split():
        if known in plain:
            return plain[known]
    raise ValueError(
        f"--{role}-column must be set where no column has a usual name, got {', '.join(names)}; "
        "name one of them"
    )


def _nulls(log: EventLog) -> dict[str, int]:
    """The number of nulls in each column that prepare reads and that may have none."""
    names = [name for name in log.columns.names() if name != log.columns.event]
    counts = dict.fromkeys(names, 0)
    for file in log.inputs:
        for _, batch in file.batches(names, _BATCH_ROWS) if file.source.rows else ():
            for name in names:
                column = batch.column(name)
                counts[name] += (
                    pc.list_flatten(column) if is_list(column.type) else column
                ).null_count
    return counts


def _item_counts(log: SortedLog) -> Array:
    counts = np.zeros(len(log.item_ids), np.int64)
    for block in log.blocks():
        counts += np.bincount(block.item, minlength=len(counts))
    return counts


def _facts(log: EventLog, found: SortedLog, counts: Array) -> dict[str, Any]:
    ranked = np.cumsum(np.sort(counts)[::-1])
    read = max(log.events_read, 1)
    return {
        "files": len(log.files),
        "files_passed_over": len(log.passed_over),
        "events": log.events_read,
        "events_other_type": log.events_read - found.num_events - found.repetition.duplicates,
        "users": len(found.user_ids),
        "items": len(found.item_ids),
        "times": _times(found.time_range, log.time_type),
        "events_of_a_user": _quantiles(found.user_events),
        "events_of_an_item": _quantiles(counts),
        "share_of_the_most_popular_items": {
            f"{100 * share:g} %": round(
                int(ranked[max(int(share * len(ranked)), 1) - 1]) / ranked[-1], 4
            )
            for share in _SHARES
        },
        "shares": {
            "users_of_one_event": round(float((found.user_events == 1).mean()), 4),
            "items_of_one_event": round(float((counts == 1).mean()), 4),
            "duplicates": round(found.repetition.duplicates / read, 4),
            "tied_in_time": round(found.repetition.tied / read, 4),
            "repeating_the_item_before": round(found.repetition.repeats / read, 4),
            "of_the_longest_user": round(int(found.user_events.max()) / read, 4),
        },
    }


def _curves(log: SortedLog, counts: Array) -> dict[str, list[float]]:
    """Shares of events in % over time and over the items, and events of users and items."""
    cells, (first, last) = np.zeros(_TIME_PARTS, np.int64), log.time_range
    width = -(-(last - first + 1) // _TIME_PARTS)
    for block in log.blocks():
        # Two times may lie 2**64 apart, so their distance is unsigned and wraps.
        distances = block.time.view(np.uint64) - np.uint64(first % 2**64)
        parts = (distances // np.uint64(width)).astype(np.int64)
        cells += np.bincount(parts, minlength=_TIME_PARTS)
    items = np.sort(counts)[::-1]
    heads = -(-np.arange(1, 101) * len(items) // 100) - 1
    curves = {
        "events_over_time": 100 * cells / cells.sum(),
        "popularity": 100 * np.cumsum(items)[heads] / items.sum(),
        "user_events": np.sort(log.user_events)[::-1][
            -(-np.arange(1, 101) * len(log.user_events) // 100) - 1
        ],
        "item_events": items[heads],
    }
    return {name: np.round(points, 4).tolist() for name, points in curves.items()}


def _times(bounds: tuple[int, int], time_type: str) -> dict[str, Any]:
    """First and last time of the log; numbers that look like Unix times also as dates."""
    first, last = bounds
    if time_type == "timestamp[us]":
        return {"first": as_date(first), "last": as_date(last)}
    if (found := unix_unit(first, last)) is not None:
        unit, ends = found[0], [as_date(int(time * found[1])) for time in bounds]
        shown = {"first_as_date": ends[0], "last_as_date": ends[1]}
        return {"first": first, "last": last, "looks_like": unit, **shown}
    return {"first": first, "last": last, "looks_like": "numbers of no known unit"}


def _splits(log: SortedLog) -> list[str]:
    has_times = log.time_range[0] < log.time_range[1]
    return ["temporal", "leave_one_out"] if has_times else ["leave_one_out"]


def _split(log: SortedLog, events: EventLog, split: str) -> dict[str, Any]:
    """Sizes of the parts of a split with default options; "refused" with the reason if it fails."""
    config = PrepareConfig(events=".", output=".", split=split)  # type: ignore[arg-type]
    try:
        cuts = split_log(log, config, events.time_type)
    except ValueError as error:
        return {"refused": str(error)}
    counts = training_counts(log, cuts)
    return {
        "training_users": int((cuts.kept & (cuts.train_end >= 2)).sum()),
        "training_events": int(counts.sum()),
        "validation_users": _held_out(cuts, cuts.train_end, cuts.test_start),
        "test_users": _held_out(cuts, cuts.test_start, cuts.total),
        "items_without_training_events": int((counts == 0).sum()),
    }


def _held_out(cuts: Cuts, start: Array, stop: Array) -> int:
    """Number of users with an event in [start, stop) and a history before their last one there."""
    return int((cuts.kept & (stop > start) & (stop >= 2)).sum())


def _warnings(facts: Mapping[str, Any]) -> Iterator[str]:
    shares, temporal = facts["shares"], facts["splits"].get("temporal", {"refused": ""})
    rules = [
        ("tied_in_time", 0.01, "share their time with another of the user: --ties shuffle"),
        ("repeating_the_item_before", 0.2, "have the item of the event before: --drop-repeats"),
        ("duplicates", 0.0, "equal an earlier one and are dropped: --keep-duplicates keeps them"),
    ]
    lengths = facts["events_of_a_user"]
    if lengths["most"] > 100 * lengths["median"]:
        rules.append(
            ("of_the_longest_user", 0.0, "are of one user, perhaps a bot: remove it from the log")
        )
    for name, limit, words in rules:
        if shares[name] > limit:
            yield f"{100 * shares[name]:.1f} % of the events {words}"
    if shares["users_of_one_event"] > 0.5:
        yield (
            f"{100 * shares['users_of_one_event']:.0f} % of the users have one event: if these are "
            "sessions or row numbers, choose another --user-column"
        )
    if shares["items_of_one_event"] > 0.5:
        yield (
            f"{100 * shares['items_of_one_event']:.0f} % of the items have one event: "
            "--min-item-events 2 leaves them out"
        )
    if "refused" in temporal or not temporal["training_users"]:
        yield "the default split by time leaves nothing to train on: --split leave_one_out"
    elif temporal["items_without_training_events"] > 0.2 * facts["items"]:
        yield (
            f"{temporal['items_without_training_events']:,} of {facts['items']:,} items occur "
            "only in the test part: no model can know them; read the metrics that end in /known"
        )
    if facts["files_passed_over"]:
        yield f"{facts['files_passed_over']} files hold no events and are not read: check --events"


def _lines(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        words = name.replace("_", " ")
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            yield from _lines(value, f"{words}: ")
        elif name == "columns":
            yield words, "; ".join(f"{one}: {what}" for one, what in value.items())
        elif isinstance(value, dict):
            shown = (f"{one.replace('_', ' ')} {_shown(v)}" for one, v in value.items())
            yield prefix + words, ", ".join(shown)
        else:
            yield prefix + words, _shown(value)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quantiles(values: Array) -> dict[str, int]:
    found = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(_QUANTILES, found, strict=True)}
