"""A drawing of loss and validation metric that grows in the output of a notebook's cell."""

import importlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from shardrec.pipeline.report.curves import HEIGHT, Curve, Line, draw, thin
from shardrec.pipeline.run.callbacks import Callback, EndReport, StepReport, ValidationReport

__all__ = ["LiveCurve", "live_curve"]

_WIDTH = 560  # px
_MOST_POINTS = 4096  # kept of the loss; neighbours are averaged beyond
# The drawing may be shown as an image, to which the colours of the notebook do not reach.
_STYLE = (
    "svg {--paper: #fff; --muted: #5a6470; --grid: #e3e6ea; --hue-0: #0068a8;"
    " font-family: system-ui, sans-serif}"
)
_LOSS = Curve(
    title="Loss",
    explanation="of the batches",
    unit="loss",
    value=lambda event: event["value"],
    to_text="{:.3f}".format,
)


class LiveCurve(Callback):
    """Shows loss and validation metric as one drawing, replaced every few seconds."""

    def __init__(self, show: Callable[[dict[str, str]], None], interval_s: float = 3.0) -> None:
        """Start without points.

        Args:
            show: takes the drawing by MIME type, and replaces the one before.
            interval_s: seconds between two drawings of steps; a validation is drawn at once.
        """
        self.show, self.interval_s, self.drawn = show, interval_s, time.monotonic()
        self.losses: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.metric = ""

    @override
    def on_step(self, report: StepReport) -> None:
        if math.isfinite(report.loss):
            self.losses.append({"step": report.step, "value": report.loss})
        if len(self.losses) > _MOST_POINTS:
            self._halve()
        if time.monotonic() - self.drawn >= self.interval_s:
            self._draw()

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self.metric = report.metric
        self.validations.append({"step": report.step, "value": report.metrics[report.metric]})
        self._draw()

    @override
    def on_end(self, report: EndReport) -> None:
        self._draw()

    def _draw(self) -> None:
        if self.losses:
            self.show({"image/svg+xml": self._svg(), "text/plain": self._text()})
        self.drawn = time.monotonic()

    def _svg(self) -> str:
        """Both panels, one above the other; without a validation the loss alone."""
        drawings = [draw(_LOSS, [Line.of("loss", 0, self.losses, _LOSS)], width=_WIDTH)]
        if self.validations:
            curve = _of_metric(self.metric)
            line = Line.of(self.metric, 0, self.validations, curve)
            drawings.insert(0, draw(curve, [line], width=_WIDTH))
        parts = [
            f'<g transform="translate(0 {place * HEIGHT})">{drawing}</g>'
            for place, drawing in enumerate(drawings)
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" '
            f'height="{len(parts) * HEIGHT}"><style>{_STYLE}</style>'
            f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>'
        )

    def _text(self) -> str:
        last = self.losses[-1]
        return f"loss {last['value']:.4f} at step {last['step']:,}"

    def _halve(self) -> None:
        line = thin(Line.of("loss", 0, self.losses, _LOSS), _MOST_POINTS // 2, is_log=False)
        pairs = zip(line.steps.tolist(), line.values.tolist(), strict=True)
        self.losses = [{"step": int(step), "value": value} for step, value in pairs]


def live_curve() -> LiveCurve:
    """A ``LiveCurve`` in the cell that runs; this process must be a notebook's kernel."""
    display: Any = importlib.import_module("IPython.display").display
    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(drawing: Mapping[str, str]) -> None:
        handle.update(drawing, raw=True)

    return LiveCurve(show)


def _of_metric(metric: str) -> Curve:
    return Curve(
        title=f"Validation {metric}",
        explanation="of the validation users",
        unit=metric,
        value=lambda event: event["value"],
        to_text="{:.4f}".format,
        from_zero=True,
        is_validation=True,
    )
