"""A callback for W&B and for every tracker whose runs have the same two methods."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from typing_extensions import override

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.ranks import default_group
from shardrec.pipeline.run.callbacks import (
    Callback,
    EndReport,
    StepReport,
    ValidationReport,
    step_scalars,
)

__all__ = ["LogTo", "Logger"]


class Logger(Protocol):
    """The interface of a tracker's run."""

    def log(self, values: Mapping[str, Any], *, step: int) -> object:
        """Log values by name, measured after ``step`` optimizer steps."""

    def finish(self) -> object:
        """Flush everything; no call follows."""


class LogTo(Callback):
    """Sends steps, validations and the end of a run to a tracker, on rank 0.

    If the tracker raises, one warning is given, and training continues without it.
    """

    def __init__(self, open_logger: Callable[[], Logger], every: int = 10) -> None:
        """Store how the tracker is opened; the first event on rank 0 opens it.

        Args:
            open_logger: such as ``lambda: wandb.init(project="shop")``.
            every: steps between two points of the training curves.
        """
        self.open_logger, self.every = open_logger, every
        self._logger: Logger | None = None
        self._is_off = False

    @override
    def on_step(self, report: StepReport) -> None:
        if report.step % self.every == 0 and not report.skipped:
            self._log("train", step_scalars(report), report.step)

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self._log("validation", report.metrics, report.step)

    @override
    def on_end(self, report: EndReport) -> None:
        numbers = {
            name: value
            for name, value in dataclasses.asdict(report).items()
            if isinstance(value, int | float) and name != "step"
        }
        self._log("end", numbers, report.step)
        self._try(lambda: self._logger.finish() if self._logger else None)

    def _log(self, group: str, values: Mapping[str, float], step: int) -> None:
        def log() -> None:
            if self._logger is None:
                self._logger = self.open_logger()
            self._logger.log({f"{group}/{name}": one for name, one in values.items()}, step=step)

        self._try(log)

    def _try(self, work: Callable[[], object]) -> None:
        if self._is_off or Communicator(default_group()).rank:
            return
        try:
            work()
        except Exception as error:  # of other people's code: anything
            self._is_off = True
            message = "the tracker of LogTo gets nothing more, after %s: %s"
            logging.getLogger(__name__).warning(message, type(error).__name__, error)
