"""Callbacks of a training run: the interface with four hooks, and the built-in callbacks.

Every rank calls its hooks at the same steps with the same numbers. The built-in callbacks are
attached to rank 0 only; a user's callback runs on every rank and may use collectives.
"""

import dataclasses
import json
import logging
import math
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tqdm import tqdm
from typing_extensions import override

from shardrec.pipeline.checkpoint.writer import CheckpointReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "Callback",
    "EndReport",
    "JsonLines",
    "MinuteLines",
    "ProgressBar",
    "StepReport",
    "TensorBoard",
    "ValidationReport",
    "in_notebook",
    "progress",
    "step_scalars",
    "wrapped",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One optimizer step, over all ranks.

    Attributes:
        step: steps taken so far, including this one.
        epoch: epochs completed, as a fraction.
        loss: mean loss over the positions of the global batch.
        learning_rate: learning rate of the encoder, after warm-up and decay.
        gradient_norm: L2 norm over encoder and table, before clipping.
        positions: N, number of real positions in the global batch.
        padding_share: share of padding among the positions that attention processes; the encoder's
            other layers process no padding.
        seconds: wall time of the step, including data loading.
        skipped: whether the step was skipped because loss or gradients were not finite.
        num_skipped: number of steps skipped so far.
        memory_bytes: peak memory so far, over all ranks, of a process (or of its GPU).
        statistics: ``LossOutput.statistics`` of the loss, averaged over the micro-batches.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    positions: int
    padding_share: float
    seconds: float
    skipped: bool
    num_skipped: int
    memory_bytes: int
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """Metrics on the validation users, equal on every rank.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs completed, as a fraction.
        metric: name of the metric that decides which checkpoint is best.
        metrics: value of every metric, by name.
        improved: whether this is the best validation so far.
        seconds: wall time of the validation.
    """

    step: int
    epoch: float
    metric: str
    metrics: Mapping[str, float]
    improved: bool
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EndReport:
    """How a run ended.

    Attributes:
        output: the run folder.
        reason: why the run ended, as text.
        step: optimizer steps taken.
        epoch: epochs completed, as a fraction.
        seconds: wall time of the run, including validations and checkpoints.
        seconds_per_step: median over the steps, without the first.
        positions_per_second: real positions trained per second of step time, over all ranks.
        padding_share: share of padding among the positions that attention processed.
        memory_bytes: peak memory, over all ranks, of a process (or of its GPU).
        num_skipped: number of steps skipped because loss or gradients were not finite.
        best_step: the step of the best validation; None if there was none.
        best_metrics: the metrics of that validation.
    """

    output: str
    reason: str
    step: int
    epoch: float
    seconds: float
    seconds_per_step: float
    positions_per_second: float
    padding_share: float
    memory_bytes: int
    num_skipped: int
    best_step: int | None
    best_metrics: Mapping[str, float]


