"""The page of ``shardrec describe --html``: the facts about a log, its warnings and four curves."""

from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shardrec.pipeline.describe import Description
from shardrec.pipeline.outputs.staging import staged_file
from shardrec.pipeline.report.curves import NUM_HUES, Curve, Line, draw

__all__ = ["write_log_page"]

_MARK = "<!doctype html>\n<!-- shardrec describe -->\n"
# Name in the facts -> title, what is drawn, and along what.
_PANELS = {
    "events_over_time": ("Events over time", "in 50 equal parts of the time", "% of the time"),
    "popularity": ("Popularity", "share of the most popular items", "% of the items"),
    "user_events": ("Events of a user", "at least so many", "% of the users"),
    "item_events": ("Events of an item", "at least so many", "% of the items"),
}


def write_log_page(description: Description, title: str, output: str | Path) -> Path:
    """Write the page to ``output``, which may be an earlier one; returns its path.

    It is one file that loads nothing and runs no script. Equal logs give an equal page.

    Raises:
        FileExistsError: the output exists and is no such page.
    """
    output = Path(output)
    if output.exists() and not _is_ours(output):
        raise FileExistsError(
            f"html must be a new file or a former page of describe, got {output}, which is "
            "something else; choose another name"
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("log_page.html").render(
        title=title,
        facts=description.lines(),
        warnings=description.warnings,
        panels=[_panel(name, points) for name, points in description.curves.items()],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as partial:
        partial.write_text(f"{_MARK}{page}\n", encoding="utf-8", errors="replace")
    return output


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def _panel(name: str, points: list[float]) -> tuple[str, str, str]:
    """Title, explanation and drawing; the points are at equal distances up to 100 %."""
    title, explanation, along = _PANELS[name]
    is_count = name.endswith("_events")
    curve = Curve(
        title=title,
        explanation=explanation,
        unit="events" if is_count else "% of the events",
        value=lambda _: None,
        to_text="{:,.3g}".format,
        from_zero=not is_count,
        may_be_log=is_count,
        along=along,
    )
    steps = np.linspace(100 / len(points), 100, len(points), dtype=np.float64)
    line = Line("log", list(_PANELS).index(name) % NUM_HUES, steps, np.array(points, np.float64))
    return title, curve.explanation, draw(curve, [line])
