"""Draw curves of several runs over their steps, as SVG in the page's own colours.

A drawing fills the width that it is given and keeps the size of its text: positions along the
horizontal axis are percentages of the plot, all other lengths are pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["HEIGHT", "NUM_HUES", "Curve", "Line", "draw", "place_labels", "thin"]

Array = npt.NDArray[np.float64]

NUM_HUES = 6
HEIGHT = 260  # px
_LEFT, _TOP, _BOTTOM = 46, 24, 40  # px beside the plot
_PLOT = HEIGHT - _TOP - _BOTTOM
_ALONG = 1000  # units of a curve's points along the plot
_FONT, _LETTER, _LINE_GAP = 12, 6.9, 14.0  # px: size, mean width of a letter, between two labels
_MOST_POINTS, _LEAST_POINTS = 160, 40  # of a single line, of one line among many
_LOG_FROM = 12  # an axis is logarithmic where its largest number is so many times the smallest
_NAME = 18  # letters of a run's name at the end of a line
_STEPS = (1, 2, 2.5, 5, 10)  # between two ticks, times a power of ten


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A panel of the report: the quantity, and how it is drawn.

    Attributes:
        title: title of the panel.
        explanation: what the quantity is.
        unit: label of the vertical axis.
        value: function that takes a logged event and returns its number; None if it has none.
        to_text: formats the number at the end of a line.
        from_zero: whether the axis begins at 0.
        may_be_log: whether the axis may be logarithmic.
        is_validation: whether its events are validations; they are few, so each point is marked.
        along: what the horizontal axis counts.
    """

    title: str
    explanation: str
    unit: str
    value: Callable[[Mapping[str, Any]], float | None]
    to_text: Callable[[float], str]
    from_zero: bool = False
    may_be_log: bool = False
    is_validation: bool = False
    along: str = "step"


@dataclass(frozen=True, slots=True)
class Line:
    """One run in a panel: (n,) ascending steps, their (n,) values, and the run's index."""

    name: str
    index: int
    steps: Array
    values: Array

    @classmethod
    def of(cls, name: str, index: int, events: Sequence[Mapping[str, Any]], curve: Curve) -> "Line":
        """The line of a run's events with a finite number."""
        pairs = [(event["step"], curve.value(event)) for event in events]
        kept = [(s, float(v)) for s, v in pairs if v is not None and math.isfinite(v)]
        numbers = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return cls(name, index, numbers[:, 0], numbers[:, 1])

    @property
    def colour(self) -> str:
        """The line's colour, as a CSS variable of the page."""
        return f"var(--hue-{self.index % NUM_HUES})"