class Callback(Protocol):
    """Base class of callbacks; hooks that a subclass does not define do nothing."""

    def on_step(self, report: StepReport) -> None:
        """Called after every optimizer step, including skipped ones."""
        return None

    def on_validation(self, report: ValidationReport) -> None:
        """Called after every validation."""
        return None

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Called after every checkpoint, when it is complete or has failed."""
        return None

    def on_end(self, report: EndReport) -> None:
        """Called once, at the end of training."""
        return None


class JsonLines(Callback):
    """Appends a JSON line per event to a file: every ``every``-th step, and all other events."""

    def __init__(self, path: Path, every: int = 1) -> None:
        """Store the path; the file is opened for each line, so nothing is lost in a crash."""
        self.path, self.every, self._unwritten = path, every, ""

    @override
    def on_step(self, report: StepReport) -> None:
        if report.skipped or report.step % self.every == 0 or report.step == 1:
            self._write("step", report)

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self._write("validation", report)

    @override
    def on_checkpoint(self, report: CheckpointReport) -> None:
        self._write("checkpoint", report)

    @override
    def on_end(self, report: EndReport) -> None:
        self._write("end", report)

    def _write(self, event: str, report: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3)} | dataclasses.asdict(report)
        is_first = not self._unwritten
        self._unwritten += json.dumps(_finite(line), allow_nan=False) + "\n"
        try:
            _append(self.path, self._unwritten)
        except OSError as error:
            if event == "end":
                raise
            if is_first:
                message = "%s cannot be written now, its lines are kept for later: %s"
                logging.getLogger(__name__).warning(message, self.path, error)
        else:
            self._unwritten = ""


class TensorBoard(Callback):
    """Writes steps, metrics and loss statistics as TensorBoard scalars."""

    def __init__(self, folder: Path, every: int = 1, first_step: int | None = None) -> None:
        """Store the folder; the event file is opened by the first event.

        Args:
            folder: folder of the event files.
            every: steps between two points.
            first_step: first step of a resumed run; events of it and later steps in existing files
                are discarded. None: the run is new.
        """
        self.folder = folder
        self.every = every
        self.first_step = first_step
        self.writer: SummaryWriter | None = None
        self._has_failed = False

    @override
    def on_step(self, report: StepReport) -> None:
        if not report.skipped and report.step % self.every == 0:
            self._write("train", step_scalars(report), report.step)

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self._write("validation", report.metrics, report.step)

    @override
    def on_checkpoint(self, report: CheckpointReport) -> None:
        # A run resumed from this checkpoint does not write earlier points again.
        if self.writer is not None:
            self._try(self.writer.flush)

    @override
    def on_end(self, report: EndReport) -> None:
        if self.writer is not None:
            self._try(self.writer.close)

    def _write(self, group: str, values: Mapping[str, float], step: int) -> None:
        def write() -> None:
            from torch.utils.tensorboard import SummaryWriter

            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.first_step)
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

        self._try(write)

    def _try(self, work: Callable[[], None]) -> None:
        """Do ``work``; if the disk is full, leave a gap and continue in another file."""
        try:
            work()
        except OSError as error:
            if not self._has_failed:
                message = "%s cannot be written now, its curves have a gap: %s"
                logging.getLogger(__name__).warning(message, self.folder, error)
            self.writer, self._has_failed = None, True


class ProgressBar(Callback):
    """A progress bar on a terminal, with loss, last validation and positions per second."""

    def __init__(self, total: int | None, stream: TextIO) -> None:
        """Start the bar; ``total`` is the number of steps where known."""
        self.bar = tqdm(total=total, file=stream, unit="step", dynamic_ncols=True)

    @override
    def on_step(self, report: StepReport) -> None:
        self.bar.update(report.step - self.bar.n)
        self.bar.set_postfix_str(_summary(report))

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self.bar.write(_line(report), file=self.bar.fp)

    @override
    def on_end(self, report: EndReport) -> None:
        self.bar.write(f"stopped at step {report.step}: {report.reason}", file=self.bar.fp)
        self.bar.close()


class MinuteLines(Callback):
    """Prints a line per minute, per validation and for the last step: for a scheduler's logs."""

    def __init__(self, total: int | None, stream: TextIO, interval_seconds: float = 60.0) -> None:
        """Store where to write; the first step writes the first line."""
        self.total, self.stream, self.interval_seconds = total, stream, interval_seconds
        self.last = float("-inf")
        self.unwritten: StepReport | None = None

    @override
    def on_step(self, report: StepReport) -> None:
        self.unwritten = report
        if time.monotonic() - self.last >= self.interval_seconds:
            self.last = time.monotonic()
            self._write_step()

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self._write(_line(report))

    @override
    def on_end(self, report: EndReport) -> None:
        self._write_step()
        self._write(f"stopped at step {report.step}: {report.reason}")

    def _write_step(self) -> None:
        if self.unwritten is not None:
            step, epoch = self.unwritten.step, self.unwritten.epoch
            of_total = f"/{self.total}" if self.total else ""
            self._write(f"step {step}{of_total} epoch {epoch:.2f} {_summary(self.unwritten)}")
            self.unwritten = None

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def progress(total: int | None, stream: TextIO = sys.stderr) -> Callback:
    """A ``ProgressBar`` if ``stream`` is a terminal or a notebook, otherwise ``MinuteLines``."""
    has_bar = stream.isatty() or in_notebook()
    return ProgressBar(total, stream) if has_bar else MinuteLines(total, stream)


def wrapped(line: str) -> str:
    """The line in lines of at most 60 columns, broken at blanks; all but the first are indented."""
    return textwrap.fill(
        line, 60, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def step_scalars(report: StepReport) -> dict[str, float]:
    """The numbers of a step that TensorBoard and MLflow plot, by name."""
    values = {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "padding_share": report.padding_share,
        "positions_per_second": report.positions / report.seconds,
        "seconds_per_step": report.seconds,
        "memory_gib": report.memory_bytes / 2**30,
    }
    return values | dict(report.statistics)


def _append(path: Path, text: str) -> None:
    """Append a text completely or not at all."""
    with path.open("ab", buffering=0) as file:
        size, content = file.tell(), text.encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None, because JSON cannot represent them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(report: StepReport) -> str:
    text = (
        f"loss {report.loss:.4f} {report.seconds:.3f} s/step "
        f"{report.positions / report.seconds:,.0f} positions/s "
        f"{report.memory_bytes / 2**30:.2f} GiB"
    )
    return text + (f" skipped {report.num_skipped}" if report.num_skipped else "")


def _line(report: ValidationReport) -> str:
    place = "@" + report.metric.rpartition("@")[2]
    shown = {report.metric: report.metrics[report.metric]}
    shown |= {name: value for name, value in report.metrics.items() if name.endswith(place)}
    metrics = " ".join(f"{name}\N{NO-BREAK SPACE}{value:.4f}" for name, value in shown.items())
    mark = " (best)" if report.improved else ""
    line = f"validation at step {report.step}{mark}: {metrics}"
    return wrapped(line).replace("\N{NO-BREAK SPACE}", " ")
