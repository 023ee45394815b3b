"""The table that ``shardrec demo`` prints: one line for each baseline and loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from shardrec.pipeline.model.config import DEFAULT_METRIC

__all__ = ["METRICS", "Row", "table"]

METRICS = (DEFAULT_METRIC, "Recall@10", "MRR@10", "Coverage@10")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; for baselines, time and memory are None."""

    name: str
    metrics: Mapping[str, float]
    seconds_per_step: float | None = None
    memory_bytes: int | None = None


def table(rows: Sequence[Row], steps: int, workers: int, ceiling: float | None) -> Table:
    """The comparison, baselines first; the best of each metric is bold.

    ``ceiling`` is the NDCG@10 of the true model on a sample of users, None if unknown.
    """
    made = Table(
        title=f"{steps} steps each on {counted(workers)}, whole catalog ranked",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    made.add_column("")
    for name in (*METRICS, "gap\nclosed", "s/step", "peak\nGiB"):
        made.add_column(name, justify="right", no_wrap=True)
    best = {name: max(row.metrics[name] for row in rows) for name in METRICS}
    for row in rows:
        cells = [mark(row.metrics[name], best[name]) for name in METRICS]
        share = gap_closed(row.metrics[DEFAULT_METRIC], rows[0].metrics[DEFAULT_METRIC], ceiling)
        seconds = "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}"
        memory = "" if row.memory_bytes is None else f"{row.memory_bytes / 2**30:.2f}"
        made.add_row(row.name, *cells, share, seconds, memory)
    if ceiling is not None:
        made.add_row("true model", f"{ceiling:.4f}", "", "", "", "100 %")
    return made


def gap_closed(value: float, floor: float, ceiling: float | None) -> str:
    """Share of the gap between popularity and the true model that is closed; "" if unknown.

    Example:
        >>> gap_closed(0.15, 0.05, 0.25), gap_closed(0.15, 0.05, None)
        ('50 %', '')
    """
    if ceiling is None or ceiling <= floor:
        return ""
    return f"{100 * (value - floor) / (ceiling - floor):.0f} %"


def mark(value: float, best: float) -> str:
    """The number, bold where it is the best.

    Example:
        >>> mark(0.25, 0.25), mark(0.125, 0.25)
        ('[bold]0.2500[/bold]', '0.1250')
    """
    return f"[bold]{value:.4f}[/bold]" if value == best else f"{value:.4f}"


def counted(workers: int) -> str:
    """The number of workers in words.

    >>> counted(1), counted(2)
    ('1 worker', '2 workers')
    """
    return f"{workers} worker{'s' * (workers > 1)}"
