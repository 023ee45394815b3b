"""Curves of several runs over their steps, as SVG that takes its colours from the page."""

import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

__all__ = ["NUM_HUES", "Curve", "Line", "draw", "place_labels", "thin"]

Array = npt.NDArray[np.float64]

NUM_HUES = 6
_WIDTH, _HEIGHT = 520, 250  # px
_LEFT, _TOP, _BOTTOM = 46, 12, 26
_FONT, _LETTER, _LINE_GAP = 11, 5.9, 13.5  # px: size, mean width of a letter, between two labels
_MOST_POINTS, _LEAST_POINTS = 160, 40  # of one line alone, of one among many
_LOG_FROM = 12  # an axis is logarithmic where its largest number is so many times the smallest
_TICKS = [1, 2, 2.5, 5, 10]
_NAME = 18  # letters of a run's name beside a line

# Stand-ins that become the page's own colours, so that one drawing serves light and dark.
_INK, _GRID, _PAPER = "#00000a", "#00000b", "#00000c"
_HUES = tuple(f"#0000d{index}" for index in range(NUM_HUES))
_STYLES = {_INK: "var(--muted)", _GRID: "var(--grid)", _PAPER: "var(--paper)"} | {
    hue: f"var(--hue-{index})" for index, hue in enumerate(_HUES)
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shardrec",
    "font.size": _FONT,
    "text.parse_math": False,  # a run may be called "$"
    "path.simplify": True,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What one panel shows.

    Attributes:
        key: names the panel in the page.
        title, explanation: what it is, in words.
        value: from a logged event to the number; None where it has none.
        spell: the number beside the end of a line.
        from_zero: whether the axis begins at 0.
        may_be_log: whether the axis may be logarithmic.
        dots: whether every point is marked, because there are few.
    """

    key: str
    title: str
    explanation: str
    value: Callable[[Mapping[str, Any]], float | None]
    spell: Callable[[float], str]
    from_zero: bool = False
    may_be_log: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One run in a panel: (n,) rising steps and their values, and which of the runs it is."""

    name: str
    place: int
    steps: Array
    values: Array

    @classmethod
    def of(cls, name: str, place: int, events: Sequence[Mapping[str, Any]], curve: Curve) -> "Line":
        """The numbers of a run's events; those that are missing or not finite are left out."""
        pairs = [(event["step"], curve.value(event)) for event in events]
        kept = [(s, float(v)) for s, v in pairs if v is not None and math.isfinite(v)]
        numbers = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return cls(name, place, numbers[:, 0], numbers[:, 1])


def draw(curve: Curve, lines: Sequence[Line]) -> str:
    """An ``<svg>`` with every line labelled where it ends.

    Equal lines give equal text, on every machine with the same matplotlib.

    Args:
        curve: what the numbers are.
        lines: of the runs that have any; each at least one point.
    """
    is_log = _spans_decades(lines)
    most = max(_LEAST_POINTS, _MOST_POINTS // len(lines))
    lines = [thin(line, most, is_log=is_log) for line in lines]
    with matplotlib.rc_context(_SETTINGS):
        labels = [_label(curve, line, alone=len(lines) == 1) for line in lines]
        right = 16 + _LETTER * max(map(len, labels))
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="none")
        axes = figure.add_axes(
            (
                _LEFT / _WIDTH,
                _BOTTOM / _HEIGHT,
                (_WIDTH - _LEFT - right) / _WIDTH,
                (_HEIGHT - _TOP - _BOTTOM) / _HEIGHT,
            ),
            facecolor="none",
        )
        _set_scales(axes, curve, lines, is_log=is_log)
        for line in lines:
            _draw_line(axes, curve, line)
        _set_limits(axes, curve)
        _dress(axes)
        _write_labels(axes, lines, labels)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), curve, lines)


def thin(line: Line, most: int, *, is_log: bool) -> Line:
    """The line with at most ``most`` points: neighbours on the axis become their mean.

    Example:
        >>> line = Line("run", 0, np.arange(1.0, 5), np.array([0.0, 2.0, 4.0, 6.0]))
        >>> short = thin(line, 2, is_log=False)
        >>> short.steps.tolist(), short.values.tolist()
        ([1.0, 4.0], [1.0, 5.0])
    """
    if len(line.steps) <= most:
        return line
    along = np.log(line.steps) if is_log else line.steps
    share = (along - along[0]) / (along[-1] - along[0])
    bins = np.minimum(share * most, most - 1).astype(np.int64)
    counts = np.bincount(bins)
    sums = [np.bincount(bins, weights=column) for column in (line.steps, line.values)]
    steps, values = (total[counts > 0] / counts[counts > 0] for total in sums)
    steps[0], steps[-1] = line.steps[0], line.steps[-1]
    return dataclasses.replace(line, steps=steps, values=values)


def place_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights as near to the wanted ones as leaves ``gap`` between any two, inside [low, high].

    Args:
        wanted: rising.
        gap: smallest distance; less where there is no room for it.
        low: the lowest height.
        high: the highest height.

    Example:
        >>> place_labels([10, 11, 50], gap=5, low=0, high=100)
        [10, 15, 50]
        >>> place_labels([98, 99], gap=5, low=0, high=100)
        [95, 100]
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for height in wanted:
        least = placed[-1] + gap if placed else low
        placed.append(max(height, least))
    above = high + gap
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], above - gap)
        above = placed[index]
    return placed


