"""Draw curves of several runs over their steps, as SVG in the page's own colours."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import EngFormatter, MaxNLocator

__all__ = ["NUM_HUES", "Curve", "Line", "draw", "place_labels", "thin"]

Array = npt.NDArray[np.float64]

NUM_HUES = 6
_WIDTH, _HEIGHT = 520, 250  # px
_LEFT, _TOP, _BOTTOM = 46, 12, 26
_FONT, _LETTER, _LINE_GAP = 11, 5.9, 13.5  # px: size, mean width of a letter, between two labels
_MOST_POINTS, _LEAST_POINTS = 160, 40  # of a single line, of one line among many
_LOG_FROM = 12  # an axis is logarithmic where its largest number is so many times the smallest
_NAME = 18  # letters of a run's name at the end of a line


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A panel of the report: the quantity, and how it is drawn.

    Attributes:
        title: title of the panel.
        explanation: the quantity and its unit.
        value: function that takes a logged event and returns its number; None if it has none.
        to_text: formats the number at the end of a line.
        from_zero: whether the axis begins at 0.
        may_be_log: whether the axis may be logarithmic.
        is_validation: whether its events are validations; they are few, so each point is marked.
        along: what the horizontal axis counts.
    """

    title: str
    explanation: str
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


def draw(curve: Curve, lines: Sequence[Line]) -> str:
    """An ``<svg>`` with a label at the end of every line; a line needs at least one point."""
    is_log = _spans_decades(lines)
    most = max(_LEAST_POINTS, _MOST_POINTS // len(lines))
    lines = [thin(line, most, is_log=is_log) for line in lines]
    labels = [_label(curve, line, alone=len(lines) == 1) for line in lines]
    right = 16 + _LETTER * max(map(len, labels))
    x = _Axis.of([line.steps for line in lines], (_LEFT, _WIDTH - right), is_log=is_log)
    values = np.concatenate([line.values for line in lines])
    y_is_log = curve.may_be_log and values.min() > 0 and values.max() >= _LOG_FROM * values.min()
    y = _Axis.of([values], (_HEIGHT - _BOTTOM, _TOP), is_log=y_is_log).widened(curve.from_zero)
    parts = [
        *_grid(x, y),
        *(part for line in lines for part in _line(curve, line, x, y)),
        *_labels(lines, labels, x, y),
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="{_FONT}" '
        f'aria-label="{escape(_in_words(curve, lines))}">{"".join(parts)}</svg>'
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
    """A range of numbers and the pixels at its two ends."""

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

    def ticks(self, *, whole: bool = False) -> Iterator[tuple[float, str]]:
        """The pixel and the text of each tick."""
        if self.is_log:
            decades = range(math.ceil(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            numbers = np.array([10.0**decade for decade in decades])
        else:
            locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole)
            numbers = np.asarray(locator.tick_values(self.low, self.high))
        numbers = numbers[(numbers >= self.low) & (numbers <= self.high)]
        short = self.is_log or max(abs(self.low), abs(self.high)) >= 10_000
        to_text = EngFormatter(sep="") if short else "{:g}".format
        return zip(self.pixels(numbers).tolist(), map(to_text, numbers.tolist()), strict=True)


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    left, right = x.ends
    for place, text in y.ticks():
        yield f'<path d="M{left:.1f} {place:.1f}H{right:.1f}" stroke="var(--grid)"/>'
        yield _text(left - 5, place, text, 'text-anchor="end" fill="var(--muted)"')
    yield f'<path d="M{left:.1f} {y.ends[0]:.1f}H{right:.1f}" stroke="var(--grid)"/>'
    yield _text(left - 5, _HEIGHT - 10, "step", 'text-anchor="end" fill="var(--muted)"')
    for place, text in x.ticks(whole=True):
        yield _text(place, _HEIGHT - 10, text, 'text-anchor="middle" fill="var(--muted)"')


def _line(curve: Curve, line: Line, x: _Axis, y: _Axis) -> Iterator[str]:
    points = list(zip(x.pixels(line.steps), y.pixels(line.values), strict=True))
    dashes = ' stroke-dasharray="6 2.5"' if line.index >= NUM_HUES else ""
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    stroke = f'stroke="{line.colour}" stroke-width="1.6"{dashes}'
    yield f'<polyline points="{path}" fill="none" {stroke}/>'
    for left, top in points if curve.is_validation else points[-1:]:
        yield (
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5" fill="{line.colour}" '
            'stroke="var(--paper)"/>'
        )


def _labels(lines: Sequence[Line], labels: Sequence[str], x: _Axis, y: _Axis) -> Iterator[str]:
    """One label a line, right of the axes, and a dotted line from the end of the curve to it."""
    ends = sorted(
        (y.pixels(line.values[-1:])[0], x.pixels(line.steps[-1:])[0], line.colour, label)
        for line, label in zip(lines, labels, strict=True)
    )
    heights = place_labels([end[0] for end in ends], _LINE_GAP, _TOP + 2, _HEIGHT - _BOTTOM - 4)
    left = x.ends[1] + 10
    for (top, start, colour, label), height in zip(ends, heights, strict=True):
        yield (
            f'<path d="M{start + 4:.1f} {top:.1f}L{left - 1:.1f} {height:.1f}" '
            f'stroke="{colour}" stroke-width=".7" stroke-dasharray="1 2"/>'
        )
        yield _text(left, height, label, f'fill="{colour}" style="white-space: pre"')


def _text(left: float, middle: float, text: str, attributes: str) -> str:
    return (
        f'<text x="{left:.1f}" y="{middle + 0.35 * _FONT:.1f}" {attributes}>{escape(text)}</text>'
    )


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


def _in_words(curve: Curve, lines: Sequence[Line]) -> str:
    ends = [
        f"{line.name} {curve.to_text(float(line.values[-1]))} "
        f"at {curve.along} {int(line.steps[-1]):,}"
        for line in lines
    ]
    return f"{curve.title} by {curve.along}. Last values: {'; '.join(ends)}."
