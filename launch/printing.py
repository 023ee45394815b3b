"""Print the results of the stages."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "print_beside",
    "print_counts",
    "print_end",
    "print_lists",
    "print_metrics",
    "print_protocol",
    "print_tried",
]


def print_counts(counts: Mapping[str, int]) -> None:
    """Print one count per line."""
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<40} {count:>14,}")


def print_end(
    is_new: bool, output: object, otherwise: str = "is there already: nothing to do"
) -> None:
    """Print that an output was written, or that it already existed."""
    print(f"wrote {output}" if is_new else f"{output} {otherwise}")


def print_metrics(metrics: Mapping[str, float], errors: Mapping[str, float]) -> None:
    """Print one metric per line and one list length per column, then user and target counts.

    Means over users are followed by their standard errors. Metrics of some of the targets alone
    (those that end in /known and the like) are counted, and left to the report.
    """
    table: dict[str, dict[int, str]] = {}
    for name, value in metrics.items():
        kind, at, length = name.partition("@")
        if at and length.isdecimal():
            error = f" ±{errors[name]:.4f}" if name in errors else " " * 8
            table.setdefault(kind, {})[int(length)] = f"{value:.4f}{error}"
    lengths = sorted({length for row in table.values() for length in row})
    print(f"{'':<22}" + "".join(f"{f'@{length}':>8}{'':<8}" for length in lengths).rstrip())
    for kind, row in table.items():
        print(f"{kind:<22}" + "".join(f"{row[length]:>16}" for length in lengths).rstrip())
    for name in (name for name in metrics if "@" not in name):
        value = metrics[name]
        print(f"{name:<22}{value:>8,}" if isinstance(value, int) else f"{name:<22}{value:>8.4f}")
    parts = dict.fromkeys(name.partition("/")[2] for name in metrics if "@" in name and "/" in name)
    if parts:
        print(f"in the report also of parts of the targets: {', '.join(parts)}")


def print_beside(
    metrics: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    label: str,
    name: str | None = None,
) -> None:
    """Print one metric of a run and of the baselines that it must beat, best first.

    Args:
        metrics: metrics of the run.
        baselines: metrics of each baseline, by its name.
        label: name of the run in the table.
        name: name of the metric; None takes ``default_metric``.
    """
    from shardrec.pipeline.model.config import default_metric

    name = name or default_metric(metrics)
    rows = {**baselines, label: metrics}
    for row in sorted(rows, key=lambda row: rows[row][name] or 0.0, reverse=True):
        print(f"{name} {rows[row][name] or 0.0:.4f} {row}")


def print_lists(report: Mapping[str, Any]) -> None:
    """Print which items were ranked, and how many targets are lost because of it."""
    protocol, metrics = report["protocol"], report["metrics"]
    print_protocol(protocol)
    seen, new = metrics["repeated_target_share"], metrics["new_target_share"]
    if protocol["seen_items"] == "removed" and seen > 0.05:
        print(f"{seen:.0%} of the targets are in the history, so missed: --no-filter-seen")
    if protocol["candidates"] != "the whole catalog" and new > 0.05:
        print(f"{new:.0%} of the targets have no training event, so missed: --min-count 0")


def print_protocol(protocol: Mapping[str, str]) -> None:
    """Print in one line which items may be in the lists."""
    print(
        f"candidates: {protocol['candidates']}; seen items: {protocol['seen_items']}; ties: "
        f"{protocol['ties']}"
    )


def print_tried(tried: Sequence[Mapping[str, float]], metric: str) -> None:
    """Print the metric on the validation users for each scale of a memory, and the best scale."""
    best = max(row[metric] for row in tried)
    print(f"{'scale':<22}{metric + ', validation':>22}")
    for row in tried:
        print(f"{row['scale']:<22g}{row[metric]:>22.4f}{' best' * (row[metric] == best)}")