def _label(curve: Curve, line: Line, *, alone: bool) -> str:
    value = curve.spell(float(line.values[-1]))
    return value if alone else f"{value}  {_shortened(line.name)}"


def _shortened(name: str) -> str:
    """The name with its middle left out where it is long.

    Example:
        >>> _shortened("beauty-cce_minus-4096-seed-3")
        'beauty-cce…-seed-3'
    """
    half = (_NAME - 1) // 2
    return name if len(name) <= _NAME else f"{name[: _NAME - 1 - half + 1]}…{name[-half + 1 :]}"


def _spans_decades(lines: Sequence[Line]) -> bool:
    """Whether a run is so much longer than another that steps need a logarithmic axis."""
    longest = [float(line.steps[-1]) for line in lines]
    return max(longest) >= _LOG_FROM * min(longest) and min(line.steps[0] for line in lines) > 0


def _set_scales(axes: Axes, curve: Curve, lines: Sequence[Line], *, is_log: bool) -> None:
    axes.set_xscale("log" if is_log else "linear")
    values = np.concatenate([line.values for line in lines])
    if curve.may_be_log and values.min() > 0 and values.max() >= _LOG_FROM * values.min():
        axes.set_yscale("log")


def _draw_line(axes: Axes, curve: Curve, line: Line) -> None:
    colour = _HUES[line.place % NUM_HUES]
    dashes = (0, (4, 1.5)) if line.place >= NUM_HUES else "solid"
    axes.plot(line.steps, line.values, color=colour, linewidth=1.6, linestyle=dashes)
    marked = slice(None) if curve.dots else slice(-1, None)
    axes.plot(
        line.steps[marked],
        line.values[marked],
        linestyle="none",
        marker="o",
        markersize=5,
        color=colour,
        markeredgecolor=_PAPER,
        markeredgewidth=1,
        clip_on=False,
    )


def _set_limits(axes: Axes, curve: Curve) -> None:
    if curve.from_zero:
        axes.set_ylim(0, max(1.05 * axes.get_ylim()[1], 1e-9))
    for axis, is_log in (
        (axes.xaxis, axes.get_xscale() == "log"),
        (axes.yaxis, axes.get_yscale() == "log"),
    ):
        axis.set_minor_formatter(NullFormatter())
        if is_log:
            axis.set_major_formatter(EngFormatter(sep=""))
        else:
            axis.set_major_locator(MaxNLocator(nbins=5, steps=_TICKS))
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICKS, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_yscale() != "log" and max(map(abs, axes.get_ylim())) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _dress(axes: Axes) -> None:
    """Hairlines behind the lines, and no frame."""
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=_INK, labelcolor=_INK, pad=5)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_GRID)


def _write_labels(axes: Axes, lines: Sequence[Line], labels: Sequence[str]) -> None:
    """One label a line, right of the axes; a thin line leads to it where the end is elsewhere."""
    ends = [axes.transData.transform((line.steps[-1], line.values[-1])) for line in lines]
    order = sorted(range(len(lines)), key=lambda index: float(ends[index][1]))
    heights = place_labels(
        [float(ends[index][1]) for index in order], _LINE_GAP, axes.bbox.y0 + 4, axes.bbox.y1 - 2
    )
    left = axes.bbox.x1 + 10
    for index, height in zip(order, heights, strict=True):
        colour = _HUES[lines[index].place % NUM_HUES]
        axes.annotate(
            labels[index],
            xy=(float(ends[index][0]), float(ends[index][1])),
            xycoords="figure pixels",
            xytext=(left, height),
            textcoords="figure pixels",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),  # begins left of the label and never runs through it
                "color": colour,
                "linewidth": 0.7,
                "linestyle": (0, (1, 2)),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _inline(svg: bytes, curve: Curve, lines: Sequence[Line]) -> str:
    """The drawing for the middle of a page: own names, the page's font and colours."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _restyled(name, value, curve.key)
            for name, value in element.attrib.items()
        }
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": _in_words(curve, lines)}
    return ET.tostring(root, encoding="unicode")


def _restyled(name: str, value: str, key: str) -> str:
    if name.rpartition("}")[2] == "id":
        return f"{key}-{value}"
    if name.rpartition("}")[2] == "href":
        return f"#{key}-{value.removeprefix('#')}"
    value = re.sub(r"url\(#([^)]*)\)", rf"url(#{key}-\1)", value)
    if name == "style":
        value = re.sub(r"font: ?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
        value = re.sub(r"#0000[0d][0-9abc]", lambda found: _STYLES[found[0]], value)
    return value


def _in_words(curve: Curve, lines: Sequence[Line]) -> str:
    ends = [
        f"{line.name} {curve.spell(float(line.values[-1]))} at step {int(line.steps[-1]):,}"
        for line in lines
    ]
    return f"{curve.title} by step. Last values: {'; '.join(ends)}."