def draw(
    curve: Curve,
    lines: Sequence[Line],
    levels: Mapping[str, float] | None = None,
    width: int | None = None,
) -> str:
    """An ``<svg>`` with a label at the end of every line; a line needs at least one point.

    Args:
        curve: what is drawn.
        lines: one for each run.
        levels: values by name, such as those of baselines, drawn as dashed lines across the plot.
        width: pixels, for a drawing within another; None takes the width of the page's column.
    """
    levels = levels or {}
    is_log = _spans_decades(lines)
    most = max(_LEAST_POINTS, _MOST_POINTS // len(lines))
    lines = [thin(line, most, is_log=is_log) for line in lines]
    labels = [_label(curve, line, alone=len(lines) == 1 and not levels) for line in lines]
    labels += [f"{curve.to_text(value)}  {_shortened(name)}" for name, value in levels.items()]
    right = 16 + _LETTER * max(map(len, labels))
    x = _Axis.of([line.steps for line in lines], (0, 100), is_log=is_log)
    values = np.concatenate([*(line.values for line in lines), np.array([*levels.values()])])
    y_is_log = curve.may_be_log and values.min() > 0 and values.max() >= _LOG_FROM * values.min()
    y = _Axis.of([values], (_PLOT, 0), is_log=y_is_log).widened(curve.from_zero)
    ends = [_End.of(line, x, y) for line in lines]
    ends += [_End(100.0, y.pixel(value), "var(--muted)") for value in levels.values()]
    parts = [
        *_grid(curve, x, y),
        *(_level(end.top) for end in ends[len(lines) :]),
        *(part for line in lines for part in _line(curve, line, x, y)),
        *_labels(ends, labels),
    ]
    if width is None:
        margins = f"margin: {_TOP}px 0 {_BOTTOM}px {_LEFT}px"
        place = f'style="width: calc(100% - {_LEFT + right:.0f}px); {margins}"'
    else:
        place = f'x="{_LEFT}" y="{_TOP}" width="{width - _LEFT - right:.0f}"'
    return (
        f'<svg {place} height="{_PLOT}" overflow="visible" role="img" font-size="{_FONT}" '
        f'aria-label="{escape(_in_words(curve, lines, levels))}">{"".join(parts)}</svg>'
    )


def thin(line: Line, most: int, *, is_log: bool) -> Line:
    """The line with at most ``most`` points, each the mean of neighbouring points.

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
    """Heights of labels in [low, high], ``gap`` apart and near the (ascending) wanted heights.

    They are closer together if there is no room for ``gap``.

    Example:
        >>> place_labels([10, 11, 50], gap=5, low=0, high=100)
        [10, 15, 50]
        >>> place_labels([98, 99], gap=5, low=0, high=100)
        [95, 100]
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for height in wanted:
        placed.append(max(height, placed[-1] + gap if placed else low))
    above = high + gap
    for index in reversed(range(len(placed))):
        placed[index] = above = min(placed[index], above - gap)
    return placed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """A range of numbers, and the places of its two ends: percent along, pixels upwards."""

    low: float
    high: float
    ends: tuple[float, float]
    is_log: bool

    @classmethod
    def of(cls, numbers: Sequence[Array], ends: tuple[float, float], *, is_log: bool) -> "_Axis":
        low, high = min(part.min() for part in numbers), max(part.max() for part in numbers)
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(low=float(low), high=float(high), ends=ends, is_log=is_log)

    def widened(self, from_zero: bool) -> "_Axis":
        """With some air at the ends, or from 0."""
        if from_zero:
            return dataclasses.replace(self, low=0.0, high=max(1.1 * self.high, 1e-9))
        if self.is_log:
            return dataclasses.replace(self, low=self.low / 1.2, high=self.high * 1.2)
        air = 0.05 * (self.high - self.low)
        return dataclasses.replace(self, low=self.low - air, high=self.high + air)

    def pixels(self, numbers: Array) -> Array:
        bounds = np.array([self.low, self.high])
        if self.is_log:
            numbers, bounds = np.log(numbers), np.log(bounds)
        result: Array = np.interp(numbers, bounds, self.ends)
        return result

    def pixel(self, number: float) -> float:
        return float(self.pixels(np.array([number]))[0])

    def ticks(self, *, whole: bool = False) -> Iterator[tuple[float, str]]:
        """The place and the text of each tick."""
        if self.is_log:
            numbers = _round_factors(self.low, self.high)
        else:
            numbers = _round_numbers(self.low, self.high, whole=whole)
        return zip(self.pixels(np.array(numbers)).tolist(), map(_short, numbers), strict=True)


def _round_factors(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; where they are fewer than three, also 2 and 5 times them.

    Example:
        >>> _round_factors(0.3, 4.0), _round_factors(1.0, 100.0)
        ([0.5, 1.0, 2.0], [1.0, 10.0, 100.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 2, 5)):
        every = [round(factor * 10.0**decade, 12) for decade in decades for factor in factors]
        found = [number for number in every if low <= number <= high]
        if len(found) > 2:
            break
    return found


def _round_numbers(low: float, high: float, *, whole: bool) -> list[float]:
    """At most six round numbers at equal distances in [low, high].

    Example:
        >>> _round_numbers(0.0, 0.11, whole=False)
        [0.0, 0.025, 0.05, 0.075, 0.1]
        >>> _round_numbers(0.5, 3.5, whole=True)
        [1.0, 2.0, 3.0]
    """
    least = (high - low) / 5
    decade = 10.0 ** math.floor(math.log10(least))
    found = (step * decade for step in _STEPS)
    if whole:
        found = (max(1.0, float(math.ceil(step))) for step in found)
    step = next(step for step in found if step >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _short(number: float) -> str:
    """The number with k, M or G where it has more than four digits.

    Example:
        >>> _short(0.25), _short(2500), _short(25_000), _short(2_500_000)
        ('0.25', '2500', '25k', '2.5M')
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(unit, 1e4):
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


@dataclass(frozen=True, order=True, slots=True)
class _End:
    """Where a line ends: percent along, pixels from the top, and its colour."""

    along: float
    top: float
    colour: str

    @classmethod
    def of(cls, line: Line, x: _Axis, y: _Axis) -> "_End":
        return cls(x.pixel(line.steps[-1]), y.pixel(line.values[-1]), line.colour)


def _grid(curve: Curve, x: _Axis, y: _Axis) -> Iterator[str]:
    """Ticks and names of both axes, and a line for each tick of the vertical one."""
    for top, text in y.ticks():
        yield _across(top, 'stroke="var(--grid)"')
        yield _text("-5", top, text, 'text-anchor="end" fill="var(--muted)"')
    yield _across(_PLOT, 'stroke="var(--grid)"')
    yield _text(str(5 - _LEFT), -14, curve.unit, 'fill="var(--muted)"')
    for along, text in x.ticks(whole=True):
        yield _text(f"{along:.2f}%", _PLOT + 12, text, 'text-anchor="middle" fill="var(--muted)"')
    yield _text("50%", _PLOT + 29, curve.along, 'text-anchor="middle" fill="var(--muted)"')


def _across(top: float, attributes: str) -> str:
    return f'<line x1="0" x2="100%" y1="{top:.1f}" y2="{top:.1f}" {attributes}/>'


def _level(top: float) -> str:
    return _across(top, 'stroke="var(--muted)" stroke-width="1.2" stroke-dasharray="7 4"')


def _line(curve: Curve, line: Line, x: _Axis, y: _Axis) -> Iterator[str]:
    places = list(zip(x.pixels(line.steps), y.pixels(line.values), strict=True))
    dashes = ' stroke-dasharray="6 2.5"' if line.index >= NUM_HUES else ""
    path = " ".join(f"{along / 100 * _ALONG:.1f},{top:.1f}" for along, top in places)
    # Stretched along the plot; the width of the stroke is not.
    yield (
        f'<svg viewBox="0 0 {_ALONG} {_PLOT}" preserveAspectRatio="none" width="100%" '
        f'height="{_PLOT}" overflow="visible"><polyline points="{path}" fill="none" '
        f'stroke="{line.colour}" stroke-width="1.6" stroke-linejoin="round"{dashes} '
        'vector-effect="non-scaling-stroke"/></svg>'
    )
    for along, top in places if curve.is_validation else places[-1:]:
        yield (
            f'<circle cx="{along:.2f}%" cy="{top:.1f}" r="2.5" fill="{line.colour}" '
            'stroke="var(--paper)"/>'
        )


def _labels(ends: Sequence[_End], labels: Sequence[str]) -> Iterator[str]:
    """One label a line, right of the plot, and a dotted line from the end of the curve to it."""
    pairs = sorted(zip(ends, labels, strict=True), key=lambda pair: (pair[0].top, pair[1]))
    heights = place_labels([end.top for end, _ in pairs], _LINE_GAP, 2, _PLOT - 4)
    for (end, label), height in zip(pairs, heights, strict=True):
        dotted = f'stroke="{end.colour}" stroke-width=".7" stroke-dasharray="1 2"'
        yield (
            f'<line x1="{end.along:.2f}%" y1="{end.top:.1f}" x2="100%" y2="{height:.1f}" {dotted}/>'
        )
        yield _text("100%", height, label, f'dx="6" fill="{end.colour}" style="white-space: pre"')


def _text(left: str, middle: float, text: str, attributes: str) -> str:
    return f'<text x="{left}" y="{middle + 0.35 * _FONT:.1f}" {attributes}>{escape(text)}</text>'


def _label(curve: Curve, line: Line, *, alone: bool) -> str:
    value = curve.to_text(float(line.values[-1]))
    return value if alone else f"{value}  {_shortened(line.name)}"


def _shortened(name: str) -> str:
    """The name with its middle left out where it is long.

    Example:
        >>> _shortened("beauty-cce_minus-4096-seed-3")
        'beauty-cce…-seed-3'
    """
    half = (_NAME - 1) // 2
    return name if len(name) <= _NAME else f"{name[: _NAME - half]}…{name[-half + 1 :]}"


def _spans_decades(lines: Sequence[Line]) -> bool:
    """Whether a run is so much longer than another that steps need a logarithmic axis."""
    longest = [float(line.steps[-1]) for line in lines]
    return max(longest) >= _LOG_FROM * min(longest) and min(line.steps[0] for line in lines) > 0


def _in_words(curve: Curve, lines: Sequence[Line], levels: Mapping[str, float]) -> str:
    ends = [
        f"{line.name} {curve.to_text(float(line.values[-1]))} "
        f"at {curve.along} {int(line.steps[-1]):,}"
        for line in lines
    ]
    ends += [f"{name} {curve.to_text(value)} throughout" for name, value in levels.items()]
    return f"{curve.title} by {curve.along}. Last values: {'; '.join(ends)}."
