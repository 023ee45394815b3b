"""Write one self-contained HTML page about run folders (``shardrec report``).

The page loads nothing and runs no script; its drawings follow the page's colours, light or dark.
The same runs always give the same page.
"""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shardrec.pipeline.model.config import DEFAULT_METRIC
from shardrec.pipeline.outputs.staging import staged_file
from shardrec.pipeline.report.curves import NUM_HUES, Curve, Line, draw
from shardrec.pipeline.report.paired import compare_pairs
from shardrec.pipeline.report.records import RunRecord, read_runs
from shardrec.pipeline.report.tables import (
    all_metrics,
    baselines,
    compare_quality,
    compare_speed,
    differences,
    format_metric,
    format_option,
    popularity,
    remarks,
    split_of,
    state_of,
)

__all__ = ["render", "report"]

_MARK = "<!doctype html>\n<!-- shardrec report -->\n"


def report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write the page about ``runs`` to ``output``, which may be an earlier report.

    Args:
        runs: run folders, finished or in progress, evaluated or not.
        output: the HTML file to write.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a folder is no run.
        FileExistsError: the output exists and is not a report.
        ValueError: no run, too many, or a file of a run is damaged.
    """
    output = Path(output)
    if output.exists() and not _is_report(output):
        raise FileExistsError(
            f"output must be a new file or a former report, got {output}, which is something else; "
            "choose another name"
        )
    page = render(read_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return output


def render(records: Sequence[RunRecord]) -> str:
    """The HTML page as text."""
    metric, k = _deciding_metric(records), _list_length(records)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        records=records,
        quality=compare_quality(records, metric, k),
        speed=compare_speed(records),
        quality_panels=_panels(_quality_curves(metric), records, metric),
        speed_panels=_panels(_speed_curves(), records, metric),
        popularity=popularity(records, k),
        k=k,
        split=split_of(records),
        differences=differences(records),
        all_metrics=all_metrics(records),
        remarks=remarks(records),
        comparisons=compare_pairs(records, k),
        num_hues=NUM_HUES,
        state_of=state_of,
        format_option=format_option,
    )
    return _MARK + page + "\n"


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def _panels(
    curves: Sequence[Curve], records: Sequence[RunRecord], metric: str
) -> list[tuple[Curve, str]]:
    """The curves for which a run has a number, and their drawings."""
    beside = baselines(records, [record.beside for record in records])
    levels = {
        name: value for name, found in beside.items() if (value := found.get(metric)) is not None
    }
    panels = []
    for curve in curves:
        lines = []
        for index, record in enumerate(records):
            events = record.validations if curve.is_validation else record.steps
            line = Line.of(record.name, index, events, curve)
            lines += [line] if len(line.steps) else []
        if lines:
            panels.append((curve, draw(curve, lines, levels if curve.is_validation else {})))
    return panels


def _deciding_metric(records: Sequence[RunRecord]) -> str:
    """The default metric where a run measured it, else the validation metric of the first run."""
    validations = [event for record in records for event in record.validations]
    if not validations or any(DEFAULT_METRIC in event["metrics"] for event in validations):
        return DEFAULT_METRIC
    return str(validations[0]["metric"])


def _list_length(records: Sequence[RunRecord]) -> int:
    """10 where it was evaluated, else the greatest length that was."""
    names = [name for record in records for name in record.test_metrics]
    found = {int(name[5:]) for name in names if name.startswith("NDCG@") and name[5:].isdigit()}
    return 10 if 10 in found or not found else max(found)


def _quality_curves(metric: str) -> list[Curve]:
    return [
        Curve(
            title=f"Validation {metric}",
            explanation="over the whole catalog; dashed: baselines on the same users",
            unit=metric,
            value=lambda event: event["metrics"].get(metric),
            to_text=format_metric,
            from_zero=True,
            is_validation=True,
        ),
        Curve(
            title="Loss",
            explanation="mean over the positions of a batch",
            unit="loss",
            value=lambda event: event["loss"],
            to_text="{:.3f}".format,
        ),
        Curve(
            title="Gradient norm",
            explanation="over encoder and table, before clipping",
            unit="norm",
            value=lambda event: event["gradient_norm"],
            to_text="{:.3g}".format,
            may_be_log=True,
        ),
    ]


def _speed_curves() -> list[Curve]:
    return [
        Curve(
            title="Throughput",
            explanation="real positions, all ranks together",
            unit="positions/s",
            value=lambda event: event["positions"] / max(1e-9, event["seconds"]),
            to_text=_thousands,
            from_zero=True,
        ),
        Curve(
            title="Memory",
            explanation="peak so far, of the process or GPU that uses most",
            unit="GiB",
            value=lambda event: event["memory_bytes"] / 2**30,
            to_text="{:.2f}".format,
            from_zero=True,
        ),
        Curve(
            title="Padding",
            explanation="share of the positions that attention processes",
            unit="%",
            value=lambda event: 100 * event["padding_share"],
            to_text="{:.0f} %".format,
            from_zero=True,
        ),
    ]


def _thousands(value: float) -> str:
    """Three digits, thousands as k.

    Example:
        >>> _thousands(123.4), _thousands(45_678.0), _thousands(1_234_567.0)
        ('123', '45.7k', '1.23M')
    """
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.3g}k" if value < 999_500 else f"{value / 1e6:.3g}M"
