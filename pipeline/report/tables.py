"""The tables of a report, with the runs as rows or as columns."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardrec.pipeline.report.records import RunRecord

__all__ = [
    "Cell",
    "Row",
    "all_metrics",
    "baselines",
    "compare_quality",
    "compare_speed",
    "differences",
    "format_metric",
    "format_option",
    "popularity",
    "remarks",
    "split_of",
    "state_of",
]

NONE = "–"
_FOLDERS = ("output", "data")  # options that differ without changing the training
_NOT_JUDGED = ("Coverage", "Surprisal")  # more is not always better


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: a formatted number, and how it is highlighted.

    Attributes:
        text: the number.
        detail: small print below it.
        best: whether it is the best of its row or column.
        share: length of its bar, in [0, 1]; None where no bar is drawn.
    """

    text: str
    detail: str = ""
    best: bool = False
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a comparison table: a run, or a baseline where ``place`` is None.

    Attributes:
        name: name of the run or baseline.
        place: index of the run, which chooses its colour.
        detail: small print below the name.
        cells: one for each column.
    """

    name: str
    place: int | None
    detail: str
    cells: Sequence[Cell]


def compare_quality(
    records: Sequence[RunRecord], metric: str, k: int
) -> tuple[list[str], list[Row]]:
    """Titles and rows of the metrics of the runs and of the baselines that they must beat.

    Args:
        records: the runs.
        metric: the validation metric to show the best value of.
        k: list length of the test metrics.
    """
    best = [_best_validation(record, metric) for record in records]
    validated = baselines(records, [record.beside for record in records])
    tested = baselines(records, [record.test_baselines for record in records])
    names = list(dict.fromkeys([*validated, *tested]))
    values = [value for value, _ in best] + [_value(validated, name, metric) for name in names]
    steps = [f"step {step:,}" for _, step in best] + [""] * len(names)
    columns = {f"best validation {metric}": _cells(values, format_metric, max, steps)}
    for kind in ("NDCG", "Recall", "Coverage"):
        found = [record.test_metrics.get(f"{kind}@{k}") for record in records]
        found += [_value(tested, name, f"{kind}@{k}") for name in names]
        better = None if kind in _NOT_JUDGED else max
        columns[f"{split_of(records)} {kind}@{k}"] = _cells(found, format_metric, better)
    return list(columns), _rows(records, columns.values(), names)


def compare_speed(records: Sequence[RunRecord]) -> tuple[list[str], list[Row]]:
    """Titles and rows of what the runs took: steps, time, memory."""
    totals = [_totals(record) for record in records]
    epochs = [f"{total['epoch']:.1f} epochs" for total in totals]

    def column(
        name: str, to_text: Callable[[float], str], better: Callable[..., float] | None = None
    ) -> list[Cell]:
        return _cells([total[name] for total in totals], to_text, better)

    columns = {
        "steps": _cells([total["step"] for total in totals], "{:,.0f}".format, details=epochs),
        "s/step": column("seconds_per_step", "{:.3g}".format, min),
        "positions/s": column("positions_per_second", "{:,.0f}".format, max),
        "peak memory, GiB": column("memory_bytes", lambda size: f"{size / 2**30:.2f}", min),
        "padding": column("padding_share", "{:.0%}".format),
        "skipped steps": column("num_skipped", "{:,.0f}".format),
        "wall time": column("seconds", _format_seconds),
    }
    return list(columns), _rows(records, columns.values())


def baselines(
    records: Sequence[RunRecord], found: Sequence[Mapping[str, Mapping[str, float | None]]]
) -> dict[str, Mapping[str, float | None]]:
    """The metrics of each baseline on which the runs agree, by its name.

    Args:
        records: the runs; a baseline that is one of them is left out.
        found: for each run, the metrics of the baselines beside it.
    """
    shown = {record.config.get("baseline.kind") for record in records}
    names = dict.fromkeys(name for one in found for name in one if name not in shown)
    known = {name: [one[name] for one in found if name in one] for name in names}
    return {name: ones[0] for name, ones in known.items() if all(one == ones[0] for one in ones)}


def _value(found: Mapping[str, Mapping[str, float | None]], name: str, metric: str) -> float | None:
    return found.get(name, {}).get(metric)


def _rows(
    records: Sequence[RunRecord], columns: Iterable[Sequence[Cell]], names: Sequence[str] = ()
) -> list[Row]:
    """A row for each run, then for each baseline."""
    heads: list[tuple[str, int | None, str]] = [
        (record.name, place, state_of(record)) for place, record in enumerate(records)
    ]
    heads += [(name, None, "baseline") for name in names]
    return [
        Row(*head, cells) for head, cells in zip(heads, zip(*columns, strict=True), strict=True)
    ]


def split_of(records: Sequence[RunRecord]) -> str:
    """The split that the runs were evaluated on: "test", unless all used the same other split."""
    splits = {record.evaluation["protocol"]["split"] for record in records if record.evaluation}
    return splits.pop() if len(splits) == 1 else "test"


def popularity(records: Sequence[RunRecord], k: int) -> list[tuple[RunRecord, list[Cell]]]:
    """Recall of each evaluated run over all targets, then over head, torso and tail items."""
    names = [f"Recall@{k}", *(f"Recall@{k}/{bucket}" for bucket in ("head", "torso", "tail"))]
    rows = [record for record in records if names[1] in record.test_metrics]
    values = [[record.test_metrics.get(name) for record in rows] for name in names]
    longest = max((v for row in values for v in row if v is not None), default=0.0) or 1.0
    columns = [
        _cells(row, format_metric, max, none="no targets", longest=longest) for row in values
    ]
    return list(zip(rows, map(list, zip(*columns, strict=True)), strict=True))


def all_metrics(records: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """Every number of ``evaluate``: its name and one cell per run."""
    names = dict.fromkeys(name for record in records for name in record.test_metrics)
    return [(name, _test_cells(records, name)) for name in names]


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ: a dotted name and each run's value."""
    rows = []
    for name in dict.fromkeys(name for record in records for name in record.config):
        values = [
            format_option(record.config[name]) if name in record.config else NONE
            for record in records
        ]
        if name not in _FOLDERS and len(set(values)) > 1:
            rows.append((name, values))
    return rows


