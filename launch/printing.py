"""Print the results of the stages."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardrec.pipeline.prepared.manifest import Manifest

__all__ = [
    "print_beside",
    "print_counts",
    "print_end",
    "print_lists",
    "print_metrics",
    "print_protocol",
    "print_split",
    "print_tried",
]


def print_counts(counts: Mapping[str, int]) -> None:
    """Print one count per line."""
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<40} {count:>14,}")


def print_split(manifest: "Manifest") -> None:
    """Print how long the training sequences are, and from when on events are for the test."""
    lengths, split = manifest.quantiles["train_sequence_length"], manifest.split
    print(f"training sequences: median {lengths['0.5']:,} events, 1 % above {lengths['0.99']:,}")
    if split["test_time"] is None:
        print("test: the last event of each user")
        return
    of = manifest.columns["time"]["type"]
    print(f"test: the events from {_shown_time(split['test_time'], of)} on")
    if split["validation_time"] is not None:
        print(f"validation: those from {_shown_time(split['validation_time'], of)} on, before it")


def _shown_time(time: int, of: str) -> str:
    """A time of the log; microseconds as a date, numbers as they are, with the date they look like.

    Example:
        >>> _shown_time(1409529600000000, "timestamp[us]"), _shown_time(7, "int64")
        ('2014-09-01T00:00:00Z', '7')
        >>> _shown_time(1409529600, "int64")
        '1409529600 (2014-09-01T00:00:00Z)'
    """
    from shardrec.pipeline.log.times import as_date, unix_unit

    if of.startswith("timestamp"):
        return as_date(time)
    found = unix_unit(time, time)
    return str(time) if found is None else f"{time} ({as_date(int(time * found[1]))})"


def print_end(
    is_new: bool, output: object, otherwise: str = "is there already: nothing to do"
) -> None:
    """Print that an output was written, or that it already existed."""
    print(f"wrote {output}" if is_new else f"{output} {otherwise}")


def print_metrics(metrics: Mapping[str, float], errors: Mapping[str, float]) -> None:
    """Print one metric per line and one list length per column, then user and target counts.

    Means over users are followed by their standard errors. Metrics of some of the targets alone
    (those that end in /known and the like) are left to the report. With three list lengths 60
    columns are enough.
    """
    table: dict[str, dict[int, str]] = {}
    for name, value in metrics.items():
        kind, at, length = name.partition("@")
        if at and length.isdecimal():
            error = f" ±{errors[name]:.4f}" if name in errors else " " * 8
            table.setdefault(kind, {})[int(length)] = f"{value:.4f}{error}"
    lengths = sorted({length for row in table.values() for length in row})
    print(f"{'':<11}" + "".join(f"{f'@{length}':>8}{'':<8}" for length in lengths).rstrip())
    for kind, row in table.items():
        print(f"{kind:<11}" + "".join(f"{row[length]:>16}" for length in lengths).rstrip())
    print(f"{metrics['users']:,} users, {metrics['targets']:,} targets; meanings: evaluate --help")
    parts = dict.fromkeys(name.partition("/")[2] for name in metrics if "@" in name and "/" in name)
    if parts:
        _print_wrapped(f"in the report also of parts of the targets: {', '.join(parts)}")


def _print_wrapped(line: str) -> None:
    """Print a line in lines of at most 60 columns, broken at blanks."""
    indented = textwrap.TextWrapper(
        60, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    print(indented.fill(line))


def print_beside(
    metrics: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    label: str,
    name: str | None = None,
) -> None:
    """Print one metric of a run and of the baselines that it must beat, best first.

    A line follows if a baseline is better.

    Args:
        metrics: metrics of the run.
        baselines: metrics of each baseline, by its name.
        label: name of the run in the table.
        name: name of the metric; None takes ``default_metric``.
    """
    from shardrec.pipeline.model.config import default_metric

    name = name or default_metric(metrics)
    rows = {**baselines, label: metrics}
    best, *others = sorted(rows, key=lambda row: rows[row][name] or 0.0, reverse=True)
    for row in (best, *others):
        print(f"{name} {rows[row][name] or 0.0:.4f} {row}")
    if best != label and (rows[best][name] or 0.0) > (metrics[name] or 0.0):
        print(f"{label} is worse than {best}: see docs, When it fails")


def print_lists(report: Mapping[str, Any]) -> None:
    """Print which items were ranked, and how many targets are lost because of it."""
    protocol, metrics = report["protocol"], report["metrics"]
    print_protocol(protocol)
    seen, new = metrics["repeated_target_share"], metrics["new_target_share"]
    if protocol["seen_items"] == "removed" and seen > 0.05:
        _print_wrapped(f"{seen:.0%} of the targets are in the history, so missed: --no-filter-seen")
    if protocol["candidates"] != "the whole catalog" and new > 0.05:
        _print_wrapped(f"{new:.0%} of the targets have no training event, so missed: --min-count 0")


def print_protocol(protocol: Mapping[str, str]) -> None:
    """Print which items may be in the lists."""
    _print_wrapped(
        f"candidates: {protocol['candidates']}; seen items: {protocol['seen_items']}; ties: "
        f"{protocol['ties']}"
    )


def print_tried(tried: Sequence[Mapping[str, float]], metric: str) -> None:
    """Print the metric on the validation users for each scale of a memory, and the best scale."""
    best = max(row[metric] for row in tried)
    print(f"{'scale':<22}{metric + ', validation':>22}")
    for row in tried:
        print(f"{row['scale']:<22g}{row[metric]:>22.4f}{' best' * (row[metric] == best)}")
