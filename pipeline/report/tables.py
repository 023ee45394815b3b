"""The tables of a report: runs against runs, by rows or by columns."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shardrec.pipeline.report.records import RunRecord

__all__ = [
    "Cell",
    "Totals",
    "all_metrics",
    "compare_runs",
    "differences",
    "popularity",
    "remarks",
    "spell_metric",
    "spell_option",
    "state_of",
]

BUCKETS = ("head", "torso", "tail")
NONE = "–"
_WHERE = ("output", "data")  # folders: they differ without making a difference
_NOT_JUDGED = ("Coverage", "Surprisal")  # more is not always better


@dataclass(frozen=True, slots=True)
class Cell:
    """A number in words.

    Attributes:
        text: what is shown.
        detail: more in small print.
        best: whether it is the best of its kind.
        share: of the longest bar; None where no bar is drawn.
    """

    text: str
    detail: str = ""
    best: bool = False
    share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What a whole run took; from its logged steps as long as it has not ended.

    Attributes:
        step, epoch: taken so far.
        seconds_per_step: median, the first step left out.
        positions_per_second: real positions over all ranks.
        memory_bytes: of the process that used most.
        padding_share: of the encoder's positions.
        num_skipped: steps that were not finite.
        seconds: wall time; None while the run has not ended.
    """

    step: int
    epoch: float
    seconds_per_step: float | None
    positions_per_second: float | None
    memory_bytes: float | None
    padding_share: float | None
    num_skipped: int
    seconds: float | None

    @classmethod
    def of(cls, record: RunRecord) -> "Totals":
        """The totals of a run, finished or not."""
        if record.end is not None:
            names = [field.name for field in dataclasses.fields(cls)]
            return cls(**{name: record.end[name] for name in names})
        if not record.steps:
            return cls(
                step=0,
                epoch=0.0,
                seconds_per_step=None,
                positions_per_second=None,
                memory_bytes=None,
                padding_share=None,
                num_skipped=0,
                seconds=None,
            )
        last = record.steps[-1]
        seconds = [event["seconds"] for event in record.steps]
        positions = [event["positions"] for event in record.steps]
        return cls(
            step=last["step"],
            epoch=last["epoch"],
            seconds_per_step=statistics.median(seconds[1:] or seconds),
            positions_per_second=sum(positions) / max(1e-9, sum(seconds)),
            memory_bytes=last["memory_bytes"],
            padding_share=statistics.mean(event["padding_share"] for event in record.steps),
            num_skipped=last["num_skipped"],
            seconds=None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column of the first table: how to read, spell and judge it."""

    title: str
    read: Callable[[RunRecord, Totals], float | None]
    spell: Callable[[float], str]
    detail: Callable[[RunRecord, Totals], str] = lambda record, totals: ""
    better: Callable[..., float] | None = None


def compare_runs(
    records: Sequence[RunRecord], metric: str, k: int
) -> tuple[list[str], list[list[Cell]]]:
    """Titles of the columns, and a row of cells for each run.

    Args:
        records: the runs.
        metric: the validation metric to show the best of.
        k: list length of the test metrics.
    """
    totals = [Totals.of(record) for record in records]
    columns = _columns(records, metric, k)
    cells = []
    for column in columns:
        numbers = [column.read(*pair) for pair in zip(records, totals, strict=True)]
        best = _best(numbers, column.better)
        cells.append(
            [
                Cell(
                    NONE if number is None else column.spell(number),
                    "" if number is None else column.detail(record, total),
                    best is not None and number == best,
                )
                for number, record, total in zip(numbers, records, totals, strict=True)
            ]
        )
    return [column.title for column in columns], [list(row) for row in zip(*cells, strict=True)]


def _columns(records: Sequence[RunRecord], metric: str, k: int) -> list[_Column]:
    tested = [f"{kind}@{k}" for kind in ("NDCG", "Recall", "Coverage")]
    return [
        _Column(
            title="steps",
            read=lambda record, totals: totals.step,
            spell=lambda value: f"{value:,.0f}",
            detail=lambda record, totals: f"{totals.epoch:.1f} epochs",
        ),
        _Column(
            title=f"best validation {metric}",
            read=lambda record, totals: best_validation(record, metric)[0],
            spell=spell_metric,
            detail=lambda record, totals: f"step {best_validation(record, metric)[1]:,}",
            better=max,
        ),
        *(
            _Column(
                title=f"{split_of(records)} {name}",
                read=_reader(name),
                spell=spell_metric,
                better=None if name.startswith(_NOT_JUDGED) else max,
            )
            for name in tested
        ),
        _Column(
            title="s/step",
            read=lambda record, totals: totals.seconds_per_step,
            spell=lambda value: f"{value:.3g}",
            better=min,
        ),
        _Column(
            title="positions/s",
            read=lambda record, totals: totals.positions_per_second,
            spell=lambda value: f"{value:,.0f}",
            better=max,
        ),
        _Column(
            title="peak memory, GiB",
            read=lambda record, totals: totals.memory_bytes,
            spell=lambda value: f"{value / 2**30:.2f}",
            better=min,
        ),
        _Column(
            title="padding",
            read=lambda record, totals: totals.padding_share,
            spell=lambda value: f"{value:.0%}",
        ),
        _Column(
            title="skipped steps",
            read=lambda record, totals: totals.num_skipped,
            spell=lambda value: f"{value:,.0f}",
        ),
        _Column(
            title="wall time",
            read=lambda record, totals: totals.seconds,
            spell=spell_seconds,
        ),
    ]


def _reader(name: str) -> Callable[[RunRecord, Totals], float | None]:
    return lambda record, totals: record.test_metrics.get(name)


def best_validation(record: RunRecord, metric: str) -> tuple[float | None, int]:
    """The highest value of a metric on the validation users, and its step."""
    pairs = [(event["metrics"].get(metric), event["step"]) for event in record.validations]
    known = [(value, -step) for value, step in pairs if value is not None]
    value, step = max(known, default=(None, 0))
    return value, -step


def split_of(records: Sequence[RunRecord]) -> str:
    """What the runs were evaluated on: "test", unless all say otherwise."""
    splits = {record.evaluation["protocol"]["split"] for record in records if record.evaluation}
    return splits.pop() if len(splits) == 1 else "test"


def popularity(records: Sequence[RunRecord], k: int) -> list[tuple[RunRecord, list[Cell]]]:
    """Recall by popularity: for each evaluated run all targets' users, then head, torso, tail."""
    names = [f"Recall@{k}", *(f"Recall@{k}/{bucket}" for bucket in BUCKETS)]
    rows = [record for record in records if names[1] in record.test_metrics]
    values = [[record.test_metrics.get(name) for name in names] for record in rows]
    longest = max((v for row in values for v in row if v is not None), default=0.0) or 1.0
    best = [_best([row[index] for row in values], max) for index in range(len(names))]
    return [
        (
            record,
            [
                Cell(
                    "no targets" if value is None else spell_metric(value),
                    best=value is not None and value == best[index],
                    share=None if value is None else value / longest,
                )
                for index, value in enumerate(row)
            ],
        )
        for record, row in zip(rows, values, strict=True)
    ]


def all_metrics(records: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """Every number of ``evaluate``: a name and one cell a run."""
    names = dict.fromkeys(name for record in records for name in record.test_metrics)
    rows = []
    for name in names:
        values = [record.test_metrics.get(name) for record in records]
        best = _best(values, max) if "@" in name and not name.startswith(_NOT_JUDGED) else None
        rows.append(
            (
                name,
                [
                    Cell(spell_metric(value), best=best is not None and value == best)
                    for value in values
                ],
            )
        )
    return rows


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ: a dotted name and each run's value."""
    names = dict.fromkeys(name for record in records for name in record.config)
    rows = []
    for name in names:
        values = [
            spell_option(record.config[name]) if name in record.config else NONE
            for record in records
        ]
        if name not in _WHERE and len(set(values)) > 1:
            rows.append((name, values))
    return rows


def remarks(records: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before comparing: other data, other protocol, lost lines."""
    found = []
    if len({_fingerprint(record) for record in records}) > 1:
        found.append("The runs were trained on different data: do not compare their metrics.")
    protocols = [record.evaluation["protocol"] for record in records if record.evaluation]
    if len({(one["split"], one["seen_items"]) for one in protocols}) > 1:
        found.append(
            "The runs were evaluated under different protocols (split, or items that the user has "
            "seen): do not compare their test metrics."
        )
    if len({record.config.get("loss.type") for record in records}) > 1:
        found.append(
            "The runs minimise different losses, whose values and gradients are on scales of their "
            "own."
        )
    for record in records:
        if record.num_unreadable:
            lines = f"{record.num_unreadable} line" + "s" * (record.num_unreadable > 1)
            found.append(f"{record.name}: {lines} of metrics.jsonl could not be read.")
    return found


def _fingerprint(record: RunRecord) -> Any:
    return record.details.get("data", {}).get("fingerprint")


def state_of(record: RunRecord) -> str:
    """Whether a run has ended and why, or when it was last heard of."""
    again = f"; resumed {record.num_resumes}×" if record.num_resumes else ""
    if record.end is not None:
        return f"ended: {record.end['reason']}{again}"
    if record.last_time is None:
        return "no step yet"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.last_time))
    return f"not ended; last event {when}{again}"


def spell_metric(value: float | None) -> str:
    """Four digits after the point; whole numbers in full.

    Example:
        >>> spell_metric(0.12345), spell_metric(21313), spell_metric(None)
        ('0.1235', '21,313', '–')
    """
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def spell_seconds(value: float) -> str:
    """A duration for people.

    Example:
        >>> spell_seconds(9.04), spell_seconds(203), spell_seconds(7380)
        ('9.0 s', '3 min 23 s', '2 h 3 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def spell_option(value: Any) -> str:
    """A value of the config as one would type it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _best(values: Sequence[float | None], better: Callable[..., float] | None) -> float | None:
    """The best of several values; None where there is nothing to choose."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if better is None or len(set(known)) < 2:
        return None
    return better(known)