def remarks(records: Sequence[RunRecord]) -> list[str]:
    """Warnings about the comparison: different data, protocols or losses, and unreadable lines."""
    found = []
    if len({record.details.get("data", {}).get("fingerprint") for record in records}) > 1:
        found.append("The runs were trained on different data: do not compare their metrics.")
    protocols = [record.evaluation["protocol"] for record in records if record.evaluation]
    compared = ("split", "users", "candidates", "seen_items", "ties")
    if len({tuple(one.get(name) for name in compared) for one in protocols}) > 1:
        found.append(
            "The runs were evaluated under different protocols (split, or items that the user has "
            "seen): do not compare their test metrics."
        )
    if len({one.config["loss.type"] for one in records if "loss.type" in one.config}) > 1:
        found.append(
            "The runs minimise different losses: their values and gradients are on different "
            "scales."
        )
    for record in records:
        if record.num_unreadable:
            lines = f"{record.num_unreadable} line" + "s" * (record.num_unreadable > 1)
            found.append(f"{record.name}: {lines} of metrics.jsonl could not be read.")
    return found


def state_of(record: RunRecord) -> str:
    """Why a run ended, or the time of its last event."""
    again = f"; resumed {record.num_resumes}×" if record.num_resumes else ""
    if record.end is not None:
        return f"ended: {record.end['reason']}{again}"
    if record.last_time is None:
        return "no step yet"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.last_time))
    return f"not ended; last event {when}{again}"


def format_metric(value: float | None) -> str:
    """A metric as text: four decimals, or a whole number with separators.

    Example:
        >>> format_metric(0.12345), format_metric(21313), format_metric(None)
        ('0.1235', '21,313', '–')
    """
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def format_option(value: Any) -> str:
    """A config value as the user types it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _format_seconds(value: float) -> str:
    """A duration in the two largest units.

    Example:
        >>> _format_seconds(9.04), _format_seconds(203), _format_seconds(7380)
        ('9.0 s', '3 min 23 s', '2 h 3 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _totals(record: RunRecord) -> Mapping[str, Any]:
    """The end event of a run, or the same numbers from its logged steps."""
    if record.end is not None:
        return record.end
    last = record.steps[-1] if record.steps else {}
    seconds = [event["seconds"] for event in record.steps]
    positions = sum(event["positions"] for event in record.steps)
    padding = [event["padding_share"] for event in record.steps]
    return {
        "step": last.get("step", 0),
        "epoch": last.get("epoch", 0.0),
        # The first step is slower than the others: kernels are compiled and caches are filled.
        "seconds_per_step": statistics.median(seconds[1:] or seconds) if seconds else None,
        "positions_per_second": positions / max(1e-9, sum(seconds)) if seconds else None,
        "memory_bytes": last.get("memory_bytes"),
        "padding_share": statistics.mean(padding) if padding else None,
        "num_skipped": last.get("num_skipped", 0),
        "seconds": None,
    }


def _best_validation(record: RunRecord, metric: str) -> tuple[float | None, int]:
    """The highest value of a metric on the validation users, and its first step."""
    pairs = [(event["metrics"].get(metric), event["step"]) for event in record.validations]
    known = [(value, -step) for value, step in pairs if value is not None]
    value, step = max(known, default=(None, 0))
    return value, -step


def _test_cells(records: Sequence[RunRecord], name: str) -> list[Cell]:
    is_judged = "@" in name and not name.startswith(_NOT_JUDGED)
    values = [record.test_metrics.get(name) for record in records]
    return _cells(values, format_metric, max if is_judged else None)


def _cells(
    values: Sequence[float | None],
    to_text: Callable[[float], str],
    better: Callable[..., float] | None = None,
    details: Sequence[str] = (),
    *,
    none: str = NONE,
    longest: float | None = None,
) -> list[Cell]:
    """A cell for each run; no value is the best where all are equal."""
    known = {value for value in values if value is not None and math.isfinite(value)}
    best = better(known) if better is not None and len(known) > 1 else None
    cells = []
    for index, value in enumerate(values):
        if value is None:
            cells.append(Cell(none))
            continue
        detail = details[index] if details else ""
        share = None if longest is None else value / longest
        cells.append(Cell(to_text(value), detail, best is not None and value == best, share))
    return cells
